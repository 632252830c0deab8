"""The command ``compare``: its words, and the differences that it prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.files import finite, write_whole
from dpo_lightning.run.framed import (
    answer_alone,
    check_output,
    print_answer,
    said_help,
    writing,
)
from dpo_lightning.run.guard import guarded
from dpo_lightning.run.opened import Opened, open_all
from dpo_lightning.run.words import (
    ANYWHERE,
    OF_A_MODEL,
    OF_ROWS,
    Grammar,
    Words,
    read_words,
)
from dpo_lightning.settings.program import typed
from dpo_lightning.sweeps.compare.differences import differences
from dpo_lightning.sweeps.compare.fit import check_comparable, metrics_to_compare
from dpo_lightning.sweeps.compare.subjects import Subject, evaluated, labels_of, recorded
from dpo_lightning.sweeps.report.statistics import PERMUTATIONS, RESAMPLES, SEED

_HELP = """\
usage: {program} RUN RUN… [--evaluate] [--json] [--html FILE] [settings]
       {program} MODEL MODEL… --reference MODEL data.eval=ROWS [settings]

Tests trained policies against each other on the same held-out rows, row by row. Of runs that
finished it takes the values that they left; --evaluate, or any setting, computes them again, with
more metrics. Models alone are always evaluated.

  --evaluate    compute all values, on one device
  --reference   what models are compared with; runs have their own
  --json        print one object, {{"differences": [...]}}, and all else on stderr
  --html FILE   write a page with the differences and answers side by side

A difference is b less a. Settings are those of `{evaluate}`."""

_GRAMMAR = Grammar(
    "compare",
    flags=("--html", "--reference"),
    switches=("--evaluate", "--json"),
    settings=(*OF_ROWS, *ANYWHERE, *OF_A_MODEL),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the differences of policies on the same rows.

    Args:
        argv: The policies, flags and settings; None takes the process's own.

    Returns:
        0, or 2 where the words are wrong or the policies cannot be compared.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    if said_help(argv, _HELP, "compare", evaluate="evaluate"):
        return 0
    words = read_words(argv, _GRAMMAR)
    if len(words.names) < 2:
        program = " ".join(typed("compare"))
        said = ", ".join(words.names) or "no folder"
        raise UserError(f"{said}: name two policies or more, `{program} RUN RUN`")
    page = words.one("--html")
    with answer_alone():
        opened = open_all(words.names, reference=words.one("--reference"))
        for own in opened if page is not None else ():
            check_output(Path(str(page)), own, flag="--html")
        subjects = _subjects(opened, words)
        found = compare(subjects)
        if page is not None:
            _write_page(Path(page), found, subjects)
    print_answer(found, as_json="--json" in words.switches, show=_show)
    return 0


def _subjects(opened: Sequence[Opened], words: Words) -> list[Subject]:
    """The policies with their values: those that were left where all have them, else computed."""
    labels = labels_of(words.names)
    if not words.settings and "--evaluate" not in words.switches:
        left = [recorded(own, label) for own, label in zip(opened, labels, strict=True)]
        known = [own for own in left if own is not None]
        if len(known) == len(opened):
            check_comparable(known)
            return known
    found = [
        evaluated(own, label, words.settings) for own, label in zip(opened, labels, strict=True)
    ]
    check_comparable(found)
    return found


def compare(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Differences of policies that may be compared, as entries of JSON.

    Args:
        subjects: Two or more.

    Raises:
        UserError: If there is no metric that could be compared.
    """
    metrics, notes = metrics_to_compare(subjects)
    found, more = differences(subjects, metrics)
    if not found:
        said = " ".join([*notes, *more]) or "No metric has values by row in both."
        names = " and ".join(own.name for own in subjects)
        raise UserError(f"{names}: there is nothing to compare. {said}")
    notes = [_method(len(subjects)), *notes, *more]
    return {
        "differences": [asdict(own) for own in found],
        "runs": [
            {
                "label": own.label,
                "name": own.name,
                "beta": own.beta,
                "loss": own.settings.get("loss.name"),
                "rows": own.rows.total(),
            }
            for own in subjects
        ],
        "notes": notes,
    }


def _method(count: int) -> str:
    text = (
        f"A difference is b less a, paired by row, of prompts as a whole. p: sign flips, all of "
        f"them or {PERMUTATIONS:,} (seed {SEED}); interval: 95%, {RESAMPLES:,} bootstrap draws "
        f"over prompts (seed {SEED})."
    )
    if count > 2:
        text += f" p is Holm's, over the {count * (count - 1) // 2} pairs of a metric."
    return text


def _write_page(path: Path, found: Mapping[str, Any], subjects: Sequence[Subject]) -> None:
    from dpo_lightning.sweeps.compare.page import comparison_page

    text = comparison_page(finite(found), subjects)
    with writing(path):
        write_whole(path, text.encode("utf-8", "replace"))


def _show(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="differences", title_justify="left")
    left = ("metric", "a", "b")
    for name in ("metric", "a", "b", "a's", "b's", "b − a", "95% interval", "p"):
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for own in found["differences"]:
        low, high = own["interval"]
        values = [f"{own[name]:.4g}" for name in ("value_a", "value_b", "difference")]
        cells = [own["metric"], own["a"], own["b"], *values, f"{low:.3g} to {high:.3g}"]
        table.add_row(*cells, f"{own['p']:.3g}")
    Console(markup=False).print(table)
    for note in found["notes"]:
        print(note)
