"""The schema of all settings, and its registration with Hydra."""

import functools
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from dpo_lightning.objectives.objective import known_losses
from dpo_lightning.objectives.registry import losses_with_options
from dpo_lightning.plugins import OPTIMIZERS
from dpo_lightning.settings.names import model_label, run_name, trial_name
from dpo_lightning.settings.page import settings_help
from dpo_lightning.settings.program import typed
from dpo_lightning.settings.schema import (
    CONF,
    FREE_FORM,
    Config,
    known_names,
    loss_schema,
    optimizer_schema,
)

SCHEMA = "schema"
"""The name under which ``conf/config.yaml`` lists the schema in its defaults."""


def schema() -> DictConfig:
    """The schema of all settings, shared by all who ask: to be merged into, never changed."""
    return _schema(known_names())


@functools.cache
def _schema(_: tuple[str, ...]) -> DictConfig:
    node: DictConfig = OmegaConf.structured(Config)
    node.loss = OmegaConf.structured(loss_schema())
    node.optimizer = OmegaConf.structured(optimizer_schema())
    for key in FREE_FORM:
        # Hydra closes the whole tree; these stay open without a `+` before the key.
        OmegaConf.set_struct(OmegaConf.select(node, key), False)
    return node


def register() -> None:
    """Make the schema and the resolvers known to Hydra; called again after plugins were loaded."""
    store = ConfigStore.instance()
    store.store(name=SCHEMA, node=schema(), provider="dpo_lightning")
    defaults, entries = loss_schema()(), losses_with_options()
    for name in known_losses():
        if not (CONF / "loss" / f"{name}.yaml").exists():
            # loss=<name> is a choice without a file, also for a plugin's.
            own = entries[name].options if name in entries else {}
            differing = {key: own[key] for key in own if own[key] != getattr(defaults, key)}
            store.store(group="loss", name=name, node={"name": name, **differing})
    merged = optimizer_schema()()
    for name, entry in OPTIMIZERS.items():
        own = {key: option.default for key, option in entry.schema.items()}
        differing = {key: own[key] for key in own if own[key] != getattr(merged, key)}
        store.store(group="optimizer", name=name, node={"name": name, **differing})
    OmegaConf.register_new_resolver("settings_help", settings_help, replace=True)
    OmegaConf.register_new_resolver("typed", lambda: " ".join(typed()), replace=True)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("trial_name", trial_name, replace=True)
    OmegaConf.register_new_resolver("one_of", _one_of, replace=True)


def _run_name(name: str | None, model: DictConfig, loss: str, beta: float, seed: int) -> str:
    """The last part of a run's folder name, for ``hydra.run.dir``."""
    label = model_label(model.name, model.pretrained, model.config)
    return run_name(name, label, loss, beta, seed)


def _one_of(name: str, values: DictConfig) -> Any:
    """The value of a name, for blocks of a grid that depend on a choice."""
    return values[name]
