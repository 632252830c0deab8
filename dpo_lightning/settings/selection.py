"""Settings that select checkpoints: what is wrong with them. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from dpo_lightning.data.source_names import eval_sets
from dpo_lightning.settings.judging import gives_marks
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.metric_names import JUDGE_METRIC, directed, direction, set_of
from dpo_lightning.settings.schema import CheckpointConfig, Config, EvaluationConfig


@dataclass(frozen=True, slots=True)
class Selection:
    """The metric that selects checkpoints, and when it ends a training.

    Attributes:
        monitor: Its name, as in ``metrics.jsonl``.
        sign: 1 where more of it is better, -1 where less is.
        patience: Evaluations without improvement after which the training ends; None: it does not.
        min_delta: Improvements for the patience are larger than this.
        export: ``last`` or ``best``.
    """

    monitor: str
    sign: int
    patience: int | None
    min_delta: float
    export: str

    def describe(self) -> str:
        """A line for the header."""
        which = "largest" if self.sign > 0 else "smallest"
        text = f"the {which} {self.monitor} is the best checkpoint"
        if self.patience is not None:
            text += f", {self.patience} evaluations without improvement end the training"
        return f"{text}; the {self.export} weights are exported"


def selection_of(checkpoint: CheckpointConfig) -> Selection | None:
    """Selection by valid settings; None where nothing selects."""
    if checkpoint.monitor is None:
        return None
    sign = direction(checkpoint.monitor)
    assert sign
    return Selection(
        monitor=checkpoint.monitor,
        sign=sign,
        patience=checkpoint.patience,
        min_delta=checkpoint.min_delta,
        export=checkpoint.export,
    )


def set_names(config: Config) -> tuple[str, ...]:
    """Names of the held-out sets; none where ``data.eval`` is one source."""
    return tuple(name for name in eval_sets(config.data.eval) if name is not None)


def selection_problems(config: Config) -> Iterator[str]:
    """Yields the contradictions of what selects checkpoints, one clause each."""
    chosen, default = config.checkpoint, CheckpointConfig()
    if chosen.monitor is None:
        for name in ("patience", "min_delta", "export"):
            value = getattr(chosen, name)
            if value != getattr(default, name):
                yield (
                    f"checkpoint.{name}={value}: nothing says which checkpoint is better; add "
                    "checkpoint.monitor=eval/loss, or another metric, or leave it out"
                )
        return
    yield from _monitor(config, chosen.monitor)
    if chosen.patience is None and chosen.min_delta != default.min_delta:
        yield (
            f"checkpoint.min_delta={chosen.min_delta:g} is for checkpoint.patience, which is null; "
            "set that too, or leave it out"
        )
    if chosen.patience is not None and config.sweep.prune != "none":
        yield (
            f"checkpoint.patience={chosen.patience}: sweep.prune={config.sweep.prune} stops trials "
            "already, at the same steps; use sweep.prune=none, or leave checkpoint.patience out"
        )


def sampling_problems(config: Config) -> Iterator[str]:
    """Yields the contradiction of answers at evaluations where there are to be none."""
    count, default = config.evaluation.intermediate_samples, EvaluationConfig().intermediate_samples
    if config.evaluation.samples == 0 and count not in (0, default):
        yield (
            f"evaluation.intermediate_samples={count}: evaluation.samples=0 draws no answers; "
            "raise that, or leave evaluation.intermediate_samples out"
        )


def _monitor(config: Config, metric: str) -> Iterator[str]:
    """Yields why a metric selects nothing."""
    data, sets = config.data, set_names(config)
    evaluation = config.evaluation
    drawn = bool(evaluation.samples and evaluation.intermediate_samples)
    judged = drawn and gives_marks(evaluation)
    unpaired = objective_settings(config.loss).is_unpaired
    possible = directed(sets, exact=data.train is None, judged=judged, unpaired=unpaired)
    key = f"checkpoint.monitor={metric}"
    known = direction(metric)
    own = set_of(metric)
    names = ", ".join(possible)
    if known is None:
        near = difflib.get_close_matches(metric.replace("_", "/", 1), possible, n=1, cutoff=0.5)
        yield (
            f"{key}: unknown metric; did you mean "
            f"checkpoint.monitor={near[0] if near else possible[0]}? It is one of {names}"
        )
    elif known == 0:
        yield (
            f"{key}: neither more nor less of it is better; use checkpoint.monitor={possible[0]}, "
            f"one of {names}"
        )
    elif metric.startswith("train/"):
        same = metric.partition("/")[2]
        yield f"{key} is of the rows that are trained on; use checkpoint.monitor=eval/{same}"
    elif own is not None and own not in sets:
        same = metric.replace(f"/{own}/", "/", 1)
        yield (
            f"{key}: there is no held-out set {own} (there are: {', '.join(sets) or 'none'}); use "
            f"checkpoint.monitor={same}, or give data.eval a set of that name"
        )
    elif metric.startswith("controlled/") and data.train is not None:
        yield (
            f"{key} exists for the embedded task only; use checkpoint.monitor={possible[0]}, one "
            f"of {names}"
        )
    elif metric == JUDGE_METRIC and not judged:
        yield (
            f"{key} needs a judge that marks answers, and answers to mark: set evaluation.judge= "
            "(an endpoint with evaluation.judge_form=marks), evaluation.samples= and "
            "evaluation.intermediate_samples="
        )
    elif metric not in possible and metric in directed(sets, unpaired=not unpaired):
        kind = "single responses" if unpaired else "pairs"
        yield (
            f"{key} is not measured with loss={config.loss.name}, a loss on {kind}; use "
            f"checkpoint.monitor={possible[0]}, one of {names}"
        )
    elif metric not in possible:
        yield (
            f"{key} is not measured before the end of a run; use checkpoint.monitor={possible[0]}, "
            f"one of {names}"
        )
    elif data.train is not None and not (data.eval or data.eval_split or data.eval_fraction):
        yield (f"{key} is measured on held-out rows: set data.eval=, or a data.eval_fraction= > 0")
