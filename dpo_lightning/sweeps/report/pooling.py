"""Pools of trials that differ only in their seed, and statistics of their metrics."""

from __future__ import annotations

import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_lightning.errors import UserError
from dpo_lightning.run.page.values import as_rows, number
from dpo_lightning.settings.renamed import RENAMED_METRICS
from dpo_lightning.sweeps.report.read import TrialResult, is_hydra_word, override_key
from dpo_lightning.sweeps.report.statistics import Estimate, moved, over_items, over_seeds, single
from dpo_lightning.sweeps.report.text import label_of

REWARD = "controlled/expected_reward"
MARK = "samples/judge"
WIN_RATE = "samples/win_rate"
ACCURACY = "eval/rewards/accuracies"
LABEL_GAIN = "eval/label_gain"
EXACT_KL = "controlled/kl_policy_reference"
SAMPLED_KL = "samples/kl"

METRICS = {
    REWARD: "expected reward",
    MARK: "judge's mark of sampled responses",
    WIN_RATE: "win rate against the reference",
    ACCURACY: "held-out accuracy",
    LABEL_GAIN: "nats told about held-out labels",
}
"""What trials may be ranked by. Reward margins are not: they grow with beta by themselves."""

SHARES = (ACCURACY, WIN_RATE)
"""Metrics between 0 and 1."""

JUDGED = (MARK, WIN_RATE)
"""Metrics of answers that were drawn, which say nothing of what was cut off."""

_BY_DEFAULT = (REWARD, MARK, WIN_RATE, ACCURACY, LABEL_GAIN)


@dataclass(frozen=True, slots=True)
class Configuration:
    """Finished trials that differ only in their seed.

    Attributes:
        label: The swept settings, short.
        settings: The swept settings without the seed.
        trials: The finished ones.
        unfinished: Number of others.
        value: The ranking metric, None where no trial has it.
        kl: KL to the reference in nats per response, exact or sampled.
        sampled_kl: Its estimate from samples, where ``kl`` is exact.
        accuracy: The held-out accuracy.
        win_rate: The win rate against the reference, where samples are scored.
    """

    label: str
    settings: tuple[str, ...]
    trials: tuple[TrialResult, ...]
    unfinished: int
    value: Estimate | None
    kl: Estimate | None
    sampled_kl: Estimate | None
    accuracy: Estimate | None
    win_rate: Estimate | None

    @property
    def beta(self) -> float | None:
        """Beta, which the trials share."""
        return self.trials[0].beta

    @property
    def loss(self) -> str | None:
        """The loss's name, which the trials share."""
        return self.trials[0].loss

    @property
    def seeds(self) -> list[int]:
        """The seeds of the finished trials."""
        return sorted(trial.seed for trial in self.trials if trial.seed is not None)

    def mean(self, *names: str) -> float | None:
        """Mean over the seeds of the first of the metrics that all of them have."""
        for name in names:
            values = [trial.metric(name) for trial in self.trials]
            known = [value for value in values if value is not None]
            if known and len(known) == len(values):
                return math.fsum(known) / len(known)
        return None

    @property
    def pairs_per_second(self) -> float | None:
        """Mean over the seeds of the training speed."""
        rates = [number(t.section("throughput").get("pairs_per_second")) for t in self.trials]
        known = [rate for rate in rates if rate]  # of single responses alone it is 0
        return math.fsum(known) / len(known) if known else None


def choose_metric(trials: Sequence[TrialResult], wanted: str | None) -> str | None:
    """Metric to rank by: the wanted one, else the first that every trial has.

    Raises:
        UserError: If it is not one to rank by, or no trial has it.
    """
    counts = {name: sum(t.metric(name) is not None for t in trials) for name in METRICS}
    wanted = RENAMED_METRICS.get(wanted or "", wanted)
    if wanted is not None:
        if wanted not in METRICS:
            raise UserError(f"metric={wanted}: not one to rank by; use {', '.join(METRICS)}")
        if trials and not counts[wanted]:
            usable = ", ".join(name for name, count in counts.items() if count)
            raise UserError(
                f"metric={wanted}: no finished trial has it; they have {usable or 'none'}"
            )
        return wanted
    if not trials or not any(counts[name] for name in _BY_DEFAULT):
        return None
    # Among those that some lack, the one that most have: max keeps the first of equals.
    return max(_BY_DEFAULT, key=counts.__getitem__)


def choose_kl(trials: Sequence[TrialResult], *, exact: bool) -> str | None:
    """Metric that gives the KL to the reference: the exact one for an exact metric."""
    order = (EXACT_KL, SAMPLED_KL) if exact else (SAMPLED_KL, EXACT_KL)
    counts = {name: sum(t.metric(name) is not None for t in trials) for name in order}
    best = max(order, key=counts.__getitem__)
    return best if counts[best] else None


def pool(
    trials: Iterable[TrialResult], metric: str | None, kl_metric: str | None
) -> list[Configuration]:
    """The configurations of all trials, in the order of each one's first trial.

    Args:
        trials: Finished or not.
        metric: Metric to rank by.
        kl_metric: Metric that gives the KL.
    """
    groups: defaultdict[frozenset[str], list[TrialResult]] = defaultdict(list)
    for trial in trials:
        # The settings that were not swept count too: a folder may hold those of two commands.
        groups[frozenset(trial.settings) | words_of(trial)].append(trial)
    shared = frozenset.intersection(*groups) if groups else frozenset()
    labels = Counter(label_of(group[0].settings, group[0].beta) for group in groups.values())
    several = len({group[0].loss for group in groups.values() if group[0].finished}) > 1
    found = []
    for words, group in groups.items():
        label = label_of(group[0].settings, group[0].beta)
        if labels[label] > 1:
            label = label_of(sorted(words - shared), group[0].beta)
        elif several and not any(override_key(line) == "loss" for line in group[0].settings):
            label = f"{label}, loss {group[0].loss}"
        finished = tuple(trial for trial in group if trial.finished)
        found.append(
            Configuration(
                label=label,
                settings=group[0].settings,
                trials=finished,
                unfinished=len(group) - len(finished),
                value=_estimate(finished, metric),
                kl=_estimate(finished, kl_metric),
                sampled_kl=_estimate(finished, SAMPLED_KL) if kl_metric == EXACT_KL else None,
                accuracy=_estimate(finished, ACCURACY),
                win_rate=_estimate(finished, WIN_RATE),
            )
        )
    return found


def words_of(trial: TrialResult) -> frozenset[str]:
    """Settings of the command line, without the seed and the settings about where to run."""
    try:
        words = shlex.split(trial.command or "")
    except ValueError:
        return frozenset()
    return frozenset(
        word
        for word in words
        if "=" in word
        and not is_hydra_word(word)
        and word != "resume=auto"
        and override_key(word) != "seed"
    )


def _estimate(trials: Sequence[TrialResult], metric: str | None) -> Estimate | None:
    """Mean of a metric over seeds; its error from items, else from the seeds, else as reported."""
    if metric is None:
        return None
    having = [(t, value) for t in trials if (value := t.metric(metric)) is not None]
    if not having:
        return None
    values = [value for _, value in having]
    items = item_values([t for t, _ in having], metric)
    if items is not None:
        return moved(over_items(items), math.fsum(values) / len(values))
    if metric.startswith("controlled/"):
        return over_seeds(values) if len(values) > 1 else single(values[0], 0.0)
    reported = [t.metric(f"{metric}_stderr") for t, _ in having]
    known = [value for value in reported if value is not None and value >= 0]
    if len(values) == 1:
        return single(values[0], known[0] if known else None)
    spread = over_seeds(values)
    if len(known) < len(values) or spread.stderr is None:
        return spread
    # Few seeds may agree by chance; the error is not smaller than that of their samples.
    within = math.hypot(*known) / len(known)
    return spread if spread.stderr >= within else single(spread.mean, within)


def item_values(trials: Sequence[TrialResult], metric: str) -> NDArray[np.float64] | None:
    """The metric per item, a row for each trial; None where trials do not share their items.

    Items that any of the trials could not evaluate are left out.
    """
    rows = [item_list(trial, metric) for trial in trials]
    if not rows or len({len(row) for row in rows}) != 1:
        return None
    array = np.array(rows, dtype=np.float64)
    array = array[:, np.isfinite(array).all(axis=0)]
    return array if array.shape[1] > 1 else None


def item_list(trial: TrialResult, metric: str) -> list[float]:
    """The metric of each item in their order, NaN where one has none; empty without items."""
    if metric == ACCURACY:
        found = trial.evaluation.get("accuracies")
        return [_or_nan(value) for value in found] if isinstance(found, list) else []
    samples = as_rows(trial.evaluation.get("samples"))
    if metric == MARK:
        return [_or_nan(row.get("judge")) for row in samples]
    return [win_of(row) for row in samples] if metric == WIN_RATE else []


def win_of(row: Mapping[str, Any]) -> float:
    """The outcome against the reference's answer: as it was judged, else by both marks."""
    if "win" in row:
        return _or_nan(row["win"])
    # sign is -1, 0 or 1, and not finite where a mark is missing.
    own, other = (_or_nan(row.get(name)) for name in ("judge", "reference_judge"))
    return 0.5 + 0.5 * float(np.sign(own - other))


def _or_nan(value: object) -> float:
    known = number(value)
    return math.nan if known is None else known
