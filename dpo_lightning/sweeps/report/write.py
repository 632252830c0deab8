"""The report of a sweep: ``dpo-lightning report FOLDER`` writes it at any time.

``report.html`` has everything in itself, ``report.md`` is for a terminal or a pull request,
``frontier.png`` is the picture and ``sweep.json`` the numbers. Imports no torch.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpo_lightning.errors import UserError
from dpo_lightning.files import PRUNING, SWEEP_FILE, read_json, write_json, write_whole
from dpo_lightning.settings.program import typed
from dpo_lightning.sweeps.report.analysis import Analysis, analyse
from dpo_lightning.sweeps.report.content import make_content, report_command, summary
from dpo_lightning.sweeps.report.figures import frontier, learning_curves, logratios
from dpo_lightning.sweeps.report.pick import PickRule
from dpo_lightning.sweeps.report.pooling import METRICS, Configuration
from dpo_lightning.sweeps.report.read import read_sweep
from dpo_lightning.sweeps.report.text import code_block, escape_markdown
from dpo_lightning.tracking.terminal import outlive_terminal

PICTURE = "frontier.png"


def write_report(
    folder: Path,
    *,
    metric: str | None = None,
    margin: float | None = None,
    kl_budget: float | None = None,
) -> dict[str, Any]:
    """Reads a sweep, in whatever state it is, and writes its report into its folder.

    Args:
        folder: The sweep's folder.
        metric: Metric to rank by; None takes the first of ``METRICS`` that the trials have.
        margin: Loss against the best that does not matter; None takes one by the metric.
        kl_budget: Largest KL of the pick, in nats per answer; None sets no limit.

    Returns:
        The content of ``sweep.json``; ``pick`` is None where nothing could be picked.

    Raises:
        UserError: If there is no sweep in the folder, or no trial has the metric.
    """
    sweep = read_sweep(folder)
    analysis = analyse(sweep, metric, PickRule(margin, kl_budget))
    content = make_content(sweep, analysis)
    picture = frontier(analysis)
    curves = {
        "frontier": (picture, "image/png"),
        "learning_curves": (learning_curves(_by_beta(analysis)), "image/svg+xml"),
        "logratios": (logratios(_by_beta(analysis)), "image/svg+xml"),
    }
    figures = {
        name: None if data is None else f"data:{kind};base64,{base64.b64encode(data).decode()}"
        for name, (data, kind) in curves.items()
    }
    asked = {"--metric": metric, "--margin": margin, "--kl-budget": kl_budget}
    again = report_command(str(folder), asked)
    html = _environment(escape=True).get_template("report.html")
    markdown = _environment(escape=False).get_template("report.md")
    written = summary(sweep, analysis)
    write_whole(folder / PICTURE, picture)
    _write_text(folder / "report.html", html.render(c=content, figures=figures, again=again))
    _write_text(folder / "report.md", markdown.render(c=content, picture=PICTURE, again=again))
    # What a pruned sweep decided is its own.
    kept = {key: value for key, value in read_json(folder / SWEEP_FILE).items() if key == PRUNING}
    written |= kept
    write_json(folder / SWEEP_FILE, written)
    return written


def _by_beta(analysis: Analysis) -> list[Configuration]:
    """Sorts configurations into the order of a legend."""
    return sorted(analysis.configurations, key=lambda c: (c.beta is None, c.beta or 0.0, c.label))


def _environment(*, escape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("dpo_lightning.sweeps.report"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Markdown has no escaping of its own: whatever is placed goes through this.
        finalize=None if escape else escape_markdown,
    )
    environment.globals["code_block"] = code_block
    environment.filters["address"] = _address
    return environment


def _address(path: str) -> str:
    """A relative path as a link; one that is not text, by its bytes as far as it has any."""
    try:
        return quote(os.fsencode(path))
    except UnicodeEncodeError:
        return quote(path, errors="replace")


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
        description="Writes report.html, report.md, frontier.png and sweep.json of a sweep.",
    )
    parser.add_argument("folder", type=Path, help="the sweep's folder, such as outputs/sweeps/…")
    parser.add_argument("--metric", help=f"what to rank by: {', '.join(METRICS)}")
    parser.add_argument(
        "--margin", type=_not_negative, help="loss against the best that does not matter"
    )
    parser.add_argument(
        "--kl-budget", type=_not_negative, help="largest KL of the pick, in nats per answer"
    )
    arguments = parser.parse_args(argv)
    outlive_terminal()
    try:
        report = write_report(
            arguments.folder,
            metric=arguments.metric,
            margin=arguments.margin,
            kl_budget=arguments.kl_budget,
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
    return 0


def _not_negative(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: must be a finite number >= 0")
