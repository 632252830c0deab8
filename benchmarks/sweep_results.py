"""Results of whole sweeps: ratios with intervals, the JSON, and the table of the page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from against import Ratio
from workload import SHAPES

# Load from which on other work is told of.
QUIET = 0.5
MARKS = ("<!-- bench-sweep -->", "<!-- end of bench-sweep -->")


def seconds_of(runs: Sequence[dict[str, Any]], arm: str, name: str = "wall_seconds") -> list[float]:
    """Values of an arm, in the order of the rounds."""
    return [run[name] for run in sorted(runs, key=lambda run: run["round"]) if run["arm"] == arm]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> list[float | None]:
    """Ratio and its 95% interval; an interval needs two rounds."""
    if len(ours) < 2:
        return [ours[0] / theirs[0], None, None]
    found = Ratio.of(ours, theirs)
    return [found.value, found.low, found.high]


def ratios(report: dict[str, Any]) -> dict[str, list[float | None]]:
    """The ratios that a report has the runs for, by what is divided by what."""
    found: dict[str, list[float | None]] = {}
    if (tiny := report.get("tiny")) is not None:
        here = seconds_of(tiny["runs"], "here")
        if there := seconds_of(tiny["runs"], "there"):
            found["eight tiny trials over the older commit"] = ratio(here, there)
            found["their CPU seconds over the older commit"] = ratio(
                *(seconds_of(tiny["runs"], arm, "cpu_seconds") for arm in ("here", "there"))
            )
    if (part := report.get("large")) is not None:
        trl = [len(part["betas"]) * run["run_seconds"] for run in part["trl"]]
        grid = seconds_of(part["runs"], "grid here")
        found["whole grid over TRL tuned, one β after the other"] = ratio(grid, trl)
        if there := seconds_of(part["runs"], "grid there"):
            found["whole grid over the older commit's"] = ratio(grid, there)
        for arm in ("pruned", "one rung"):
            if own := seconds_of(part["runs"], arm):
                whole = there or grid
                name = "the older commit's whole grid" if there else "our whole grid"
                found[f"{arm} over {name}"] = ratio(own, whole)
                found[f"{arm} over TRL tuned, one β after the other"] = ratio(own, trl)
    return found


def table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    if not report:
        return "Not measured yet.\n"
    lines = []
    for part in ("tiny", "large"):
        if part in report:
            lines += [*_part(report[part]), ""]
    lines += ["| ratio | value | 95% |", "|---|---|---|"]
    for name, (value, low, high) in ratios(report).items():
        interval = "–" if low is None else f"{low:.3f}–{high:.3f}"
        lines.append(f"| {name} | {value:.3f} | {interval} |")
    return "\n".join(lines) + "\n"


def _part(found: dict[str, Any]) -> list[str]:
    """Lines of one part: its machine and a row for each arm, medians over the rounds."""
    what = "the bundled model, 20 steps each"
    if "trl" in found:
        size = found["model"]
        what = f"{size['layers']} layers of {size['hidden']}, {found['rows']:,} rows"
        lengths = SHAPES[found["shape"]]
        what += f" of median {lengths.prompt} + {lengths.response} tokens, {found['steps']} steps"
        what += f" of {found['pairs']} pairs each, {found['precision']}"
    machine = found["machine"]
    where = f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores"
    if found["load"] > QUIET:
        where += f", beside other work, load {found['load']:.0f}"
    if "again" in found:
        again = found["again"]
        where += f"; {' and '.join(again['arms'])} {again['machine']['date']}"
    if found["against"]:
        where += f", there is {found['against'][:12]}"
    lines = [f"{len(found['betas'])} β, {what} ({where}):", ""]
    lines += ["| arm | rounds | seconds | CPU seconds |", "|---|---|---|---|"]
    for arm in dict.fromkeys(run["arm"] for run in found["runs"]):
        walls = seconds_of(found["runs"], arm)
        cpus = seconds_of(found["runs"], arm, "cpu_seconds")
        row = f"| {arm} | {len(walls)} | {statistics.median(walls):.1f} "
        lines.append(f"{row}| {statistics.median(cpus):.1f} |")
    if "trl" in found:
        one = statistics.median(run["run_seconds"] for run in found["trl"])
        row = f"| TRL tuned, {len(found['betas'])} runs | {len(found['trl'])} "
        lines.append(f"{row}| {len(found['betas']) * one:.1f} | – |")
    return lines


def write(out: Path, report: dict[str, Any], readme: Path) -> None:
    """Writes ``sweep.json`` and the table of the page beside it."""
    out.mkdir(parents=True, exist_ok=True)
    kept = report | {"ratios": ratios(report)}
    (out / "sweep.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    text = readme.read_text()
    begin, end = (text.index(mark) for mark in MARKS)
    text = f"{text[:begin]}{MARKS[0]}\n\n{table(report)}\n{text[end:]}"
    readme.write_text(text)
