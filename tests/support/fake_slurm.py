"""A SLURM of one machine, as far as submitit and the launcher use it: its commands, by their names.

`install` puts them into a folder for PATH. Jobs run at once; a job's state is a file below
FAKE_SLURM, so that tests may write one too, such as OUT_OF_MEMORY.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("sbatch", "srun", "scancel", "sacct", "scontrol", "squeue")


def install(folder: Path) -> dict[str, str]:
    """Makes the commands; returns the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for name in NAMES:
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        script.chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "FAKE_SLURM": str(folder)}


def job_folder(number: str) -> Path:
    return Path(os.environ["FAKE_SLURM"]) / "jobs" / number


def set_state(folder: Path, state: str) -> None:
    staged = folder / "state.new"
    staged.write_text(state)
    staged.replace(folder / "state")


def jobs() -> dict[str, str]:
    found = sorted((Path(os.environ["FAKE_SLURM"]) / "jobs").glob("*/state"))
    return {path.parent.name: path.read_text() for path in found}


def sbatch(script: str) -> None:
    if (Path(os.environ["FAKE_SLURM"]) / "refuse").exists():
        sys.exit("sbatch: error: Batch job submission failed: Invalid account")
    number = str(1000 + len(jobs()))
    folder = job_folder(number)
    folder.mkdir()
    (folder / "script.sh").write_text(Path(script).read_text())
    held = (Path(os.environ["FAKE_SLURM"]) / "hold").exists()
    set_state(folder, "PENDING")
    if not held:
        subprocess.Popen(
            [sys.executable, __file__, "job", number], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    print(f"Submitted batch job {number}")


def job(number: str) -> None:
    folder = job_folder(number)
    options = dict(
        re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", (folder / "script.sh").read_text(), flags=re.M)
    )
    for restarts in range(5):
        set_state(folder, "RUNNING")
        environment = os.environ | {
            "SLURM_JOB_ID": number,
            "SLURM_RESTART_COUNT": str(restarts),
            "SLURM_JOB_NAME": options["job-name"],
            "SLURM_JOB_NUM_NODES": options["nodes"],
            "SLURM_NNODES": options["nodes"],
            "SLURM_NTASKS_PER_NODE": options.get("ntasks-per-node", "1"),
            "SLURM_NODELIST": "localhost",
            "SLURM_JOB_NODELIST": "localhost",
        }
        with (folder / "batch.log").open("a") as log:
            code = subprocess.run(
                ["bash", str(folder / "script.sh")], env=environment, stdout=log, stderr=log
            ).returncode
        if not (folder / "requeue").exists():
            break
        (folder / "requeue").unlink()
    if (folder / "state").read_text() == "RUNNING":
        set_state(folder, "FAILED" if code else "COMPLETED")


def srun(*arguments: str) -> int:
    command = list(arguments)
    while command[0].startswith("--"):
        takes_value = command[0] in ("--output", "--error")
        command = command[2 if takes_value else 1 :]
    options = dict(pair for pair in itertools.pairwise(arguments) if pair[0].startswith("--"))
    per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
    count = per_node * int(os.environ["SLURM_NNODES"])
    tasks = []
    for rank in range(count):
        numbers = {"j": os.environ["SLURM_JOB_ID"], "t": str(rank)}

        def place(name: str, numbers: dict[str, str] = numbers) -> str:
            return re.sub("%([jt])", lambda found: numbers[found[1]], options[name])

        with open(place("--output"), "a") as out, open(place("--error"), "a") as err:  # noqa: PTH123
            environment = os.environ | {
                "SLURM_NTASKS": str(count), "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank % per_node), "SLURM_NODEID": str(rank // per_node),
            }  # fmt: skip
            tasks.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
    folder = job_folder(os.environ["SLURM_JOB_ID"])
    (folder / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    return max(abs(task.wait()) for task in tasks)


def signal_tasks(number: str, signum: int) -> None:
    path = job_folder(number) / "tasks"
    for pid in path.read_text().split() if path.exists() else []:
        try:
            os.kill(int(pid), signum)
        except ProcessLookupError:
            continue


def scancel(number: str) -> None:
    if jobs().get(number) in ("PENDING", "RUNNING"):
        set_state(job_folder(number), "CANCELLED by 1000")
        signal_tasks(number, signal.SIGTERM)


def sacct(*arguments: str) -> None:
    if (Path(os.environ["FAKE_SLURM"]) / "no-accounts").exists():
        sys.exit("sacct: error: Slurm accounting storage is disabled")
    print("JobID|State|NodeList")
    for number, state in jobs().items():
        print(f"{number}|{state}|localhost")
        print(f"{number}.batch|{state}|localhost")


def squeue(*arguments: str) -> None:
    for number, state in jobs().items():
        if state in ("PENDING", "RUNNING"):
            print(number, state)


def scontrol(verb: str, number: str) -> None:
    assert verb == "requeue"
    (job_folder(number) / "requeue").touch()


def wait_for(path: Path, seconds: float = 60) -> str:
    """The text of a file, once it has one."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
    return path.read_text()


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
