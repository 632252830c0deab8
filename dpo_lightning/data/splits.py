"""Split of read rows into training and evaluation groups, with an account of every row."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_lightning.data.groups import conversation_of
from dpo_lightning.data.held_out import choose_evaluated
from dpo_lightning.data.labels import LabelCounts
from dpo_lightning.data.lengths import Lengths
from dpo_lightning.data.records import BadRow, Rows
from dpo_lightning.data.refused import Refuse, refused_rows, stop
from dpo_lightning.data.source_names import eval_key
from dpo_lightning.data.templates import TemplateOptions
from dpo_lightning.data.token_cache import tokenize_once
from dpo_lightning.data.tokens import DROP_REASONS, TokenGroup, TokenizedGroups
from dpo_lightning.errors import UserError
from dpo_lightning.processes.phases import ShowPhase, unshown


@dataclass(slots=True)
class PreparedData:
    """The groups of a run.

    ``len(train) + len(eval) + sum(dropped.values())`` is the number of rows of the files; a file
    that two held-out sets name counts twice, and what :meth:`overfit` leaves out does not count.

    Attributes:
        train: Groups to train on.
        eval: Groups that are held out, set after set.
        sets: Number of groups of each held-out set by its name; empty where the sets have no names.
            The first set is the one that ranks trials.
        evaluated: Numbers of those of them that are evaluated on; None: all.
        dropped: Rows that went, by reason.
        changed: Groups that stayed but were cut, by what happened.
        sources: ``dropped`` and ``changed`` of each source by itself, by its setting.
        notes: Lines to say once.
        set_aside: Rows that the chat template does not take whole.
        leads: Rows by the text that the chat template writes before their responses.
        unrated: Answers without a label beside those that have one; no rows of the above.
    """

    train: list[TokenGroup]
    eval: list[TokenGroup]
    sets: dict[str, int] = field(default_factory=dict)
    evaluated: list[int] | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    set_aside: list[BadRow] = field(default_factory=list)
    leads: Counter[str] = field(default_factory=Counter)
    sources: dict[str, tuple[Counter[str], Counter[str]]] = field(default_factory=dict)
    unrated: int = 0

    def overfit(self, count: int | None) -> None:
        """Leaves the first training groups alone, to be trained and evaluated on.

        Args:
            count: Groups that stay; None leaves all as it is.
        """
        if count is None:
            return
        self.train = self.train[:count]
        self.eval, self.sets = [*self.train], {}

    def choose_evaluated(self, most: int | None) -> None:
        """Takes a sample of each held-out set to evaluate on, where it has more.

        Args:
            most: Groups of a sample; None takes all.
        """
        chosen: list[int] = []
        start = 0
        for size in self._sizes():
            own = choose_evaluated(self.eval[start : start + size], most)
            chosen += range(start, start + size) if own is None else [start + n for n in own]
            start += size
        self.evaluated = None if len(chosen) == len(self.eval) else chosen

    def evaluated_sets(self) -> dict[str | None, list[TokenGroup]]:
        """The groups to evaluate on, by the name of their set; None where it has none."""
        numbers = range(len(self.eval)) if self.evaluated is None else self.evaluated
        found: dict[str | None, list[TokenGroup]] = {}
        start = 0
        names: list[str | None] = [*self.sets] if self.sets else [None]
        for name, size in zip(names, self._sizes(), strict=True):
            found[name] = [self.eval[n] for n in numbers if start <= n < start + size]
            start += size
        return found

    def evaluated_groups(self) -> list[TokenGroup]:
        """The groups of the first set to evaluate on, which rank trials."""
        return next(iter(self.evaluated_sets().values()))

    def all_evaluated_groups(self) -> list[TokenGroup]:
        """The groups of all sets to evaluate on."""
        return [group for groups in self.evaluated_sets().values() for group in groups]

    def ranking(self) -> list[TokenGroup]:
        """All groups of the first held-out set."""
        return self.eval[: self._sizes()[0]]

    def labels(self) -> dict[str, LabelCounts]:
        """Single responses by their label, of both sides; empty where all groups compare some."""
        sides = {"train": self.train, "eval": self.ranking()}
        found = {side: LabelCounts.of(g.label for g in groups) for side, groups in sides.items()}
        return found if any(counts.total for counts in found.values()) else {}

    def _sizes(self) -> list[int]:
        return [*self.sets.values()] or [len(self.eval)]

    def counts(self) -> dict[str, Any]:
        """The ``data`` entry of ``result.json``."""
        sets = {name: len(groups) for name, groups in self.evaluated_sets().items()}
        labels = self.labels()
        return {
            "train_groups": len(self.train),
            "eval_groups": len(self.ranking()),
            "evaluated_groups": len(self.evaluated_groups()),
            **({"eval_sets": sets} if self.sets else {}),
            "train_pairs": sum(group.pairs for group in self.train),
            **({"labels": {k: own.as_dict() for k, own in labels.items()}} if labels else {}),
            **({"unrated": self.unrated} if self.unrated else {}),
            "dropped": dict(self.dropped),
            "changed": dict(self.changed),
        }


def prepare_rows(
    train: Rows,
    evaluation: Rows | Mapping[str | None, Rows] | None,
    tokenizer: Any,
    *,
    max_length: int,
    truncation: str,
    eval_fraction: float,
    split_seed: int,
    max_dropped: float,
    cache: Path | None = None,
    options: TemplateOptions | None = None,
    on_bad_row: str = "stop",
    positions: int | None = None,
    key: str = "data.train",
    refuse: Refuse = stop,
    keep_tokens: bool = True,
    show: ShowPhase = unshown,
) -> PreparedData:
    """Tokenizes rows, splits off the evaluation groups, and accounts for what was dropped.

    Args:
        train: The rows of ``data.train``.
        evaluation: Those of ``data.eval``, or of its sets by name; None or none: a share of train.
        tokenizer: A transformers tokenizer.
        max_length: Longest prompt + response, in tokens.
        truncation: The part that gives way above it: ``drop``, ``prompt`` or ``response``.
        eval_fraction: Share of the groups to hold out when there is no ``evaluation``.
        split_seed: Seed of that choice.
        max_dropped: Largest share of the rows that may be dropped.
        cache: Folder of the token ids; None keeps none.
        options: Options of the chat template; None is a template without any.
        on_bad_row: ``skip`` sets aside rows that the chat template does not take whole.
        positions: Most tokens that the model takes; None where it has no limit.
        key: The setting that names the rows of ``train``, for errors.
        refuse: Takes each reason to stop; the rows at fault are left out where it does not raise.
        keep_tokens: False writes nothing into ``cache``.
        show: Shows how far the tokenizer is.

    Raises:
        UserError: If more was dropped, or nothing is left of ``data.train`` or ``data.eval``.
    """
    limits = Lengths(max_length, truncation, positions)
    prepared = PreparedData(train=[], eval=[], notes=[*train.notes], unrated=train.unrated)
    tokenize = _Tokenizing(
        prepared, tokenizer, limits, cache, options, on_bad_row, refuse, keep_tokens, show
    )
    parts = [(key, train, tokenize(key, train))]
    prepared.train = parts[0][2].groups
    _account(prepared, *parts[0])
    if not evaluation:
        _hold_out(prepared, fraction=eval_fraction, seed=split_seed)
    for name, rows in _by_name(evaluation).items():
        parts.append((eval_key(name), rows, tokenize(eval_key(name), rows)))
        _add_held_out(prepared, name, rows, parts[-1][2])
    try:
        _check_dropped(prepared, parts, max_dropped=max_dropped, limits=limits)
    except UserError as error:
        refuse(error)
    return prepared


def _by_name(evaluation: Rows | Mapping[str | None, Rows] | None) -> Mapping[str | None, Rows]:
    """Held-out rows by the name of their set, which is None where they have none."""
    if evaluation is None:
        return {}
    return {None: evaluation} if isinstance(evaluation, Rows) else evaluation


@dataclass(frozen=True, slots=True)
class _Tokenizing:
    """Turns the rows of a source into tokens.

    Attributes:
        prepared: Takes the rows that are set aside.
        tokenizer: A transformers tokenizer.
        limits: Lengths that groups may have.
        cache: Folder of the token ids; None keeps none.
        options: Options of the chat template; None is a template without any.
        on_bad_row: ``stop`` or ``skip``.
        refuse: Takes each reason to stop.
        keep: False writes nothing into the folder.
        show: Shows how far it is.
    """

    prepared: PreparedData
    tokenizer: Any
    limits: Lengths
    cache: Path | None
    options: TemplateOptions | None
    on_bad_row: str
    refuse: Refuse
    keep: bool
    show: ShowPhase

    def __call__(self, key: str, rows: Rows) -> TokenizedGroups:
        """The groups of a source, which ``key`` names."""
        made = tokenize_once(
            rows.groups,
            self.tokenizer,
            max_length=self.limits.max_length,
            truncation=self.limits.truncation,
            folder=self.cache,
            options=self.options,
            keep=self.keep,
            show=self.show,
        )
        try:
            self.prepared.set_aside += refused_rows(
                rows.groups, made.faults, total=rows.total, on_bad_row=self.on_bad_row, key=key
            )
        except UserError as error:
            self.refuse(error)
        return made


def _hold_out(prepared: PreparedData, *, fraction: float, seed: int) -> None:
    """Takes the evaluation groups from the training groups."""
    prepared.train, prepared.eval = split_by_prompt(prepared.train, fraction=fraction, seed=seed)
    if fraction and prepared.train and not prepared.eval:
        prepared.notes.append("all rows have one prompt, so none are held out to evaluate on")


def _add_held_out(
    prepared: PreparedData, name: str | None, rows: Rows, held_out: TokenizedGroups
) -> None:
    """Takes a set of evaluation groups from rows of their own."""
    key, shared = eval_key(name), shared_text([*prepared.train, *prepared.eval, *held_out.groups])
    own = {shared(group) for group in held_out.groups}
    first = {shared(group) for group in prepared.ranking()}
    if name is not None:
        prepared.sets[name] = len(held_out.groups)
    prepared.eval = [*prepared.eval, *held_out.groups]
    prepared.notes += rows.notes
    prepared.unrated += rows.unrated
    # The same may have been said of the training rows, with other numbers.
    held_out.notes = [f"{key}: {note}" for note in held_out.notes]
    _account(prepared, key, rows, held_out)
    common = {shared(group) for group in prepared.train} & own
    if common:
        prepared.notes.append(f"{len(common)} prompts of {key} are in data.train too")
    if first & own:
        ranks = eval_key(next(iter(prepared.sets)))
        prepared.notes.append(
            f"{len(first & own)} prompts of {key} are in {ranks} too, whose rows rank trials"
        )


def shared_text(groups: Iterable[TokenGroup]) -> Callable[[TokenGroup], str]:
    """The text that groups have in common which belong on one side of a split.

    That is the prompt; or the beginning of the conversation where responses have labels, as those
    of one conversation are then rated one by one.

    Args:
        groups: All groups that are told apart.
    """
    if any(group.label is not None for group in groups):
        return lambda group: conversation_of(group.prompt_key)
    return lambda group: group.prompt_key


def split_by_prompt(
    groups: Sequence[TokenGroup], *, fraction: float, seed: int
) -> tuple[list[TokenGroup], list[TokenGroup]]:
    """Holds out about ``fraction`` of the groups; all groups of one prompt stay together.

    Where responses have labels, all groups of one conversation do.

    Prompts are ordered by a hash of seed and text, so the choice depends neither on the order of
    the file nor on anything but the prompts themselves.

    Returns:
        The training groups and the held-out groups, each in the order given.
    """
    if not fraction:
        return list(groups), []
    shared = shared_text(groups)
    texts = [shared(group) for group in groups]
    sizes = Counter(texts)
    target = max(1, round(fraction * len(groups)))

    def position(key: str) -> bytes:
        text = f"{seed}:{key}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, digest_size=8).digest()

    keys = sorted(sizes, key=lambda key: (position(key), key))
    held_out: set[str] = set()
    taken = 0
    for key in keys:
        if taken >= target or len(held_out) == len(sizes) - 1:
            break
        # One prompt with very many groups must not swallow the training set.
        if taken + sizes[key] <= 2 * target:
            held_out.add(key)
            taken += sizes[key]
    if not held_out and len(sizes) > 1:
        # Every prompt has that many: a larger share is held out than none.
        held_out.add(min(keys, key=sizes.__getitem__))
    sides: tuple[list[TokenGroup], list[TokenGroup]] = ([], [])
    for group, text in zip(groups, texts, strict=True):
        sides[text in held_out].append(group)
    return sides


def data_hash(train: Sequence[TokenGroup], evaluation: Sequence[TokenGroup]) -> str:
    """A hash of all token ids, ranks, weights, margins, confidences and labels in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (train, evaluation):
        digest.update(f"{len(part)};".encode())
        for group in part:
            shape = (len(group.prompt), *map(len, group.responses), group.ranks, group.weight)
            # Nothing is added where there is none: such rows had their hash before these.
            more: tuple[object, ...] = (group.target_margin,) if group.target_margin else ()
            more += ("confidence", group.confidence) if group.confidence < 1 else ()
            more += () if group.label is None else ("label", group.label)
            digest.update(repr(shape + more).encode())
            for ids in (group.prompt, *group.responses):
                digest.update(ids.tobytes())
    return digest.hexdigest()


def group_id(group: TokenGroup) -> str:
    """Name of a group in files, ``<prompt>-<group>``: a hash of its token ids, ranks or label."""
    prompt = hashlib.blake2b(group.prompt.tobytes(), digest_size=5)
    whole = prompt.copy()
    for ids in group.responses:
        whole.update(f"{len(ids)};".encode() + ids.tobytes())
    own = group.ranks if group.label is None else group.label
    whole.update(repr(own).encode())
    return f"{prompt.hexdigest()}-{whole.hexdigest()}"


def digest_of(groups: Iterable[TokenGroup]) -> str:
    """A hash of a set of groups, in whatever order."""
    names = " ".join(sorted(map(group_id, groups)))
    return hashlib.blake2b(names.encode(), digest_size=8).hexdigest()


def _account(prepared: PreparedData, key: str, rows: Rows, tokenized: TokenizedGroups) -> None:
    prepared.sources[key] = _dropped(rows, tokenized), tokenized.changed
    prepared.dropped.update(_dropped(rows, tokenized))
    prepared.changed.update(tokenized.changed)
    prepared.notes += tokenized.notes
    prepared.leads.update(tokenized.leads)


def _dropped(rows: Rows, tokenized: TokenizedGroups) -> Counter[str]:
    """Counts of dropped rows by reason, those that could not be read included."""
    return tokenized.dropped + Counter({"bad_row": len(rows.bad)})


def _check_dropped(
    prepared: PreparedData,
    parts: Sequence[tuple[str, Rows, TokenizedGroups]],
    *,
    max_dropped: float,
    limits: Lengths,
) -> None:
    """Stops where too many rows were dropped, or all of one source."""
    rows, dropped = sum(rows.total for _, rows, _ in parts), prepared.dropped.total()
    # A quotient, as it is rounded like the literal: 0.29 * 100 is less than 29.
    if not rows or dropped / rows <= max_dropped:
        for key, own, left in parts:
            _check_left(key, own, left, limits)
        return
    made = [tokenized for *_, tokenized in parts]
    remedies = _length_remedies(made, limits, enough=dropped - max_dropped * rows)
    share = math.ceil(1000 * dropped / rows) / 1000
    remedies.append(f"allow as many with data.max_dropped={share:g}")
    raise UserError(
        f"data.max_dropped={max_dropped:g}: {dropped} of {rows} rows were dropped "
        f"({_reasons(prepared.dropped)}) with data.max_length={limits.max_length} and "
        f"data.truncation={limits.truncation}; {', or '.join(remedies)}"
    )


def _length_remedies(
    parts: Sequence[TokenizedGroups], limits: Lengths, *, enough: float
) -> list[str]:
    """Settings that keep so many of the rows that went for their length."""
    found = [
        f"keep long rows with data.truncation={other}"
        for other in ("response", "prompt")
        if other != limits.truncation and sum(p.kept_by[other] for p in parts) >= enough
    ]
    longest = max(part.longest for part in parts)
    whole = sum(part.kept_by["max_length"] for part in parts)
    if longest and whole >= enough and (limits.positions or longest) >= longest:
        found.append(f"take them whole with data.max_length={longest}")
    return found


def _check_left(key: str, rows: Rows, tokenized: TokenizedGroups, limits: Lengths) -> None:
    if tokenized.groups:
        return
    remedies = [f"name other rows with {key}=", *_length_remedies([tokenized], limits, enough=1)]
    raise UserError(
        f"{key}: no group is left out of {rows.total} rows "
        f"({_reasons(_dropped(rows, tokenized))}) with data.max_length={limits.max_length}; "
        f"{', or '.join(remedies)}"
    )


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(
        f"{count} {reason}: {DROP_REASONS[reason]}" for reason, count in dropped.items() if count
    )
