"""RunContent of a run's page, read from the files of its folder, in whatever state they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_lightning.files import METRICS_FILE, RESULT_FILE, json_object, read_json
from dpo_lightning.run.page.plots import Curve, panel
from dpo_lightning.run.page.text import MISSING, clean, cut, number_text, seconds_text
from dpo_lightning.run.page.values import as_mapping, as_rows, number
from dpo_lightning.settings.renamed import present_evaluation, present_result
from dpo_lightning.settings.schema import Config

MOST_PROMPTS = 12
"""Prompts whose answers are shown."""

# Titles of the panels, and the metrics of training and of evaluation; the first that is there.
_PANELS = (
    ("loss", ("train/loss",), ("eval/loss",)),
    ("accuracy", ("train/rewards/accuracies",), ("eval/rewards/accuracies",)),
    ("margin, in rewards", ("train/rewards/margins",), ("eval/rewards/margins",)),
    ("separation, in nats", ("train/logratios/separation",), ("eval/logratios/separation",)),
    ("told about labels, in nats", (), ("eval/label_gain",)),
    (
        "KL to the reference, nats an answer",
        (),
        ("controlled/kl_policy_reference", "samples/kl"),
    ),
    ("learning rate", ("train/learning_rate",), ()),
    ("gradient norm", ("train/grad_norm",), ()),
)
_LONGEST_ANSWER = 1600
_LONGEST_VALUE = 200
# Settings that say where and how often, not what was done.
_UNTOLD = ("hydra", "name", "resume", "overwrite")
_CONFIG_FILE = "config.yaml"
# The C loader is ten times as fast, and a package without it still reads.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class RunContent:
    """Parts of a run's page, as texts and SVG.

    Attributes:
        title: Name of the run's folder.
        status: How it ended.
        error: Its error, None where it has none.
        facts: A few words each.
        signs: Signs of a training that went wrong.
        panels: Curves, as SVG.
        metrics: Names and last values.
        answers: A prompt, and who answered what.
        dropped: Reasons and counts of rows that were dropped.
        settings: Keys, values and defaults, where they differ.
        command: What was typed.
        checkpoints: Their names.
        exported: What the export is of; empty where there is none.
        times: Names and wall times or speeds.
        versions: Packages and versions.
    """

    title: str
    status: str
    error: str | None
    facts: Sequence[str]
    signs: Sequence[str]
    panels: Sequence[str]
    metrics: Sequence[tuple[str, str]]
    answers: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    dropped: Sequence[tuple[str, str]]
    settings: Sequence[tuple[str, str, str]]
    command: str
    checkpoints: Sequence[str]
    exported: str
    times: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]

    @property
    def is_fault(self) -> bool:
        """True if the run ended by an error; a trial that its sweep pruned did not."""
        return self.error is not None and self.status != "pruned"


def make_content(folder: Path) -> RunContent:
    """The content of a run's page.

    Args:
        folder: The run's folder.
    """
    result = present_result(read_json(folder / RESULT_FILE))
    evaluation = present_evaluation(read_json(folder / "evaluation.json"))
    data = as_mapping(result.get("data"))
    error = result.get("error")
    said = [row.get("says") for row in as_rows(result.get("signs"))]
    metrics = sorted(as_mapping(result.get("metrics")).items())
    settings = _settings(folder / _CONFIG_FILE)
    return RunContent(
        title=clean(folder.resolve().name),
        status=_words(result.get("status")),
        error=clean(error) if isinstance(error, str) else None,
        facts=[*_facts(result, data), *_course(result, settings)],
        signs=[clean(text) for text in said if isinstance(text, str)],
        panels=_panels(_rows(folder / METRICS_FILE)),
        metrics=[(clean(name), number_text(number(value), 4)) for name, value in metrics],
        answers=[*_greedy(evaluation), *_drawn(evaluation)],
        dropped=[
            (clean(reason).replace("_", " "), f"{count:,.0f}")
            for reason, value in as_mapping(data.get("dropped")).items()
            if (count := number(value))
        ],
        settings=_changed(settings),
        command=_words(result.get("command")),
        checkpoints=sorted(clean(path.name) for path in folder.glob("checkpoints/step-*.ckpt")),
        exported=_exported(folder, result),
        times=_times(as_mapping(result.get("throughput"))),
        versions=[
            (clean(name), _words(version))
            for name, version in as_mapping(result.get("versions")).items()
        ],
    )


def _words(value: object) -> str:
    return clean(value) if isinstance(value, str) else MISSING


def _facts(result: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    model = as_mapping(result.get("model")).get("name")
    facts = [clean(model)] if isinstance(model, str) else []
    loss = result.get("loss")
    facts += [f"loss {clean(loss)}"] if isinstance(loss, str) else []
    for label, value in (("β", result.get("beta")), ("seed", result.get("seed"))):
        found = number(value)
        facts += [] if found is None else [f"{label} {found:g}"]
    counted = (
        ("steps", result.get("step")),
        ("training groups", data.get("train_groups")),
        ("held-out groups", data.get("eval_groups")),
    )
    for label, value in counted:
        found = number(value)
        facts += [] if found is None else [f"{found:,.0f} {label}"]
    return facts


def _course(result: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Devices, where a step was shared, and the checkpoint that the run went on from."""
    facts = []
    trainer = as_mapping(settings.get("trainer"))
    devices, nodes = number(trainer.get("devices")), number(trainer.get("num_nodes"))
    if devices is not None and (count := devices * (nodes or 1)) > 1:
        facts.append(f"{count:,.0f} devices")
    resumed = as_mapping(result.get("resumed"))
    if (step := number(resumed.get("step"))) is not None:
        changed = [clean(key) for key in as_mapping(resumed.get("changed"))]
        behind = f", with another {', '.join(changed)}" if changed else ""
        facts.append(f"resumed at step {step:,.0f}{behind}")
    return facts


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics; a torn line is what a killed run leaves."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [row for line in lines if (row := json_object(line)) is not None]


def _panels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    drawn = []
    taken = [step for row in rows if (step := number(row.get("step"))) is not None]
    # All panels have the same steps below each other, also where there is one evaluation.
    steps = (min(taken), max(taken)) if taken else None
    for title, training, evaluation in _PANELS:
        curves = []
        for kind, names in (("training", training), ("evaluation", evaluation)):
            found = [points for name in names if (points := _series(rows, name))]
            curves += [Curve(kind, found[0])] if found else []
        svg = panel(title, curves, steps=steps)
        drawn += [] if svg is None else [svg]
    return drawn


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Steps and values of a metric; the later value of a step that was taken twice."""
    points: dict[float, float] = {}
    for row in rows:
        step, value = number(row.get("step")), number(row.get(name))
        if step is not None and value is not None:
            points[step] = value
    return sorted(points.items())


def _greedy(evaluation: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Greedy answers before and after the training."""
    heads = (
        ("after", "policy, after"),
        ("before", "policy, before"),
        ("reference", "reference"),
        ("preferred", "preferred in the data"),
    )
    return [
        _prompt(row, [(label, row.get(key)) for key, label in heads])
        for row in as_rows(evaluation.get("answers"))[:MOST_PROMPTS]
    ]


def _drawn(evaluation: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Answers that were drawn, with the judge's marks."""
    shown = []
    for row in as_rows(evaluation.get("samples"))[:MOST_PROMPTS]:
        texts = []
        for key, marks, who in (
            ("policy", "judge", "policy, drawn"),
            ("reference", "reference_judge", "reference, drawn"),
        ):
            label, mark = who, number(row.get(marks))
            texts.append(
                (
                    label if mark is None else f"{label}, judge's mark {number_text(mark)}",
                    row.get(key),
                )
            )
        texts.append(("preferred in the data", row.get("preferred")))
        shown.append(_prompt(row, texts))
    return shown


def _prompt(
    row: Mapping[str, Any], texts: Sequence[tuple[str, object]]
) -> tuple[str, list[tuple[str, str]]]:
    kept = [(label, cut(text, _LONGEST_ANSWER)) for label, text in texts if isinstance(text, str)]
    return cut(row.get("prompt"), keep_end=True), kept


def _settings(path: Path) -> Mapping[str, Any]:
    """The run's settings; empty where the file cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        return as_mapping(yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER))
    return {}


def _changed(settings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Settings that differ from the defaults."""
    defaults = dict(_flat(asdict(Config())))
    return [
        (clean(key), _value(value), _value(defaults[key]) if key in defaults else MISSING)
        for key, value in _flat(settings)
        if key.partition(".")[0] not in _UNTOLD and value != defaults.get(key)
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _value(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return cut(str(value), _LONGEST_VALUE)


def _exported(folder: Path, result: Mapping[str, Any]) -> str:
    step = number(result.get("exported_step"))
    if not (folder / "model").is_dir() or step is None:
        return ""
    return f"model/ has the weights of step {step:,.0f}."


def _times(throughput: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for key, label in (("total_seconds", "whole run"), ("seconds", "training loop")):
        if (value := number(throughput.get(key))) is not None:
            found.append((label, seconds_text(value)))
    for key, label in (
        ("pairs_per_second", "pairs a second"),
        ("examples_per_second", "examples a second"),
        ("tokens_per_second", "tokens a second"),
    ):
        # Of single responses alone there are no pairs.
        if (value := number(throughput.get(key))) or (value == 0 and key != "pairs_per_second"):
            found.append((label, number_text(value)))
    return found
