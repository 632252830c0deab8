"""Sweeps of stand-ins through the SLURM launcher."""

from pathlib import Path
from typing import Any

from dpo_lightning.sweeps.dispatch import Dispatcher
from dpo_lightning.sweeps.places import Work
from dpo_lightning.sweeps.slurm_site import SlurmSite
from dpo_lightning.sweeps.trials import Plan, Trial, place_trials
from tests.support.trials import Silent, stand_in

DEFAULTS: dict[str, Any] = {
    "cluster": "slurm", "partition": None, "account": None, "qos": None, "constraint": None,
    "timeout_min": 60, "signal_delay_s": 90, "max_timeouts": 3, "cpus_per_task": None,
    "mem_gb": None, "gpus_per_node": None, "setup": [], "additional_parameters": {},
    "max_parallel": None, "max_failures": None, "retries": 0,
}  # fmt: skip


def site(**options) -> SlurmSite:
    return SlurmSite(**(DEFAULTS | options))


def run(
    folder: Path, plans: list[Plan], *, view: Silent | None = None, **options
) -> tuple[list[Trial], Silent]:
    sweep_dir = folder / "sweep"
    sweep_dir.mkdir(exist_ok=True)
    trials, view, where = place_trials(plans, sweep_dir), view or Silent(), site(**options)
    work = Work(plans, sweep_dir, stand_in(folder), {"OMP_NUM_THREADS": "1"})
    with where.open(work) as place:
        Dispatcher(
            trials,
            place=place,
            max_failures=where.max_failures,
            retries=where.retries,
            view=view,
        ).run()
    return trials, view
