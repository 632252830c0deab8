"""The Hydra sweeper `blocks`: the trials of `sweep.trials`, each block a grid of its own.

Hydra's own sweeper only crosses. A sweep with `sweep.trials=` gets this one by itself. Hydra
imports this file at every start, before Python knows the module by its name, which is why
annotations are not put off here: dataclasses would look for them there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Dict, List, Optional  # noqa: UP035 - Hydra's schema reads these

from hydra._internal.core_plugins import basic_sweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class BlocksSweeperConf:
    """``hydra.sweeper``: as that of Hydra's own."""

    _target_: str = "hydra_plugins.dpo_lightning_blocks.BlocksSweeper"
    # Trials that the launcher is given at once; null: all of them.
    max_batch_size: Optional[int] = None  # noqa: UP045
    params: Optional[Dict[str, str]] = None  # noqa: UP006, UP045


ConfigStore.instance().store(
    group="hydra/sweeper", name="blocks", node=BlocksSweeperConf, provider="dpo_lightning"
)


class BlocksSweeper(basic_sweeper.BasicSweeper):
    """Launches the trials that the command line has made of the blocks, and checked."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Takes what Hydra gives every sweeper; the task function knows the trials."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        task: Any = task_function
        self._trials: Sequence[List[str]] = task.grid  # noqa: UP006

    def split_arguments(  # type: ignore[override]
        self,
        overrides: Sequence[Override],
        max_batch_size: Optional[int],  # noqa: UP045
    ) -> List[List[List[str]]]:  # noqa: UP006
        """The trials in batches; what was typed is a part of each already."""
        return list(self.split_overrides_to_chunks(list(self._trials), max_batch_size))
