"""A policy that is to answer: its settings without any rows, and its backend. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dpo_lightning.errors import UserError
from dpo_lightning.run.opened import Opened, key_of
from dpo_lightning.settings.blocks import quoted
from dpo_lightning.settings.compose import compose_one
from dpo_lightning.settings.generation import Backend, backend_of
from dpo_lightning.settings.recorded import SETTINGS_FILE
from dpo_lightning.settings.schema import Config

OF_ANSWERS = (
    *("plugins", "generation", "evaluation.batch_size", "data.chat_template"),
    *("data.chat_template_kwargs", "data.template_date", "model.dtype", "model.revision"),
    *("model.tokenizer", "reference.revision", "beta"),
    *("trainer.accelerator", "trainer.devices", "trainer.precision", "trainer.threads"),
)
"""Settings that may be typed beside a policy that answers."""

# Settings are those of rows; here nothing reads any.
_NO_ROWS = (
    *("data.train=prompts/asked", "data.train_split=train", "data.eval=null"),
    *("data.eval_split=null", "data.subset=null", "data.revision=null"),
)


@dataclass(frozen=True, slots=True)
class AnsweringPolicy:
    """A policy that is to answer.

    Attributes:
        opened: The policy; of a run whose export is all that is needed, that export.
        config: Its settings.
        run: Folder of the run that it is of, if it is known.
        trained_beta: True if ``beta`` among the settings is that at which it was trained.
        needs_reference: True if the reference is asked too.
    """

    opened: Opened
    config: Config
    run: Path | None
    trained_beta: bool
    needs_reference: bool

    @property
    def backend(self) -> Backend:
        """The one who draws its answers."""
        return backend_of(self.config.generation)

    @property
    def speaks_of_weather(self) -> bool:
        """True for the bundled model, which has words for the embedded task alone."""
        model = self.config.model
        return model.pretrained is None and model.config is None


def subject_of(opened: Opened, typed: Sequence[str], *, needs_reference: bool) -> AnsweringPolicy:
    """The policy with its settings.

    Args:
        opened: The policy.
        typed: Settings that were typed beside it.
        needs_reference: True if the reference is asked too.

    Raises:
        UserError: If they are wrong, or a run's settings are gone.
    """
    trained = opened.trained_beta or "beta" in map(key_of, typed)
    if opened.run is None:
        words = [*opened.words, *_NO_ROWS]
        config = compose_one([*words, *typed])
        return AnsweringPolicy(opened, _on_one_device(config), None, trained, needs_reference)
    recorded = _recorded(opened.run)
    model = recorded.get("model")
    model = model if isinstance(model, dict) else {}
    data = recorded.get("data")
    words = list(opened.words)
    if isinstance(data, dict) and data.get("train") is not None:
        words += [*_NO_ROWS, "data.chat_template=null"]
        # The export's own, with the template that its rows went through.
        words.append(f"model.tokenizer={quoted(str(opened.tokenizer))}")
    run = opened.run
    if opened.adapter is None and not needs_reference and model.get("pretrained") is not None:
        words += [
            f"model.pretrained={quoted(str(opened.weights))}",
            *("model.revision=null", "reference.pretrained=null", "reference.revision=null"),
        ]
        opened = replace(opened, kind="model", run=None)
    config = compose_one([*words, *typed])
    return AnsweringPolicy(opened, _on_one_device(config), run, trained, needs_reference)


def _recorded(run: Path) -> Mapping[str, Any]:
    """The settings of a run as it recorded them.

    Raises:
        UserError: If they are gone or damaged.
    """
    try:
        found = yaml.safe_load((run / SETTINGS_FILE).read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"run={run}: its {SETTINGS_FILE} is gone or damaged, which describes it; name "
            "its model/ alone"
        )
    return found


def _on_one_device(config: Config) -> Config:
    """The settings for one process, whatever the run was trained on."""
    devices = config.trainer.devices
    one = devices[:1] if isinstance(devices, list) else 1
    return replace(
        config,
        trainer=replace(config.trainer, devices=one, num_nodes=1, profiler=None),
        strategy=replace(config.strategy, name="auto"),
    )
