"""Trials of a sweep that are stand-ins: a line of Python each."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.sweeps.dispatch import Dispatcher
from dpo_lightning.sweeps.places.leases import DevicePool
from dpo_lightning.sweeps.places.local import open_local
from dpo_lightning.sweeps.places.warm_starts import WarmStarts
from dpo_lightning.sweeps.trials import Plan, Trial, place_trials
from tests.support.runs import ROOT

# Does what its last argument but two says, in the folder that it is given, and leaves its times.
STAND_IN = """
import json, os, pathlib, signal, subprocess, sys, time
sys.path.insert(0, {root!r})
from dpo_lightning.processes.lifeline import watch_lifeline
watch_lifeline()
*_, act, folder, mode = [a for a in sys.argv if not a.startswith("resume=")]
assert mode == "hydra.mode=RUN"
folder = pathlib.Path(folder.removeprefix("hydra.run.dir=").strip("'"))
begin = time.time()
def finish(status="finished"):
    times = dict(begin=begin, end=time.time(), threads=os.environ["OMP_NUM_THREADS"],
                 resumed="resume=auto" in sys.argv)
    result = dict(status=status, metrics=times, settings_hash=folder.name.ljust(32, "0"))
    (folder / "result.json").write_text(json.dumps(result))
exec(act)
"""


@dataclass
class Silent:
    """A view that shows nothing and remembers its calls."""

    said: list[tuple[str, str, bool]] = field(default_factory=list)

    def started(self, trial: Trial) -> None:
        self.said.append((trial.folder.name, ",".join(trial.devices), False))

    def ended(self, trial: Trial, *, again: bool) -> None:
        self.said.append((trial.folder.name, trial.status, again))

    def refresh(self) -> None:
        pass


def plan(name: str, act: str, *, width: int = 1, kind: DeviceKind = "cpu") -> Plan:
    return Plan(
        name=name,
        overrides=(name,),
        arguments=(act,),
        settings_hash=name.ljust(32, "0"),
        kind=kind,
        width=width,
        facts={"beta": 0.1, "loss": "sigmoid", "seed": 1, "command": "train"},
    )


def stand_in(folder: Path) -> tuple[str, ...]:
    """Words behind the interpreter that start one."""
    script = folder / "train.py"
    script.write_text(STAND_IN.format(root=str(ROOT)))
    return (str(script),)


def run(
    folder: Path, plans: list[Plan], *, slots: int = 2, **options
) -> tuple[list[Trial], Silent]:
    trials, view = place_trials(plans, folder), Silent()
    make_course = options.pop("course", None)
    course = None if make_course is None else make_course(folder, trials)
    settings = {"max_failures": None, "retries": 0, "environment": {}, "warm": None} | options
    pools: dict[DeviceKind, DevicePool] = {"cpu": DevicePool("cpu", [str(n) for n in range(slots)])}
    environment, warm = settings.pop("environment"), settings.pop("warm")
    with open_local(pools, stand_in(folder), environment, warm=warm) as place:
        Dispatcher(trials, place=place, view=view, course=course, **settings).run()
    return trials, view


def warm_stand_in(folder: Path, imports: str = "") -> tuple[WarmStarts, dict[str, str]]:
    """Starts of stand-ins that are forked, and the environment in which they are found.

    Args:
        folder: An empty one, or that of :func:`stand_in`.
        imports: Code that the warm process runs while it imports.
    """
    name = f"warm_{folder.name}".replace("-", "_")
    (folder / f"{name}.py").write_text(
        f"import runpy, sys\n{imports}\n"
        f"def main():\n    runpy.run_path({str(folder / 'train.py')!r}, run_name='__main__')\n"
    )
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return WarmStarts([name], f"{name}:main"), {"PYTHONPATH": path}
