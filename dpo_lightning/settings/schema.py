"""The settings of an experiment as closed dataclass schemas.

A default lives here, in ``material.py`` or in ``conduct.py``, and nowhere else; the files of
``conf/`` state only what differs from it. What a key means and what its value may be stand beside
its default (``setting``); what values may not be together is
in :mod:`dpo_lightning.settings.validation`. Nothing here imports torch: a wrong key is answered
before it.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.objectives.objective import known_losses, merged_options
from dpo_lightning.objectives.registry import Option, losses_with_options
from dpo_lightning.plugins import OPTIMIZERS, known_optimizers
from dpo_lightning.settings.conduct import (
    RANKING_METRICS,
    CheckpointConfig,
    DebugConfig,
    EvaluationConfig,
    LoggerConfig,
    OptimizerConfig,
    StrategyConfig,
    SweepConfig,
    TrainerConfig,
)
from dpo_lightning.settings.fields import LARGEST_SEED, setting
from dpo_lightning.settings.generation import GenerationConfig
from dpo_lightning.settings.material import (
    BASE,
    DataConfig,
    LossConfig,
    ModelConfig,
    PeftConfig,
    ReferenceConfig,
)
from dpo_lightning.settings.rounds_section import RoundsConfig

__all__ = [
    "BASE",
    "CONF",
    "FREE_FORM",
    "RANKING_METRICS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DebugConfig",
    "EvaluationConfig",
    "LoggerConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PeftConfig",
    "ReferenceConfig",
    "StrategyConfig",
    "SweepConfig",
    "TrainerConfig",
    "known_names",
    "loss_schema",
    "optimizer_schema",
]

FREE_FORM = (
    "model.config_overrides",
    "data.chat_template_kwargs",
    "data.columns",
    "evaluation.judge_options",
    "loss.terms",
    "generation.options",
)
"""Mappings whose keys belong to the user: any key may be set in them."""

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package."""

IN_CLONE = not (PACKAGE / "conf").is_dir()
"""True in a clone, where ``conf/`` and ``train.py`` stand beside the package."""

CONF = (PACKAGE.parent if IN_CLONE else PACKAGE) / "conf"
"""The config files; an installed wheel has them inside the package."""


@dataclass
class Config:
    """One experiment."""

    beta: float = setting(
        0.1,
        "Strength of the pull towards the reference: a larger beta keeps the policy closer to it.",
        unit="reward per nat",
        above=0,
    )
    seed: int = setting(
        1,
        "Seed of the data's order, of the embedded task and of all draws.",
        unit="seed",
        least=0,
        most=LARGEST_SEED,
    )
    name: str | None = setting(
        None,
        "Name of the run's folder and of the run in its loggers; null: model, loss, beta and seed, "
        "in wandb WANDB_NAME.",
    )
    resume: str | None = setting(
        None,
        "A checkpoint, a run's folder, or auto: the newest checkpoint in an explicit "
        "hydra.run.dir.",
    )
    resume_changed: bool = setting(
        False, "Let a resumed run have another beta, loss, seed, model or data than its checkpoint."
    )
    overwrite: bool = setting(
        False,
        "Let the run write into the folder of a run that has finished; what that one made is "
        "cleared after the first step.",
    )
    plugins: list[str] = setting(
        [],
        "Modules of your own, by their import names; they may register what the settings "
        "then name.",
        expected="a list of import names, such as [my_scorers]",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=lambda: loss_schema()())
    peft: PeftConfig = field(default_factory=PeftConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: optimizer_schema()())
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


def known_names() -> tuple[str, ...]:
    """Names of all losses and optimizers that there are by now; the schema depends on them."""
    return (*known_losses(), *known_optimizers())


def loss_schema() -> type[LossConfig]:
    """The schema of the ``loss`` group: with the options of every loss that there is by now."""
    return _loss_schema(known_losses())


@functools.cache
def _loss_schema(names: tuple[str, ...]) -> type[LossConfig]:
    entries = losses_with_options()
    losses = {name: entries[name] for name in names if name in entries}
    takers = {name: entry.schema for name, entry in losses.items()}
    items = _option_fields("loss", merged_options(losses.values()), takers, LossConfig)
    return make_dataclass("LossConfig", items, bases=(LossConfig,))


def optimizer_schema() -> type[OptimizerConfig]:
    """The schema of the ``optimizer`` group: with the options of the plugins' optimizers."""
    return _optimizer_schema(known_optimizers())


@functools.cache
def _optimizer_schema(names: tuple[str, ...]) -> type[OptimizerConfig]:
    takers = {name: OPTIMIZERS[name].schema for name in names if name in OPTIMIZERS}
    if not takers:
        return OptimizerConfig
    merged: dict[str, Option] = {}
    for schema in takers.values():
        merged = {**schema, **merged}
    items = _option_fields("optimizer", merged, takers, OptimizerConfig)
    return make_dataclass("OptimizerConfig", items, bases=(OptimizerConfig,))


def _option_fields(
    group: str,
    options: Mapping[str, Option],
    takers: Mapping[str, Mapping[str, Option]],
    base: type,
) -> list[Any]:
    """Fields of options that the base does not have; bounds are each taker's own."""
    own = {item.name for item in fields(base)}
    items = []
    for name, option in options.items():
        if name not in own:
            named = ", ".join(taker for taker, schema in takers.items() if name in schema)
            text = option.rule.get("help", f"An option of the {group}.")
            # Bounds are checked by combinations.py.
            default = setting(option.default, f"{text} For {group}={named}.", unit="number")
            items.append((name, option.kind, default))
    return items
