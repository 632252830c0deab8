"""The Hydra launcher `devices`: every trial of a sweep is a process of its own on leased devices.

Hydra finds launchers in the namespace `hydra_plugins` alone. It imports this file at every start,
so what costs time is imported when a sweep begins. It runs this file before Python knows the module
by its name, which is why annotations are not put off here: dataclasses would look for them there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class DevicesLauncherConf:
    """``hydra.launcher``: where the trials of a sweep run, and what happens when one fails."""

    _target_: str = "hydra_plugins.dpo_lightning_devices.DevicesLauncher"
    # auto: all that trainer.accelerator means here; a count; or a list, such as [0,1].
    devices: Any = "auto"
    # After more failed trials than this no other is started; null: the others all run.
    max_failures: int | None = None
    # How often a trial that crashed is started again, from its last checkpoint if it has one.
    retries: int = 0


ConfigStore.instance().store(
    group="hydra/launcher", name="devices", node=DevicesLauncherConf, provider="dpo_lightning"
)


class DevicesLauncher(Launcher):
    """Runs each trial as `python train.py …` in Hydra's RUN mode.

    Args:
        devices: ``auto``, a count or a list.
        max_failures: After more failed trials than this no other is started.
        retries: How often a trial that crashed is started again.
    """

    def __init__(self, devices: Any, max_failures: int | None, retries: int) -> None:
        self.devices = devices
        self.max_failures = max_failures
        self.retries = retries

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Takes what Hydra gives every launcher."""
        self._context = hydra_context
        self._task = task_function
        self._config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs a batch of trials; every one of them is composed and checked before the first.

        Returns:
            A result for each; its value is the metric that the report ranks by, None for a trial
            that did not finish.
        """
        from dpo_lightning.sweeps.launch import launch

        return launch(
            self._context,
            self._config,
            self._task,
            job_overrides,
            first=initial_job_idx,
            devices=self.devices,
            max_failures=self.max_failures,
            retries=self.retries,
        )
