"""The class that Hydra calls to run the trials of a sweep, with its imports put off until then."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class TrialLauncher(Launcher):
    """Runs each trial as `python -m dpo_lightning train …` in Hydra's RUN mode.

    Args:
        **options: ``hydra.launcher``, which is read where a sweep begins.
    """

    def __init__(self, **options: Any) -> None:
        pass

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

        return launch(self._context, self._config, self._task, job_overrides, first=initial_job_idx)
