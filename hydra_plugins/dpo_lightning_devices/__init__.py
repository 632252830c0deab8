"""The Hydra launcher `devices`: every trial of a sweep is a process of its own on leased devices.

Hydra finds launchers in the namespace `hydra_plugins` alone. It imports this file at every start,
so what costs time is imported when a sweep begins. It runs this file before Python knows the module
by its name, which is why annotations are not put off here: dataclasses would look for them there.
"""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore

from dpo_lightning.sweeps import launcher


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
    # Trials on one GPU at a time. auto: as many as fit by the estimate of their memory, up to 4.
    trials_per_device: Any = "auto"


ConfigStore.instance().store(
    group="hydra/launcher", name="devices", node=DevicesLauncherConf, provider="dpo_lightning"
)


class DevicesLauncher(launcher.TrialLauncher):
    """Trials on devices of this machine."""
