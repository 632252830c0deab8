"""The report of a sweep: ``dpo-lightning report FOLDER`` writes it at any time.

``report.html`` has everything in itself, ``report.md`` is for a terminal or a pull request,
``frontier.png`` is the picture, ``sweep.json`` and ``trials.csv`` the numbers. Imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment

from dpo_lightning.errors import UserError
from dpo_lightning.files import PRUNING, RESULT_FILE, SWEEP_FILE, read_json, write_json, write_whole
from dpo_lightning.run.page.colours import variables
from dpo_lightning.run.page.environment import page_environment, sort_script
from dpo_lightning.run.page.text import clean
from dpo_lightning.run.page.write import write_run_page
from dpo_lightning.settings.program import typed
from dpo_lightning.sweeps.report.analysis import Analysis, analyse
from dpo_lightning.sweeps.report.answers import spread
from dpo_lightning.sweeps.report.content import make_content, report_command
from dpo_lightning.sweeps.report.curves import CAPTION, LEARNING, LOGRATIOS, curves
from dpo_lightning.sweeps.report.figures import frontier, frontier_svg
from dpo_lightning.sweeps.report.marks import MARKS, kept_marks, read_marks
from dpo_lightning.sweeps.report.pick import PickRule
from dpo_lightning.sweeps.report.pooling import METRICS, Configuration
from dpo_lightning.sweeps.report.read import read_sweep
from dpo_lightning.sweeps.report.sweep_file import summary
from dpo_lightning.sweeps.report.text import code_block, escape_markdown
from dpo_lightning.sweeps.report.theme import colours_of
from dpo_lightning.sweeps.report.trial_table import TRIALS_FILE, trials_csv
from dpo_lightning.tracking.terminal import outlive_terminal

PICTURE = "frontier.png"
_TEMPLATES = "sweeps/report/templates"
ASKED = "asked"
"""The entry of ``sweep.json`` with what the report was asked for: metric, margin, KL budget."""
NONE = "none"
"""A flag's value that stands for the report's own rule."""

# More curves in a panel than this hide each other.
_MOST_CURVES = 8


def write_report(
    folder: Path,
    *,
    metric: str | None = None,
    margin: float | None = None,
    kl_budget: float | None = None,
    marks: Path | None = None,
) -> dict[str, Any]:
    """Reads a sweep, in whatever state it is, and writes its report into its folder.

    Args:
        folder: The sweep's folder.
        metric: Metric to rank by; None takes the first of ``METRICS`` that the trials have.
        margin: Loss against the best that does not matter; None takes one by the metric.
        kl_budget: Largest KL of the pick, in nats per answer; None sets no limit.
        marks: A leaderboard's CSV file; None keeps the marks that ``sweep.json`` has.

    Returns:
        The content of ``sweep.json``; ``pick`` is None where nothing could be picked.

    Raises:
        UserError: If there is no sweep in the folder, or no trial has the metric, or a mark.
    """
    sweep = read_sweep(folder)
    before = read_json(folder / SWEEP_FILE)
    given = kept_marks(before.get(MARKS), sweep) if marks is None else read_marks(marks, sweep)
    analysis = analyse(sweep, metric, PickRule(margin, kl_budget))
    content = make_content(sweep, analysis)
    if given is not None:
        content = replace(content, tables=(*content.tables, given.table(sweep)))
    asked = {"metric": metric, "margin": margin, "kl_budget": kl_budget}
    again = report_command(str(folder), asked)
    environment = page_environment(_TEMPLATES)
    page = environment.get_template("report.html").render(
        c=content,
        figures=_figures(analysis),
        csv=TRIALS_FILE,
        again=again,
        script=sort_script(environment),
    )
    markdown = _markdown_environment().get_template("report.md")
    written = summary(sweep, analysis) | {ASKED: asked}
    write_whole(folder / PICTURE, frontier(analysis))
    _write_text(folder / TRIALS_FILE, trials_csv(sweep))
    _write_text(folder / "report.html", page)
    _write_text(
        folder / "report.md",
        markdown.render(c=content, picture=PICTURE, csv=TRIALS_FILE, again=again),
    )
    # What a pruned sweep decided is its own.
    written |= {key: value for key, value in before.items() if key == PRUNING}
    written |= {} if given is None else {MARKS: given.entry()}
    write_json(folder / SWEEP_FILE, written)
    return written


@dataclass(frozen=True, slots=True)
class _Figures:
    """The figures of the page and their colours.

    Attributes:
        wide: The frontier.
        narrow: The frontier for a phone.
        learning: Panels of loss and accuracy.
        logratios: Panels of log-ratios.
        legend: Labels of the curves and their variables.
        caption: Words about the curves.
        light: The page's variables of the light scheme.
        dark: Those of the dark one.
    """

    wide: str
    narrow: str
    learning: Sequence[str]
    logratios: Sequence[str]
    legend: Sequence[tuple[str, str]]
    caption: str
    light: str
    dark: str


def _figures(analysis: Analysis) -> _Figures:
    ordered = _by_beta(analysis)
    shown = spread(ordered, analysis.pick, most=_MOST_CURVES)
    # Those that are drawn come first, so that they are told apart however many others there are.
    colours = colours_of([*shown, *(c for c in ordered if c not in shown)])
    caption = CAPTION
    if len(shown) < len(ordered):
        caption = f"{len(shown)} of {len(ordered)} configurations are drawn. {caption}"
    return _Figures(
        wide=frontier_svg(analysis, colours, narrow=False),
        narrow=frontier_svg(analysis, colours, narrow=True),
        learning=curves(shown, LEARNING, colours=colours, share=False),
        logratios=curves(shown, LOGRATIOS, colours=colours, share=True),
        legend=[(c.label, colours[c.label].name) for c in shown],
        caption=caption,
        light=variables(colours, dark=False),
        dark=variables(colours, dark=True),
    )


def _by_beta(analysis: Analysis) -> list[Configuration]:
    """Sorts configurations into the order of a legend."""
    return sorted(analysis.configurations, key=lambda c: (c.beta is None, c.beta or 0.0, c.label))


def _markdown_environment() -> Environment:
    """Templates of Markdown, which has no escaping of its own: what is placed goes through ours."""
    environment = page_environment(_TEMPLATES, escape=False, finalize=escape_markdown)
    environment.globals["code_block"] = code_block
    return environment


def _write_text(path: Path, text: str) -> None:
    write_whole(path, text.encode("utf-8", "replace"))


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report of the folder that is named.

    Args:
        argv: The arguments, without the program's name; None takes the process's own.

    Returns:
        0, or 2 if the folder or the metric is wrong.
    """
    parser = argparse.ArgumentParser(
        prog=" ".join(typed("report")),
        description=f"Writes report.html, report.md, {PICTURE}, {TRIALS_FILE} and sweep.json of a "
        "sweep; of a run its report.html.",
    )
    parser.add_argument(
        "folder", type=Path, help="a sweep's folder, such as outputs/sweeps/…, or a run's"
    )
    rule = parser.add_argument_group(
        "rule of the pick",
        "A flag that is left out stays as the sweep, or the last report, had it; none resets it.",
    )
    rule.add_argument("--metric", help=f"what to rank by: {', '.join(METRICS)}")
    rule.add_argument(
        "--margin", type=_not_negative, help="loss against the best that does not matter"
    )
    rule.add_argument(
        "--kl-budget", type=_not_negative, help="largest KL of the pick, in nats per answer"
    )
    parser.add_argument(
        "--marks", type=Path, help="a leaderboard's CSV file, whose rows are named as trials are"
    )
    arguments = parser.parse_args(argv)
    outlive_terminal()
    try:
        if _is_run(arguments.folder):
            _refuse_rule(arguments)
            print(f"report    {write_run_page(arguments.folder)}")
            return 0
        report = write_report(
            arguments.folder,
            **_rule_of(arguments),
            marks=arguments.marks,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return UserError.exit_code
    print(f"report    {arguments.folder / 'report.html'}")
    if report["configurations"]:
        print(f"pick      {report['reason']}")
    if arguments.marks is not None:
        found = report[MARKS]
        print(f"marks     {len(found['trials'])} trials, {', '.join(found['columns'])}")
        for key, said in (("unmatched", "rows of no trial"), ("without", "trials without a row")):
            if found[key]:
                print(f"marks     {said}: {', '.join(map(clean, found[key]))}")
    return 0


def _is_run(folder: Path) -> bool:
    """True for the folder of one run, which has its result and settings itself."""
    return (folder / RESULT_FILE).is_file() and not (folder / SWEEP_FILE).is_file()


def _refuse_rule(arguments: argparse.Namespace) -> None:
    """Refuses flags that only a sweep's report reads."""
    for name in ("metric", "margin", "kl_budget", "marks"):
        if (value := getattr(arguments, name)) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag} {value}: ranks the trials of a sweep, and {arguments.folder} is one run; "
                f"leave {flag} out, or name the sweep's folder"
            )


def _rule_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rule of the pick that was typed, and what was not typed as the last report had it."""
    before = read_json(arguments.folder / SWEEP_FILE).get(ASKED)
    kept = before if isinstance(before, dict) else {}
    typed_flags = {name: getattr(arguments, name) for name in ("metric", "margin", "kl_budget")}
    return {
        name: kept.get(name) if value is None else None if value == NONE else value
        for name, value in typed_flags.items()
    }


def _not_negative(text: str) -> float | str:
    if text == NONE:
        return text
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: must be a finite number >= 0, or {NONE}")
