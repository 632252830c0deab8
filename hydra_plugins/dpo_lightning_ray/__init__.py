"""The Hydra launcher `ray`: every trial of a sweep is a Ray task that runs it as a process.

As every plugin of Hydra's it is imported at every start, and imports nothing that costs time.
"""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from dpo_lightning.sweeps import launcher


@dataclass
class RayLauncherConf:
    """``hydra.launcher``: which Ray cluster runs the trials, and what happens when one fails."""

    _target_: str = "hydra_plugins.dpo_lightning_ray.RayLauncher"
    # auto (or null): the cluster of RAY_ADDRESS or one that runs here, else one is started for the
    # sweep; local starts one; else the address of one, such as 10.0.0.1:6379 or ray://head:10001.
    address: str | None = "auto"
    # CPU cores that each device of a trial takes of its node.
    cpus_per_device: int = 1
    # How often Ray starts a trial again, elsewhere, whose node was lost.
    node_retries: int = 3
    # Tasks that are with Ray at once; null: all of them.
    max_parallel: int | None = None
    # After more failed trials than this no other is started; null: the others all run.
    max_failures: int | None = None
    # How often a trial that crashed is started again, from its last checkpoint if it has one.
    retries: int = 0


ConfigStore.instance().store(
    group="hydra/launcher", name="ray", node=RayLauncherConf, provider="dpo_lightning"
)


class RayLauncher(launcher.TrialLauncher):
    """Trials as tasks of Ray."""
