"""Direct Preference Optimization experiments on Lightning and Hydra.

Importing this package imports nothing heavy: the command line answers before torch is loaded.
"""

import importlib
import sys
import time
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

STARTED = time.perf_counter()
"""When the program began, for the wall time of the whole process."""

# Modules by the names that they had before: files of users may still say them. Each is the module
# itself, under both names. The list is closed; what is new is not added to it.
MOVED = {
    "assembly": "run.build",
    "budget": "memory.budget",
    "callbacks": "tracking.progress",
    "checkpoint_io": "training.checkpoints.writer",
    "checkpointed": "training.module_state",
    "checkpoints": "training.checkpoints.files",
    "computation": "training.precision",
    "conclusion": "run.conclude",
    "config": "settings.schema",
    "consistency": "settings.combinations",
    "credentials": "settings.credentials",
    "data.module": "data.datamodule",
    "data.prepare": "data.splits",
    "display": "tracking.display",
    "divergence": "training.divergence",
    "exact_curve": "evaluation.exact",
    "experiment": "run.session",
    "export": "run.export",
    "fingerprint": "settings.fingerprint",
    "folders": "settings.folders",
    "footprint": "memory.footprint",
    "header": "run.header",
    "hydra_node": "settings.hydra_node",
    "lifeline": "processes.lifeline",
    "loggers": "tracking.loggers",
    "models.setup": "models.source",
    "module": "training.module",
    "objective_settings": "settings.loss_group",
    "optimizers": "training.optimizers",
    "out_of_memory": "memory.exhausted",
    "overrides": "settings.overrides",
    "partition_check": "evaluation.partition_check",
    "preemption": "training.preemption",
    "prepared": "run.prepare",
    "ranks": "training.ranks",
    "reference_cache": "reference.cache",
    "results": "files",
    "resume": "training.checkpoints.exact_resume",
    "same_model": "reference.same_model",
    "sampling": "evaluation.sampling",
    "schedule": "training.schedule",
    "scorers": "evaluation.scorers",
    "session": "run.session",
    "signals": "processes.signals",
    "strategies": "training.strategies",
    "sweeps.claims": "sweeps.places.claims",
    "sweeps.leases": "sweeps.places.leases",
    "sweeps.local_processes": "sweeps.places.local",
    "sweeps.processes": "processes.groups",
    "sweeps.ray_tasks": "sweeps.places.ray_tasks",
    "sweeps.report_analysis": "sweeps.report.analysis",
    "sweeps.report_content": "sweeps.report.content",
    "sweeps.report_figures": "sweeps.report.figures",
    "sweeps.report_pooling": "sweeps.report.pooling",
    "sweeps.report_text": "sweeps.report.text",
    "sweeps.results": "sweeps.report.read",
    "sweeps.runner": "sweeps.places.runner",
    "sweeps.slurm_jobs": "sweeps.places.slurm_jobs",
    "sweeps.slurm_queue": "sweeps.places.slurm_queue",
    "sweeps.slurm_site": "sweeps.places.slurm_site",
    "sweeps.statistics": "sweeps.report.statistics",
    "terminal": "tracking.terminal",
    "validation": "settings.validation",
    "wandb_runs": "tracking.wandb_runs",
}
"""Old names and where each is now, below the package."""

_PACKAGE = f"{__name__}."


def name_now(name: str) -> str | None:
    """Present name of a module, or of a name in one; None if the given name is not an old one.

    Args:
        name: In full, such as ``dpo_lightning.terminal`` or ``dpo_lightning.terminal.LogFile``.
    """
    if not name.startswith(_PACKAGE):
        return None
    parts = name.removeprefix(_PACKAGE).split(".")
    for end in range(len(parts), 0, -1):
        new = MOVED.get(".".join(parts[:end]))
        if new is not None:
            return _PACKAGE + ".".join([new, *parts[end:]])
    return None


class MovedFinder(MetaPathFinder, Loader):
    """Finds the modules of the list by their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for an old name, and for no other."""
        is_old = fullname.startswith(_PACKAGE) and fullname.removeprefix(_PACKAGE) in MOVED
        return ModuleSpec(fullname, self) if is_old else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's own will do: it is not what comes out."""

    def exec_module(self, module: ModuleType) -> None:
        """Puts the module itself in the place of what was made for the old name."""
        name = module.__name__
        sys.modules[name] = importlib.import_module(_PACKAGE + MOVED[name.removeprefix(_PACKAGE)])


def find_moved() -> None:
    """Lets Python find them, ahead of a tree installed elsewhere that has files of these names."""
    if not any(type(finder) is MovedFinder for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedFinder())


find_moved()
