"""The Hydra launcher `slurm`: every trial of a sweep is a SLURM job, submitted by submitit.

As every plugin of Hydra's it is imported at every start, and imports nothing that costs time.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from dpo_lightning.sweeps import launcher


@dataclass
class SlurmLauncherConf:
    """``hydra.launcher``: what each trial's job asks for, and what happens when one fails."""

    _target_: str = "hydra_plugins.dpo_lightning_slurm.SlurmLauncher"
    # local runs the jobs as processes of this machine, one after the other, to try things out.
    cluster: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    # Time limit of a job; a trial that needs longer goes on in the next one.
    timeout_min: int = 60
    # How long before the limit a trial is told to save itself.
    signal_delay_s: int = 90
    # How often a trial that reached its limit is queued again.
    max_timeouts: int = 3
    # CPU cores of each device's process, and memory of a node; null: what the cluster gives.
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    # GPUs of each node; null: trainer.devices, none where trainer.accelerator=cpu.
    gpus_per_node: int | None = None
    # Shell commands before the trial, such as [module load cuda].
    setup: list[str] = field(default_factory=list)
    # Other options of sbatch by their long names, such as {reservation: mine, exclusive: true}.
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    # Jobs that are in the queue at once; null: all of them (with cluster=local one).
    max_parallel: int | None = None
    # After more failed trials than this no other is started; null: the others all run.
    max_failures: int | None = None
    # How often a trial that crashed is started again, from its last checkpoint if it has one.
    retries: int = 0


_node = OmegaConf.structured(SlurmLauncherConf)
# Hydra closes the whole tree; the options of sbatch are the user's.
OmegaConf.set_struct(_node.additional_parameters, False)
ConfigStore.instance().store(
    group="hydra/launcher", name="slurm", node=_node, provider="dpo_lightning"
)


class SlurmLauncher(launcher.TrialLauncher):
    """Trials as SLURM jobs."""
