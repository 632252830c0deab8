"""Tables and advice of a report beside its ranking, and the same for ``sweep.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpo_lightning.run.page.text import MISSING, number_text
from dpo_lightning.sweeps.report.analysis import Analysis
from dpo_lightning.sweeps.report.comparable import MOST_CUT_OFF, KlOrigin, pooled_origin
from dpo_lightning.sweeps.report.objectives import Edge, GridMap
from dpo_lightning.sweeps.report.pooling import EXACT_KL, METRICS, SAMPLED_KL, Configuration
from dpo_lightning.sweeps.report.text import error_text, label_of


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table of texts.

    Attributes:
        title: Its heading.
        text: A sentence above it, empty for none.
        heads: Heads of its columns; the first column is text.
        rows: Its cells.
    """

    title: str
    text: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Advice:
    """Something to do next: a sentence, and the command that does it."""

    text: str
    command: str


def tables_of(analysis: Analysis) -> tuple[TextTable, ...]:
    """The tables below the ranking: objectives, maps, and rankings of what is not comparable."""
    metric = "" if analysis.metric is None else METRICS[analysis.metric]
    found = []
    if len(analysis.objectives.rows) > 1:
        found.append(_objectives(analysis, metric))
    for objective in analysis.objectives.rows:
        if objective.grid is not None:
            found.append(_map(objective.name, objective.grid, metric))
    found += [_other(other) for other in analysis.others]
    return tuple(found)


def advice_of(analysis: Analysis) -> tuple[Advice, ...]:
    """Steps to try next: scales at whose end the best cell of an objective is."""
    return tuple(
        Advice(_edge_text(objective.name, edge), edge.command)
        for objective in analysis.objectives.rows
        for edge in objective.edges
    )


def _edge_text(name: str, edge: Edge) -> str:
    end = "smallest" if edge.low else "largest"
    return (
        f"At the edge: the best cell of {name} has the {end} "
        f"{label_of([f'{edge.key}={edge.value:g}'], None)} that was tried. Extend the grid:"
    )


def _objectives(analysis: Analysis, metric: str) -> TextTable:
    kl = analysis.objectives.kl
    heads = ("objective", "best cell", metric, "KL in nats", "cells tried", "device-hours")
    equal = () if kl is None else (f"{metric} at KL {number_text(kl)}",)
    rows = []
    for row in analysis.objectives.rows:
        value, own = row.best.value, row.best.kl
        cells = str(row.cells) if row.cells == row.tried else f"{row.cells} of {row.tried}"
        texts = [
            *(row.name, row.best.label),
            MISSING if value is None else error_text(value.mean, value.stderr),
            MISSING if own is None else error_text(own.mean, own.stderr),
            *(cells, number_text(row.device_hours)),
        ]
        rows.append((*texts, *([] if kl is None else [number_text(row.at_kl)])))
    text = (
        "At equal KL: on straight lines between an objective's own cells, at the largest KL that "
        "all objectives reach."
    )
    return TextTable("Objectives", "" if kl is None else text, (*heads, *equal), tuple(rows))


def _map(name: str, grid: GridMap, metric: str) -> TextTable:
    heads = ("β", *(f"lr {rate:g}" for rate in grid.rates))
    rows = tuple(
        (f"{beta:g}", *(number_text(value) for value in row))
        for beta, row in zip(grid.betas, grid.cells, strict=True)
    )
    title = f"β and learning rate, {name}"
    return TextTable(title, f"The best {metric} of each pair.", heads, rows)


def _other(analysis: Analysis) -> TextTable:
    metric = "metric" if analysis.metric is None else METRICS[analysis.metric]
    rows = tuple(
        (
            f"{c.label}{' (pick)' if c is analysis.pick else ''}",
            MISSING if c.value is None else error_text(c.value.mean, c.value.stderr),
            MISSING if c.kl is None else error_text(c.kl.mean, c.kl.stderr),
        )
        for c in analysis.configurations
    )
    return TextTable(
        f"Ranked by itself: {analysis.of}",
        analysis.reason,
        ("settings", metric, "KL in nats"),
        rows,
    )


def headline(analysis: Analysis) -> tuple[Configuration | None, str]:
    """The pick of the whole sweep and its reason; none where parts are ranked by themselves."""
    if not analysis.others:
        return analysis.pick, analysis.reason
    parts = [analysis, *analysis.others]
    said = " ".join(f"{part.of}: {part.reason}" for part in parts)
    return None, f"{len(parts)} rankings, of trials that cannot be compared. {said}"


def origin_of(analysis: Analysis, configuration: Configuration) -> KlOrigin | None:
    """Origin of a configuration's KL; None where it has none, or none is recorded."""
    if configuration.kl is None:
        return None
    return pooled_origin(configuration.trials, exact=analysis.kl_metric == EXACT_KL)


def kl_columns(analysis: Analysis) -> dict[str, list[str]]:
    """Columns of what belongs to a KL; one without any value is left out by who places them."""
    origins = [origin_of(analysis, c) for c in analysis.configurations]
    return {
        "KL per token": [MISSING if o is None else number_text(o.per_token) for o in origins],
        "cut off": [
            MISSING if o is None or o.cut_off is None else f"{o.cut_off:.1%}" for o in origins
        ],
    }


def loss_column(analysis: Analysis) -> list[str]:
    """The loss of each configuration against the best, and its bound."""
    texts = []
    for c in analysis.configurations:
        found = analysis.decision.of(c)
        if found is None:
            texts.append(MISSING)
        else:
            bound = number_text(found.upper) if math.isfinite(found.upper) else "unknown"
            texts.append(f"{number_text(found.loss)}, ≤ {bound}")
    return texts


def method_of(analysis: Analysis) -> list[str]:
    """Sentences about the pick and about the KL."""
    said = []
    decision = analysis.decision
    if analysis.metric is not None:
        said.append(
            f"The pick is the configuration with the smallest KL among those that lose at most "
            f"{number_text(decision.margin)} (sweep.margin) of the {METRICS[analysis.metric]} "
            "against the best. That loss is bounded for all configurations at once with 95% "
            "confidence (Hsu's comparisons with the best, the quantile of the largest ratio), over "
            "the held-out items that they share, and over seeds as blocks. Not significant is not "
            "equal: where only the best qualifies and others may be as good, it is undecided."
        )
        if decision.kl_budget is not None:
            said[-1] = (
                f"The pick is the best configuration within {decision.kl_budget:g} nats per answer "
                "of the reference (sweep.kl_budget)."
            )
    origins = [origin_of(analysis, c) for c in analysis.configurations]
    known = [origin for origin in origins if origin is not None]
    if known and analysis.kl_metric == SAMPLED_KL:
        said.append(
            f"{known[0].words(cut=False)}. Where more than {MOST_CUT_OFF:.0%} of the answers were "
            "cut off there is no pick by judge or KL."
        )
    return said


def decision_entry(analysis: Analysis) -> dict[str, Any]:
    """The entry ``decision`` of ``sweep.json``."""
    decision = analysis.decision
    return {
        "undecided": decision.undecided,
        "best": None if decision.best is None else decision.best.label,
        "margin": decision.margin,
        "kl_budget": decision.kl_budget,
        **asdict(decision.ground),
        "rows_needed": decision.rows_needed,
        "seeds_needed": decision.seeds_needed,
        "candidates": [
            {
                "label": c.configuration.label,
                "loss": c.loss,
                "upper": c.upper if math.isfinite(c.upper) else None,
                "eligible": c.eligible,
                "may_be_best": c.may_be_best,
                "kl": c.kl,
            }
            for c in decision.candidates
        ],
        "left_out": [{"label": c.label, "why": why} for c, why in decision.left_out],
    }


def objectives_entry(analysis: Analysis) -> dict[str, Any]:
    """The entry ``objectives`` of ``sweep.json``."""
    return {
        "kl": analysis.objectives.kl,
        "rows": [
            {
                "name": row.name,
                "best": row.best.label,
                "cells": row.cells,
                "tried": row.tried,
                "device_hours": row.device_hours,
                "at_kl": row.at_kl,
                "map": None if row.grid is None else asdict(row.grid),
                "edges": [asdict(edge) for edge in row.edges],
            }
            for row in analysis.objectives.rows
        ],
    }


def rankings_entry(analyses: Sequence[Analysis]) -> list[dict[str, Any]]:
    """The entry ``rankings`` of ``sweep.json``: parts that are ranked by themselves."""
    return [
        {
            "of": part.of,
            "metric": part.metric,
            "pick": None if part.pick is None else part.pick.label,
            "reason": part.reason,
            "configurations": [c.label for c in part.configurations],
            "decision": decision_entry(part),
        }
        for part in analyses
    ]
