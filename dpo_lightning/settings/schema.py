"""The settings of an experiment as closed dataclass schemas.

A default lives here, in ``material.py`` or in ``conduct.py``, and nowhere else; the files of
``conf/`` state only what differs from it. What a key means and what its value may be stand beside
its default (``setting``); what values may not be together is
in :mod:`dpo_lightning.settings.validation`. Nothing here imports torch: a wrong key is answered
before it.
"""

import functools
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path

from dpo_lightning.objectives.objective import known_losses, merged_options
from dpo_lightning.objectives.registry import PAIRWISE_LOSSES
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
from dpo_lightning.settings.material import (
    BASE,
    DataConfig,
    LossConfig,
    ModelConfig,
    PeftConfig,
    ReferenceConfig,
)

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
    "loss_schema",
]

FREE_FORM = (
    "model.config_overrides",
    "data.chat_template_kwargs",
    "data.columns",
    "loss.terms",
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
        "Strength of the tie to the reference; every loss takes it from here.",
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
        "Name of the run's folder and of the run in wandb; null: model, loss and beta, in wandb "
        "WANDB_NAME.",
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
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)


def loss_schema() -> type[LossConfig]:
    """The schema of the ``loss`` group: with the options of every loss that there is by now."""
    return _loss_schema(known_losses())


@functools.cache
def _loss_schema(names: tuple[str, ...]) -> type[LossConfig]:
    losses = {name: PAIRWISE_LOSSES[name] for name in names if name in PAIRWISE_LOSSES}
    own = {item.name for item in fields(LossConfig)}
    items = []
    for name, option in merged_options(losses.values()).items():
        if name not in own:
            takers = ", ".join(loss for loss, entry in losses.items() if name in entry.schema)
            text = option.rule.get("help", "An option of the loss.")
            # Bounds are each loss's own; combinations.py has them.
            default = setting(option.default, f"{text} For loss={takers}.", unit="number")
            items.append((name, option.kind, default))
    return make_dataclass("LossConfig", items, bases=(LossConfig,))
