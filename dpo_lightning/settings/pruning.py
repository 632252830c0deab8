"""Settings of a pruned sweep: what is wrong with them, and what an open one comes to. No torch."""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass

from dpo_lightning.errors import UserError
from dpo_lightning.settings.conduct import RUNG_WARMUPS, scales_with_beta
from dpo_lightning.settings.judging import gives_marks, judge_named
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.messages import shown
from dpo_lightning.settings.metric_names import direction
from dpo_lightning.settings.schema import Config, SweepConfig

_OPTIONS = ("prune_at", "prune_keep", "prune_within", "prune_metric", "budget")
_JUDGES = ("controlled/expected_reward", "samples/judge")
_FREE_OF_BETA = "eval/fitted_log_loss"
_OF_LABELS = "eval/label_gain"
_WITHOUT_JUDGE = ("loss", "beta", "reference")


@dataclass(frozen=True, slots=True)
class PruneSettings:
    """Settings of a pruned sweep with what was open decided.

    Attributes:
        at: Share of a trial's steps at each rung.
        keep: Share of the compared trials that goes on.
        within: Trials are compared that are equal in these settings.
        metric: The metric that they are compared by.
        budget: Share of the whole grid's steps.
    """

    at: tuple[float, ...]
    keep: float
    within: tuple[str, ...]
    metric: str
    budget: float

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, else -1."""
        sign = direction(self.metric)
        assert sign
        return sign


def pruning_problems(config: Config) -> Iterator[str]:
    """Yields the contradictions of one trial's settings, one clause each."""
    sweep, default = config.sweep, SweepConfig()
    if sweep.prune == "none":
        for name in _OPTIONS:
            value = getattr(sweep, name)
            if value != getattr(default, name):
                yield (
                    f"sweep.{name}={shown(value)}: sweep.prune=none prunes nothing; add "
                    "sweep.prune=halving, or leave it out"
                )
        return
    metric = sweep.prune_metric
    if metric is not None and scales_with_beta(metric):
        yield (
            f"sweep.prune_metric={metric}: it scales with beta, so it does not compare trials; use "
            f"sweep.prune_metric={_of_rows(config)}"
        )
        return
    yield from _unmeasured(config)
    warmup = config.optimizer.warmup
    if warmup < 1 and RUNG_WARMUPS * warmup >= 1:
        yield (
            f"optimizer.warmup={warmup:g}: no rung of a pruned sweep comes before {RUNG_WARMUPS} "
            f"times the warm-up, and that is past the end; use less than 1/{RUNG_WARMUPS}, or "
            "sweep.prune=none"
        )


def _unmeasured(config: Config) -> Iterator[str]:
    """Faults of a metric that the trial will not have."""
    metric = metric_of(config)
    key = f"sweep.prune_metric={metric}"
    data, evaluation = config.data, config.evaluation
    if metric == "controlled/expected_reward":
        if data.train is not None:
            yield f"{key} exists for the embedded task only; leave it out, or data.train="
    elif metric == "samples/judge":
        if judge_named(evaluation) is None:
            yield (
                f"{key} is a judge's mark, and evaluation.judge names none; use "
                f"sweep.prune_metric={_of_rows(config)}, or name a judge"
            )
        elif not gives_marks(evaluation):
            yield (
                f"{key} is a mark of each answer, and evaluation.judge_form=pairs compares two; "
                f"use sweep.prune_metric={_of_rows(config)} or evaluation.judge_form=marks"
            )
    elif metric != _of_rows(config) and (metric == _OF_LABELS or _is_unpaired(config)):
        yield (
            f"{key} is not measured with loss={config.loss.name}; use "
            f"sweep.prune_metric={_of_rows(config)}, or leave it out"
        )
    elif data.train is not None and not (data.eval or data.eval_split or data.eval_fraction):
        yield f"{key} needs held-out rows: set data.eval=, or a data.eval_fraction= > 0"


def _is_unpaired(config: Config) -> bool:
    return objective_settings(config.loss).is_unpaired


def _of_rows(config: Config) -> str:
    """The metric of held-out rows that is free of beta."""
    return _OF_LABELS if _is_unpaired(config) else _FREE_OF_BETA


def metric_of(config: Config) -> str:
    """The metric by which a trial is compared."""
    chosen = config.sweep.prune_metric
    if chosen is not None:
        return chosen
    return "samples/judge" if gives_marks(config.evaluation) else _of_rows(config)


def prune_settings(configs: Sequence[Config]) -> PruneSettings | None:
    """The settings of a sweep's pruning; None where it prunes nothing.

    Args:
        configs: The settings of all trials.

    Raises:
        UserError: If trials differ in them, or no two trials would be compared.
    """
    found = {_settings(config) for config in configs}
    if len(found) > 1:
        metrics = sorted({one.metric for one in found if one is not None})
        remedy = f"one sweep.prune_metric= of {' and '.join(metrics)}" if metrics[1:] else "one"
        raise UserError(f"sweep.prune: all trials of a sweep are pruned alike; set {remedy}")
    settings = next(iter(found), None)
    if settings is None:
        return None
    cells = [(pool_of(config, settings.within), _but_seed(config)) for config in configs]
    if len(set(cells)) == len({pool for pool, _ in cells}):
        within = ",".join(settings.within)
        if settings.within:
            said = f"no two trials are equal in {within}"
            remedy = "sweep.prune_within=[] compares all of them"
        else:
            said, remedy = "there is one trial but for its seeds", "leave it out"
        raise UserError(f"sweep.prune=halving: {said}, so nothing can be pruned; {remedy}")
    return settings


def _settings(config: Config) -> PruneSettings | None:
    sweep = config.sweep
    if sweep.prune == "none":
        return None
    metric = metric_of(config)
    within = sweep.prune_within
    if within is None:
        within = [] if metric in _JUDGES else list(_WITHOUT_JUDGE)
    return PruneSettings(
        at=tuple(sweep.prune_at),
        keep=sweep.prune_keep,
        within=tuple(within),
        metric=metric,
        budget=sweep.budget,
    )


def pool_of(config: Config, within: Sequence[str]) -> tuple[str, ...]:
    """The values of a trial's settings in which those it is compared with are equal.

    Args:
        config: The trial's settings.
        within: Keys, of sections too.
    """
    values = (functools.reduce(getattr, key.split("."), config) for key in within)
    plain = (asdict(value) if is_dataclass(value) else value for value in values)
    return tuple(json.dumps(value, sort_keys=True, default=str) for value in plain)


def _but_seed(config: Config) -> str:
    """All settings but the seed, as a text."""
    plain = asdict(config)
    del plain["seed"]
    return json.dumps(plain, sort_keys=True, default=str)
