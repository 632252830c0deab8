"""Page of what a run writes, ``docs/outcomes.md``: metrics, ``result.json`` and exit codes.

``python -m dpo_lightning.run.outcome_page`` prints it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields

from dpo_lightning import errors
from dpo_lightning.run.record import RunRecord
from dpo_lightning.settings.metric_meanings import OF_RESPONSES, OF_STEPS, WHOLE_NAMES, Meaning
from dpo_lightning.settings.metric_names import direction

_INTRODUCTION = """\
# What a run writes

Made from the code by `make docs`.

- [Metrics](#metrics)
- [result.json](#resultjson)
- [Exit codes](#exit-codes)
"""

_METRICS = """\
## Metrics

Names in `metrics.jsonl`, in the loggers and in `result.json`. `step` counts optimizer steps
completed; `eval/*` are exact over ranks. What is drawn has `<name>_stderr` too, its standard
error. Better says which way `checkpoint.monitor=` and reports take a metric.
"""

_CODES = """\
## Exit codes

A user error is one line on stderr: the key or `file:line`, the value and the remedy. A traceback
comes with code 1, or with `debug=on`.
"""

_WAYS = {1: "more", -1: "less", 0: "–"}
_OF_SIGNALS = (
    (130, "Stopped by Ctrl-C, after saving a checkpoint."),
    (143, "The same by SIGTERM."),
)


def outcome_page() -> str:
    """The page as Markdown."""
    return "\n".join([_INTRODUCTION, _METRICS, *_tables(), _result(), "", _CODES, *_codes(), ""])


def _tables() -> Iterator[str]:
    every = "Under `train/`, `eval/` and, of a named held-out set, `eval/<set>/`:"
    yield from _table(every, "eval/", OF_RESPONSES)
    yield from _table("Under `train/` alone:", "train/", OF_STEPS)
    yield from _table("By their whole names:", "", WHOLE_NAMES)


def _table(title: str, prefix: str, meanings: Mapping[str, Meaning]) -> Iterator[str]:
    yield f"{title}\n"
    yield from _rows(
        ("metric", "meaning", "unit", "better", "normal"),
        (
            (
                f"`{name}`",
                own.says,
                own.unit or "–",
                _WAYS[direction(f"{prefix}{name}") or 0],
                own.normal or "–",
            )
            for name, own in meanings.items()
        ),
    )
    yield ""


def _rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _result() -> str:
    """The entries of ``result.json``, from the record's own docstring."""
    text = inspect.getdoc(RunRecord) or ""
    told = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text, flags=re.M))
    rows = [(f"`{own.name}`", " ".join(told[own.name].split())) for own in fields(RunRecord)]
    head = "## result.json\n\nWritten whole or not at all, whatever the outcome.\n"
    return "\n".join([head, *_rows(("entry", "content"), rows)]).replace("``", "`")


def _codes() -> Iterator[str]:
    kinds = [getattr(errors, name) for name in errors.__all__]
    told: dict[int, list[str]] = {
        0: ["Finished."],
        1: ["Anything unexpected; a traceback says what."],
    }
    for kind in kinds:
        if kind is not errors.DpoLightningError:
            told.setdefault(kind.exit_code, []).append((inspect.getdoc(kind) or "").split("\n")[0])
    rows = [(str(code), " ".join(told[code])) for code in sorted(told)]
    rows += [(str(code), says) for code, says in _OF_SIGNALS]
    yield from _rows(("code", "meaning"), rows)


if __name__ == "__main__":
    print(outcome_page(), end="")
