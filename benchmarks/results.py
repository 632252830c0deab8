"""Results of a benchmark: from the records of runs to a JSON file, a table and a picture."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "trl_default": "TRL, defaults",
    "trl_tuned": "TRL, tuned",
    "padded": "padded",
    "flat": "flat: no padding",
    "shared": "shared: prompts once",
    "cached": "cached: reference once",
    "trl_lora": "TRL, tuned, LoRA",
    "lora": "LoRA",
}
RESAMPLES = 4000


def write_results(folder: Path, report: dict[str, Any]) -> None:
    """Writes a JSON file, a table and a picture, called ``cpu`` or ``gpu``."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / ("gpu" if report["machine"]["gpu"] else "cpu")
    report = report | {"summary": summarise(report)}
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(report))
    draw(stem.with_suffix(".png"), report)


def median_interval(values: list[float], *, draw: np.random.Generator) -> list[float]:
    """Median and its 95% bootstrap interval."""
    array = np.array(values)
    medians = np.median(draw.choice(array, (RESAMPLES, len(array))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return [float(np.median(array)), float(low), float(high)]


def ratio_interval(
    values: list[float], base: list[float], *, draw: np.random.Generator
) -> list[float]:
    """Ratio of two medians and its 95% bootstrap interval."""
    a, b = np.array(values), np.array(base)
    ratios = np.median(draw.choice(a, (RESAMPLES, len(a))), axis=1) / np.median(
        draw.choice(b, (RESAMPLES, len(b))), axis=1
    )
    low, high = np.quantile(ratios, (0.025, 0.975))
    return [float(np.median(a) / np.median(b)), float(low), float(high)]


def summarise(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each arm of each case, in the order in which they were measured."""
    draw = np.random.default_rng(0)
    runs: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in report["runs"]:
        runs[run["shape"], run["precision"], run["arm"]].append(run)
    rows = []
    for (shape, precision, arm), found in runs.items():
        speeds = [run["pairs_per_second"] for run in found]
        other = "trl_lora" if arm.endswith("lora") else "trl_tuned"
        tuned = runs.get((shape, precision, other))
        row = {
            "shape": shape,
            "precision": precision,
            "arm": arm,
            "runs": len(found),
            "pairs_per_second": median_interval(speeds, draw=draw),
            "peak_bytes": float(np.median([run["peak_bytes"] for run in found])),
            "utilisation": float(np.median([run["flops_per_second"] for run in found]))
            / report["matrix_flops_per_second"][precision],
            "start_seconds": float(np.median([run["import_seconds"] for run in found])),
        }
        if tuned:
            base = [run["pairs_per_second"] for run in tuned]
            row["over_trl_tuned"] = ratio_interval(speeds, base, draw=draw)
            row["memory_over_trl_tuned"] = row["peak_bytes"] / float(
                np.median([run["peak_bytes"] for run in tuned])
            )
        if "loop_seconds" in found[0]:
            # What result.json says, over what a clock around the training loop says.
            ratios = [
                run["reported_pairs_per_second"]
                * run["loop_seconds"]
                / ((report | run)["pairs_per_step"] * len(run["times"]))
                for run in found
            ]
            row["reported_over_outside"] = float(np.median(ratios))
        rows.append(row)
    return rows


def table(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    model = report["model"]
    lines = [
        f"{machine['date']}, {machine['gpu'] or machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, Python {machine['python']}, {versions}.",
        "",
        f"A Llama of {model['layers']} layers of {model['hidden']}, a vocabulary of "
        f"{model['vocabulary']:,}, {report['pairs_per_step']} pairs a step. Medians of fresh "
        "processes that took turns, with 95% bootstrap intervals. Memory is the peak above the "
        "level after the imports. Utilisation counts only FLOPs that are needed (each prompt once, "
        "no padding, no reference), over the rate of large matrix products in that precision: "
        + ", ".join(
            f"{rate / 1e9:,.0f} GFLOP/s in {precision}"
            for precision, rate in report["matrix_flops_per_second"].items()
        )
        + ".",
        "",
        "| prompt/response | precision | arm | runs | pairs/s | over TRL tuned | memory "
        "| over TRL tuned | utilisation |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["summary"]:
        speed, low, high = row["pairs_per_second"]
        ratio = memory = "–"
        if "over_trl_tuned" in row:
            middle, least, most = row["over_trl_tuned"]
            ratio = f"{middle:.2f} ({least:.2f}–{most:.2f})"
            memory = f"{row['memory_over_trl_tuned']:.2f}"
        lines.append(
            f"| {row['shape']} | {row['precision']} | {NAMES[row['arm']]} | {row['runs']} "
            f"| {speed:.2f} ({low:.2f}–{high:.2f}) | {ratio} | {row['peak_bytes'] / 1e6:,.0f} MB "
            f"| {memory} | {row['utilisation']:.0%} |"
        )
    if "equality" in report:
        equality = report["equality"]
        lines += [
            "",
            f"Before anything was timed: the losses of {equality['steps']} float32 steps on the "
            f"same rows moved by {equality['moved']:.3f} and differed from TRL's by at most "
            f"{equality['largest_difference']:.1g}; the first is ln 2 on both sides.",
        ]
    if "equality_lora" in report:
        lora = report["equality_lora"]
        lines += [
            "",
            f"With LoRA, from the same adapter: {lora['steps']} steps moved by {lora['moved']:.3f} "
            f"and differed by at most {lora['largest_difference']:.1g}.",
        ]
    reported = [
        row["reported_over_outside"] for row in report["summary"] if "reported_over_outside" in row
    ]
    if reported:
        lines += [
            "",
            "`pairs_per_second` in `result.json` is between "
            f"{min(reported):.3f} and {max(reported):.3f} of what a clock around the training loop "
            "says.",
        ]
    if "sweep" in report:
        sweep = report["sweep"]
        lines += [
            "",
            f"Four values of β, {sweep['pairs']} pairs each, from the command to the end: "
            f"{sweep['ours_seconds']:.0f} s as one sweep, {sweep['trl_seconds']:.0f} s as four "
            f"runs of TRL (tuned), a ratio of "
            f"{sweep['ours_seconds'] / sweep['trl_seconds']:.2f}.",
        ]
    if "head" in report:
        head = report["head"]
        lines += [
            "",
            f"A float32 step over {head['response_tokens']:,} response tokens at a vocabulary of "
            f"{head['vocabulary']:,} peaks {head['peak_bytes'] / 1e6:,.0f} MB above weights, "
            "gradients and optimizer state.",
        ]
    return "\n".join(lines) + "\n"


def draw(path: Path, report: dict[str, Any]) -> None:
    """The ladder on the left, all shapes on the right."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = report["summary"]
    first = [row for row in rows if (row["shape"], row["precision"]) == _first_case(rows)]
    ladder = [row for arm in NAMES for row in first if row["arm"] == arm]
    ours = [row for row in rows if row["arm"] in ("cached", "lora") and "over_trl_tuned" in row]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.6), layout="constrained", width_ratios=(3, 2)
    )
    grey, blue = "#9aa5b1", "#1f77b4"

    def bars(axes: Any, labels: list[str], values: list[list[float]], colours: list[str]) -> None:
        places = np.arange(len(labels))
        middles = np.array([value[0] for value in values])
        errors = np.array([[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]])
        axes.barh(places, middles, xerr=np.maximum(errors, 0), color=colours, height=0.7)
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f" {value[0]:.3g}", (value[2], place), va="center", fontsize=9, color="#333"
            )
        axes.margins(x=0.12)

    bars(
        left,
        [NAMES[row["arm"]] for row in ladder],
        [row["pairs_per_second"] for row in ladder],
        [grey if row["arm"].startswith("trl") else blue for row in ladder],
    )
    left.set_xlabel("pairs per second")
    left.set_title("{}, {}: what each lever is worth".format(*_first_case(rows)), fontsize=10)
    bars(
        right,
        [
            f"{row['shape']}  {row['precision'].split('-')[0]}{' LoRA' * (row['arm'] == 'lora')}"
            for row in ours
        ],
        [row["over_trl_tuned"] for row in ours],
        [blue] * len(ours),
    )
    right.axvline(1, color=grey, linewidth=1)
    right.set_xlabel("times as fast as TRL, tuned")
    right.set_title("prompt/response tokens, precision", fontsize=10)
    machine = report["machine"]
    figure.supxlabel(
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {machine['date']}",
        fontsize=8,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _first_case(rows: list[dict[str, Any]]) -> tuple[str, str]:
    return rows[0]["shape"], rows[0]["precision"]
