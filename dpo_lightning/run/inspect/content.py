"""Content of what ``inspect`` shows, as texts that a terminal and a page only place.

Every text that comes from rows or files goes through :func:`visible` here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_lightning.data.bad_rows import count_of
from dpo_lightning.data.labels import LabelCounts
from dpo_lightning.data.tokens import DROP_REASONS
from dpo_lightning.run.inspect.oddities import SAID
from dpo_lightning.run.inspect.visible import visible

_FORMS = {
    "pair": "chosen and rejected",
    "responses": "responses, best first",
    "ranks": "responses with ranks",
    "scores": "responses with scores",
    "better": "responses and the name of the better one",
    "label": "one response with a label",
}


@dataclass(frozen=True, slots=True)
class Fact:
    """A line.

    Attributes:
        label: Its name.
        value: Its text.
        warns: True if it may be a fault of the rows or the settings.
    """

    label: str
    value: str
    warns: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a histogram: its label, its count, and its length, 1 for the longest."""

    label: str
    count: str
    share: float


@dataclass(frozen=True, slots=True)
class Bars:
    """A histogram.

    Attributes:
        title: Quantity and quantiles.
        bars: From the shortest to the longest.
    """

    title: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token, or several that are one character: its text, ``kind`` is a style's name."""

    text: str
    kind: str


@dataclass(frozen=True, slots=True)
class Passage:
    """The prompt or a response of the example, token by token."""

    title: str
    pieces: tuple[TokenText, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page under a heading."""

    title: str
    facts: tuple[Fact, ...] = ()
    histograms: tuple[Bars, ...] = ()
    passages: tuple[Passage, ...] = ()


def parts_of(found: Mapping[str, Any]) -> list[Section]:
    """The parts of the page, in their order.

    Args:
        found: The JSON object of the command.
    """
    parts = [
        Section("Rows", tuple(_rows(found))),
        Section("To look at", tuple(_oddities(found))),
        Section("Lengths", tuple(_lengths(found)), histograms=tuple(_histograms(found))),
        Section("Plan", tuple(_plan(found))),
    ]
    if found["example"] is not None:
        parts.append(_example(found["example"]))
    notes = [Fact("note", visible(note)) for note in found["notes"]]
    notes += [Fact("would stop", visible(line), warns=True) for line in found["refused"]]
    return [*parts, *([Section("Said by the run", tuple(notes))] if notes else [])]


def _rows(found: Mapping[str, Any]) -> Iterator[Fact]:
    for side, source in found["rows"].items():
        if source is None:
            continue
        yield Fact(f"data.{side}", visible(source["source"]))
        yield Fact("", f"{source['read']:,} rows read, {source['used']:,} used")
        forms = [f"{count:,} {_FORMS[form]}" for form, count in source["forms"].items()]
        kinds = [f"{count:,} of {visible(name)}" for name, count in source["texts"].items()]
        yield Fact("form", "; ".join([*forms, *kinds]))
        if sum(source["labels"].values()):
            yield Fact("labels", _labels(source["labels"]))
        if source["unrated"]:
            yield Fact("", f"{count_of(source['unrated'], 'answer')} without a rating left out")
        if source["reordered"]:
            yield Fact("", f"{source['reordered']:,} rows were not in the order of their ranks")
        for reason, count in source["dropped"].items():
            yield Fact("dropped", f"{count:,}: {DROP_REASONS[reason]}", warns=True)
        for change, count in source["changed"].items():
            yield Fact("changed", f"{count:,} with a {change.replace('_', ' ')}", warns=True)
        if source["unread"]:
            yield Fact("not read", ", ".join(map(visible, source["unread"])))
        for bad in source["bad"]:
            yield Fact(
                "bad row", visible(f"{bad['place']}: {bad['field']}: {bad['problem']}"), True
            )
    groups = found["groups"]
    how = groups["split"]
    if groups["eval_fraction"] is not None:
        how += f", data.eval_fraction={groups['eval_fraction']:g}"
    yield Fact("split", f"{groups['train']:,} to train on, {groups['eval']:,} to evaluate ({how})")
    if groups["evaluated"] < groups["eval"]:
        yield Fact("", f"a fixed sample of {groups['evaluated']:,} of these is evaluated")
    counts = ", ".join(f"{count:,} of {size}" for size, count in groups["responses"].items())
    labels = groups["labels"]
    alone = bool(sum(labels.values()))
    told = [f"{groups['pairs']:,} ranked pairs"] if groups["pairs"] or not alone else []
    told += [_labels(labels)] if alone else []
    yield Fact("responses", "; ".join([counts, *told]))
    template = found["template"]
    if template is not None:
        said = template["says"] if template["used"] else "not used"
        yield Fact("template", visible("; ".join([said, *template["notes"]])))


def _labels(counts: Mapping[str, int]) -> str:
    """The labels of single responses in words."""
    return str(LabelCounts(counts["desirable"], counts["undesirable"]))


def _oddities(found: Mapping[str, Any]) -> Iterator[Fact]:
    leaked = found["oddities"]["leaked"]
    sides = {side: kinds for side, kinds in found["oddities"].items() if side != "leaked"}
    nothing = True
    for side, kinds in sides.items():
        for name, said in SAID.items():
            if kinds[name]["count"]:
                nothing = False
                yield Fact(_counted(kinds[name]), _with_places(said, side, kinds[name]), warns=True)
    if leaked["count"]:
        nothing = False
        said = "evaluation rows whose prompt is trained on"
        if sum(found["groups"]["labels"].values()):
            said = "evaluation rows of a conversation that is trained on"
        yield Fact(_counted(leaked), _with_places(said, "", leaked), warns=True)
    if nothing:
        yield Fact("nothing", "no duplicates, identical or contradictory pairs, shared prompts")


def _counted(found: Mapping[str, Any]) -> str:
    return f"{found['count']:,}"


def _with_places(said: str, side: str, found: Mapping[str, Any]) -> str:
    # The file is named above; what tells rows apart is the line.
    places = [visible(place.rpartition("/")[2]) for place in found["places"]]
    more = "…" if found["count"] > len(places) else ""
    where = f" of data.{side}" if side == "eval" else ""
    return f"{said}{where}: {', '.join(places)}{', ' if more else ''}{more}"


def _lengths(found: Mapping[str, Any]) -> Iterator[Fact]:
    bias = found["length_bias"]
    if bias["pairs"]:
        difference = bias["mean_difference"]
        yield Fact(
            "length bias",
            f"the chosen response is longer in {bias['share']:.0%} of {bias['pairs']:,} pairs, "
            f"shorter in {bias['rejected_longer'] / bias['pairs']:.0%}; by {difference:+.1f} "
            "tokens in the mean",
        )
    cut = found["truncation"]
    longest = 0 if cut["whole"] is None else cut["whole"]["max"]
    said = f"data.max_length={cut['max_length']}, data.truncation={cut['how']}: "
    if not cut["groups_cut"] and not cut["groups_dropped"]:
        yield Fact("truncation", f"{said}takes nothing (longest {longest:,} tokens)")
        return
    losses = []
    for kind, verb in (("cut", "cut by"), ("dropped", "dropped with")):
        if cut[f"groups_{kind}"]:
            count, tokens = cut[f"groups_{kind}"], cut[f"tokens_{kind}"]
            losses.append(f"{count:,} rows {verb} {tokens:,} tokens")
    yield Fact(
        "truncation",
        f"{said}{', '.join(losses)} (longest prompt + response: {longest:,} tokens)",
        warns=True,
    )


def _histograms(found: Mapping[str, Any]) -> Iterator[Bars]:
    cut = found["truncation"]
    if cut["whole"] is not None and (cut["groups_cut"] or cut["groups_dropped"]):
        yield _bars("prompt + longest response, before truncation", cut["whole"])
    for name in ("prompt", "response"):
        lengths = found["lengths"]["train"][name]
        if lengths is not None:
            yield _bars(f"{name}, as trained on", lengths)


def _bars(name: str, lengths: Mapping[str, Any]) -> Bars:
    most = max(bar["count"] for bar in lengths["histogram"])
    return Bars(
        f"{name}: median {lengths['median']:g} tokens, mean {lengths['mean']:.1f}, "
        f"95% up to {lengths['p95']:.0f}, longest {lengths['max']:,}",
        tuple(
            Bar(_range(bar), f"{bar['count']:,}", bar["count"] / most)
            for bar in lengths["histogram"]
        ),
    )


def _range(bar: Mapping[str, int]) -> str:
    last = bar["to"] - 1
    return f"{bar['from']:,}" if last == bar["from"] else f"{bar['from']:,}–{last:,}"


def _plan(found: Mapping[str, Any]) -> Iterator[Fact]:
    plan, memory = found["plan"], found["memory"]
    yield Fact("model", visible(found["model"]["name"]))
    if plan is None:
        yield Fact("steps", "none: no row is left to train on", warns=True)
        return
    epochs = f"{plan['steps'] / plan['steps_per_epoch']:.3g} epochs"
    epochs = epochs.removesuffix("s") if epochs == "1 epochs" else epochs
    yield Fact(
        "steps",
        f"{plan['steps']:,} x {plan['batch_size']:,} prompts ({epochs}), learning rate "
        f"{plan['learning_rate']:g}, warm-up steps: {plan['warmup_steps']:,}",
    )
    if plan["evaluations"] is not None:
        yield Fact("evaluation", plan["evaluations"]["says"])
    yield Fact("tokens a step", _spread(plan["tokens_per_step"]))
    yield Fact(
        "micro-batches",
        f"{_spread(plan['micro_batches'])} a step on each of {memory['devices']} x "
        f"{memory['device']}, of up to {memory['micro_batch_tokens']:,} tokens",
    )
    if plan["prompts_shared"]:
        layout = (
            f"each prompt is computed once: {plan['prompt_tokens_saved']:,} tokens an epoch saved, "
            f"{plan['share_saved']:.0%}"
        )
    else:
        layout = f"a prompt is computed with each response: {visible(plan['not_shared_because'])}"
    yield Fact("layout", layout)
    yield Fact("memory", visible(memory["says"]), warns=not memory["fits"])
    yield from _time(found["time"], found["model"]["name"])


def _spread(values: Mapping[str, float]) -> str:
    low, mean, high = values["min"], values["mean"], values["max"]
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (mean {mean:,.1f})"


def _time(time: Mapping[str, Any], model: str) -> Iterator[Fact]:
    work = f"{time['tokens']:,} tokens, {_flops(time['training_flops'])}"
    if time["reference_tokens"]:
        work += (
            f"; reference {time['reference_tokens']:,} tokens, {_flops(time['reference_flops'])}, "
            "less what is cached"
        )
    yield Fact("work", work)
    measured = time["measured"]
    if measured is None:
        said = f"unknown: no finished run of {model} with as many trained weights in outputs/"
    else:
        said = (
            f"{_duration(time['seconds'])} for the steps at {measured['tokens_per_second']:,.0f} "
            f"tokens/s, as {measured['run']} measured; reference, evaluation, samples and saving "
            "come on top"
        )
    yield Fact("time", visible(said))


def _flops(count: int) -> str:
    for power, unit in ((18, "E"), (15, "P"), (12, "T"), (9, "G")):
        if count >= 10**power:
            return f"{count / 10**power:.3g} {unit}FLOPs"
    return f"{count / 10**6:.3g} MFLOPs"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"about {seconds:.0f} s"
    minutes = seconds / 60
    return f"about {minutes:.0f} min" if minutes < 120 else f"about {minutes / 60:.1f} h"


def _example(example: Mapping[str, Any]) -> Section:
    prompt, responses = example["prompt"], example["responses"]
    passages = [Passage(f"prompt, {prompt['length']:,} tokens, not scored", _prompt(prompt))]
    pair = [response["rank"] for response in responses] == [1, 2]
    for response in responses:
        name = f"rank {response['rank']}"
        if pair:
            name = "chosen" if response["rank"] == 1 else "rejected"
        elif example["label"] is not None:
            name = "desirable" if example["label"] else "undesirable"
        title = f"{name}, {response['length']:,} scored tokens"
        passages.append(Passage(title, _response(response)))
    where = visible(example["source"])
    return Section(
        "One group, token by token",
        (Fact("group", f"{example['number']:,}, {where}"),),
        passages=tuple(passages),
    )


def _prompt(prompt: Mapping[str, Any]) -> tuple[TokenText, ...]:
    cut = prompt["left_out"]
    first = [TokenText(f"(… {cut:,} tokens before) ", "note")] if cut else []
    return (*first, *_pieces(prompt["tokens"], ("prompt",)))


def _response(response: Mapping[str, Any]) -> tuple[TokenText, ...]:
    cut = response["left_out"]
    last = [TokenText(f" (… {cut:,} tokens more)", "note")] if cut else []
    # Two styles in turn show where a token ends.
    return (*_pieces(response["tokens"], ("even", "odd")), *last)


def _pieces(tokens: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Iterator[TokenText]:
    for number, token in enumerate(tokens):
        kind = "special" if token["special"] else kinds[number % len(kinds)]
        yield TokenText(visible(token["text"], lines=True), kind)
