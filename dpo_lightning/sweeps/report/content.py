"""Content of a report, as texts and tables that the templates only place."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpo_lightning.run.page.text import MISSING, clean, cut, number_text, range_text
from dpo_lightning.settings.program import typed
from dpo_lightning.sweeps.report.about import about
from dpo_lightning.sweeps.report.analysis import Analysis
from dpo_lightning.sweeps.report.answers import Answers, answers_of
from dpo_lightning.sweeps.report.one_policy import PolicyFrontier, policy_frontiers
from dpo_lightning.sweeps.report.pooling import EXACT_KL, METRICS, Configuration
from dpo_lightning.sweeps.report.read import Sweep, TrialResult
from dpo_lightning.sweeps.report.rounds import round_tables
from dpo_lightning.sweeps.report.sections import (
    Advice,
    TextTable,
    advice_of,
    headline,
    kl_columns,
    loss_column,
    method_of,
    tables_of,
)
from dpo_lightning.sweeps.report.statistics import Estimate
from dpo_lightning.sweeps.report.text import error_text, own_words
from dpo_lightning.sweeps.report.trial_table import (
    TrialRow,
    folder_link,
    trial_rows,
    wall_seconds,
)


@dataclass(frozen=True, slots=True)
class Row:
    """A configuration in the table.

    Attributes:
        rank: Its place, a dash without the metric.
        label: Its settings, short.
        cells: Cells under ``Content.columns``.
        picked: True if it is the pick.
        commands: Commands that reproduce its trials.
        trials: Its trials: a word for each, and the link to its folder.
    """

    rank: str
    label: str
    cells: tuple[str, ...]
    picked: bool
    commands: tuple[str, ...]
    trials: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A trial that did not finish: its name, the link to its folder, status, why, and its log."""

    name: str
    link: str
    status: str
    error: str
    log: str | None


@dataclass(frozen=True, slots=True)
class ReportContent:
    """All texts of a report.

    Attributes:
        title: Model, data, rows, steps and seeds.
        facts: More that the trials share.
        folder: Name of the sweep's folder.
        counts: Number of trials of each status.
        pick: The pick's label, None without one.
        mark: Words beside the pick.
        reason: Reason why it was picked.
        metric: Metric of the ranking, in words.
        columns: Heads of the table behind rank and settings.
        rows: The configurations, best first.
        comparison: The best against the pick, or the next, in words; None where there are fewer.
        tables: Tables below the ranking.
        advice: What to try next.
        answers: Sample answers, None without any.
        trials: All trials.
        one_policy: Frontiers of single policies, for trials that have one.
        unfinished: Trials that failed, still run or wait.
        signs: Trials with signs of a failed training, and these.
        notes: Notes about what could not be read.
        method: Origin of the numbers, a sentence each.
        versions: Versions of the packages.
    """

    title: str
    facts: tuple[str, ...]
    folder: str
    counts: str
    pick: str | None
    mark: str
    reason: str
    metric: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    comparison: str | None
    tables: tuple[TextTable, ...]
    advice: tuple[Advice, ...]
    answers: Answers | None
    trials: tuple[TrialRow, ...]
    one_policy: tuple[PolicyFrontier, ...]
    unfinished: tuple[Unfinished, ...]
    signs: tuple[tuple[str, tuple[str, ...]], ...]
    notes: tuple[str, ...]
    method: tuple[str, ...]
    versions: str


def make_content(sweep: Sweep, analysis: Analysis) -> ReportContent:
    """Puts a sweep and its results into words.

    Args:
        sweep: The trials.
        analysis: The results.
    """
    pick, reason = headline(analysis)
    counts = [f"{count} {status}" for status, count in sweep.status_counts.items()]
    columns, cells = _columns(analysis)
    shared = about(sweep)
    return ReportContent(
        title=shared.title,
        facts=shared.facts,
        folder=clean(sweep.folder.resolve().name),
        counts=f"{len(sweep.trials)} trial{'s' * (len(sweep.trials) > 1)}: {', '.join(counts)}",
        pick=None if pick is None else pick.label,
        mark=analysis.decision.mark,
        reason=reason,
        metric="nothing" if analysis.metric is None else METRICS[analysis.metric],
        columns=columns,
        rows=tuple(
            Row(
                rank=MISSING if c.value is None else str(rank),
                label=c.label,
                cells=cells[rank - 1],
                picked=c is analysis.pick,
                commands=tuple(commands_of(c)),
                trials=_trial_links(c),
            )
            for rank, c in enumerate(analysis.configurations, start=1)
        ),
        comparison=None if analysis.comparison is None else analysis.comparison.sentence,
        tables=(*tables_of(analysis), *round_tables(analysis)),
        advice=advice_of(analysis),
        answers=answers_of(analysis),
        trials=trial_rows(sweep),
        one_policy=policy_frontiers(sweep.finished),
        unfinished=tuple(
            Unfinished(clean(t.name), folder_link(t), clean(t.status), cut(t.error), t.log)
            for t in sweep.trials
            if not t.finished
        ),
        signs=tuple(
            (clean(t.name), tuple(cut(text) for text in t.signs)) for t in sweep.trials if t.signs
        ),
        notes=tuple(clean(note) for note in sweep.notes),
        method=tuple(_method(analysis)),
        versions=_versions(sweep.finished),
    )


def _columns(analysis: Analysis) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads of the table, and each configuration's cells; an empty column is left out."""
    configurations = analysis.configurations
    metric = "" if analysis.metric is None else METRICS[analysis.metric]
    several = any(len(c.trials) > 1 for c in configurations)
    values: dict[str, list[str]] = {}
    if several:
        values["seeds"] = [
            ", ".join(map(str, c.seeds)) or str(len(c.trials)) for c in configurations
        ]
    if metric:
        values[_head(metric, [c.value for c in configurations])] = [
            _estimate(c.value) for c in configurations
        ]
        values["95% interval"] = [_interval(c.value) for c in configurations]
        values["loss against the best"] = loss_column(analysis)
    values[_head("KL in nats", [c.kl for c in configurations])] = [
        _estimate(c.kl) for c in configurations
    ]
    values |= kl_columns(analysis)
    if metric != METRICS["eval/rewards/accuracies"]:
        values["held-out accuracy"] = [_estimate(c.accuracy) for c in configurations]
    if metric != METRICS["samples/win_rate"]:
        wins = [c.win_rate for c in configurations]
        values["win rate over the reference"] = [_estimate(win) for win in wins]
        values["95% interval of it"] = [_interval(win) for win in wins]
    if analysis.exact:
        values["gain / best at this KL"] = [
            number_text(c.mean("controlled/gain_ratio")) for c in configurations
        ]
    for name, words in (("chosen", "chosen log-ratio"), ("rejected", "rejected log-ratio")):
        found = [
            c.mean(f"eval/logratios/{name}", f"train/logratios/{name}") for c in configurations
        ]
        values[words] = [number_text(value) for value in found]
    values["wall time, s"] = [number_text(_seconds(c)) for c in configurations]
    values["pairs/s"] = [number_text(c.pairs_per_second) for c in configurations]
    kept = {name: cells for name, cells in values.items() if set(cells) - {MISSING, ""}}
    return tuple(kept), (
        list(zip(*kept.values(), strict=True)) if kept else [()] * len(configurations)
    )


def _head(name: str, values: Sequence[Estimate | None]) -> str:
    exact = all(value is None or value.stderr == 0 for value in values)
    return f"{name}, exact" if exact and any(value is not None for value in values) else name


def _estimate(value: Estimate | None) -> str:
    return MISSING if value is None else error_text(value.mean, value.stderr)


def _interval(value: Estimate | None) -> str:
    return "" if value is None else range_text(value.low, value.high)


def _seconds(configuration: Configuration) -> float | None:
    """Mean over the seeds of the wall time of a trial."""
    known = [s for trial in configuration.trials if (s := wall_seconds(trial)) is not None]
    return sum(known) / len(known) if known else None


def _trial_links(configuration: Configuration) -> tuple[tuple[str, str], ...]:
    trials = configuration.trials
    if len(trials) == 1:
        return (("trial", folder_link(trials[0])),)
    return tuple(
        (f"seed {number if trial.seed is None else trial.seed}", folder_link(trial))
        for number, trial in enumerate(trials, start=1)
    )


def commands_of(configuration: Configuration) -> list[str]:
    """Commands of its trials, as they were typed."""
    return [own_words(trial.command) for trial in configuration.trials if trial.command]


def _method(analysis: Analysis) -> list[str]:
    said = []
    if analysis.metric is not None:
        said.append(
            f"Configurations are ranked by the {METRICS[analysis.metric]}. Reward margins are not "
            "used: they are β times a log-ratio and grow with β by themselves."
        )
    said += method_of(analysis)
    if analysis.kl_metric == EXACT_KL:
        said.append(
            "KL(π‖π_ref), expected rewards and the closed-form optimum are exact: sums over all "
            "responses, averaged over the prompts."
        )
    elif analysis.kl_metric is not None:
        said.append(
            "KL(π‖π_ref) is estimated on answers that the policy itself drew to prompts of the "
            "evaluation set, with the exact divergence of the next-token distributions at each of "
            "their tokens; its error is the standard error over answers."
        )
    if any(c.win_rate is not None for c in analysis.configurations):
        said.append(
            "The win rate is the share of prompts to which the judge finds the policy's answer "
            "better than the reference's; a tie counts one half."
        )
    if any(c.accuracy is not None for c in analysis.configurations):
        said.append(
            "The held-out accuracy is the share of ranked pairs whose better response has the "
            "larger log-ratio log π/π_ref; a tie counts one half."
        )
    said.append(
        "Intervals are 95% bootstrap intervals over seeds and over evaluated items; trials that "
        "differ only in their seed are pooled."
    )
    return said


def _versions(trials: Sequence[TrialResult]) -> str:
    found = {
        tuple(sorted((name, str(version)) for name, version in trial.section("versions").items()))
        for trial in trials
    }
    lines = [", ".join(f"{name} {version}" for name, version in versions) for versions in found]
    return clean("; ".join(sorted(line for line in lines if line)))


def report_command(folder: str, asked: Mapping[str, object]) -> str:
    """Command that makes the report again.

    Args:
        folder: The sweep's folder.
        asked: ``metric``, ``margin`` and ``kl_budget``; None where the report decides.
    """
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in asked.items() if value is not None
    ]
    return shlex.join([*typed("report"), folder, *flags])
