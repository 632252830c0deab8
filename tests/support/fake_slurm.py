"""A SLURM of one machine, as far as submitit and the launcher use it: its commands, by their names.

`install` puts them into a folder for PATH. Jobs run at once; a job's state is a file below
FAKE_SLURM, so that tests may write one too, such as OUT_OF_MEMORY. Other files there say what
goes wrong:

- ``refuse``: sbatch takes no job. ``hold``: jobs wait for ever.
- ``no-accounts``: sacct fails. ``no-queue``: squeue fails. ``forgetful``: squeue no longer lists
  jobs that have ended, as some minutes later.
- ``sbatch``: what befalls the next submission, and the command that waits for its answer; one of
  the functions named ``sbatch_…``.
"""

import contextlib
import fcntl
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NAMES = ("sbatch", "srun", "scancel", "sacct", "scontrol", "squeue")
LIVE = ("PENDING", "RUNNING")


def install(folder: Path) -> dict[str, str]:
    """Makes the commands of SLURM; returns the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for name in NAMES:
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {name} "$@"\n')
        script.chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "FAKE_SLURM": str(folder)}


def here(name: str) -> Path:
    return Path(os.environ["FAKE_SLURM"]) / name


def job_folder(number: str) -> Path:
    return here("jobs") / number


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def set_state(folder: Path, state: str, *, only: tuple[str, ...] = ()) -> bool:
    """Sets the state of a job, if it is one of ``only``; returns True if it did."""
    with locked(folder):
        path = folder / "state"
        if only and path.read_text() not in only:
            return False
        staged = folder / "state.new"
        staged.write_text(state)
        staged.replace(path)
        return True


def jobs() -> dict[str, str]:
    found = sorted(here("jobs").glob("*/state"))
    return {path.parent.name: path.read_text() for path in found}


def options(number: str) -> dict[str, str]:
    """The options in a job's script."""
    lines = re.findall(r"^#SBATCH --(.*)$", (job_folder(number) / "script.sh").read_text(), re.M)
    return dict(shlex.split(line)[0].partition("=")[::2] for line in lines)


def cancel_all() -> None:
    """Ends the processes that a failed test has left."""
    for number in jobs():
        scancel(number)


# Commands ----------------------------------------------------------------------------------------


def sbatch(script: str) -> None:
    if here("refuse").exists():
        sys.exit("sbatch: error: Batch job submission failed: Invalid account")
    befalls = here("sbatch")
    if befalls.exists():
        name = befalls.read_text()
        befalls.unlink()
        globals()[f"sbatch_{name}"](lambda: queue(script))
    else:
        print(f"Submitted batch job {queue(script)}")


def queue(script: str) -> str:
    for number in map(str, itertools.count(1000)):
        folder = job_folder(number)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    (folder / "script.sh").write_text(Path(script).read_text())
    set_state(folder, "PENDING")
    if not here("hold").exists():
        subprocess.Popen(
            [sys.executable, "-S", __file__, "job", number], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    return number


def sbatch_dies_first(queue: Callable[[], str]) -> None:
    """Kills the command that called it, before anything is done."""
    os.kill(os.getppid(), signal.SIGKILL)


def sbatch_dies(queue: Callable[[], str]) -> None:
    """Kills the command that called it when the job is there, before it learns the number."""
    queue()
    os.kill(os.getppid(), signal.SIGKILL)


def sbatch_is_late(queue: Callable[[], str]) -> None:
    """Kills the command that called it; the job is in the queue some time later."""
    os.kill(os.getppid(), signal.SIGKILL)
    wait_for(here("go"))
    queue()


def sbatch_is_interrupted(queue: Callable[[], str]) -> None:
    """Sends Ctrl-C to the command that called it, before its answer arrives."""
    number = queue()
    os.kill(os.getppid(), signal.SIGINT)
    print(f"Submitted batch job {number}")


def sbatch_times_out(queue: Callable[[], str]) -> None:
    """Loses the answer; the job is there."""
    queue()
    sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")


def job(number: str) -> None:
    folder = job_folder(number)
    asked = options(number)
    for restarts in range(5):
        if not set_state(folder, "RUNNING", only=LIVE):
            return
        environment = os.environ | {
            "SLURM_JOB_ID": number,
            "SLURM_RESTART_COUNT": str(restarts),
            "SLURM_JOB_NAME": asked["job-name"],
            "SLURM_JOB_NUM_NODES": asked["nodes"],
            "SLURM_NNODES": asked["nodes"],
            "SLURM_NTASKS_PER_NODE": asked.get("ntasks-per-node", "1"),
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
    set_state(folder, "FAILED" if code else "COMPLETED", only=("RUNNING",))


def srun(*arguments: str) -> int:
    command = list(arguments)
    while command[0].startswith("--"):
        takes_value = command[0] in ("--output", "--error")
        command = command[2 if takes_value else 1 :]
    given = dict(pair for pair in itertools.pairwise(arguments) if pair[0].startswith("--"))
    per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
    count = per_node * int(os.environ["SLURM_NNODES"])
    tasks = []
    for rank in range(count):
        numbers = {"j": os.environ["SLURM_JOB_ID"], "t": str(rank)}

        def place(name: str, numbers: dict[str, str] = numbers) -> str:
            return re.sub("%([jt])", lambda found: numbers[found[1]], given[name])

        with open(place("--output"), "a") as out, open(place("--error"), "a") as err:  # noqa: PTH123
            environment = os.environ | {
                "SLURM_NTASKS": str(count), "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank % per_node), "SLURM_NODEID": str(rank // per_node),
            }  # fmt: skip
            tasks.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
    number = os.environ["SLURM_JOB_ID"]
    (job_folder(number) / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    if jobs()[number] != "RUNNING":  # cancelled while they were being started
        signal_tasks(number, signal.SIGTERM)
    return max(abs(task.wait()) for task in tasks)


def signal_tasks(number: str, signum: int) -> None:
    path = job_folder(number) / "tasks"
    for pid in path.read_text().split() if path.exists() else []:
        try:
            os.kill(int(pid), signum)
        except ProcessLookupError:
            continue


def scancel(number: str) -> None:
    with here("scancel-calls").open("a") as calls:
        calls.write(f"{number}\n")
    if set_state(job_folder(number), "CANCELLED by 1000", only=LIVE):
        signal_tasks(number, signal.SIGTERM)


def sacct(*arguments: str) -> None:
    if here("no-accounts").exists():
        sys.exit("sacct: error: Slurm accounting storage is disabled")
    print("JobID|State|NodeList")
    for number, state in jobs().items():
        print(f"{number}|{state}|localhost")
        print(f"{number}.batch|{state}|localhost")


def squeue(*arguments: str) -> None:
    with here("squeue-calls").open("a") as calls:
        calls.write(f"{' '.join(arguments)}\n")
    if here("no-queue").exists():
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    given = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
    ended_too = given.get("states") == "all" and not here("forgetful").exists()
    for number, state in jobs().items():
        if state in LIVE or ended_too:
            # "CANCELLED by 1000" is sacct's word.
            values = {"i": number, "T": state.split()[0], "j": options(number)["job-name"]}
            line = given["format"]
            for letter, value in values.items():
                line = line.replace(f"%{letter}", value)
            print(line)


def scontrol(verb: str, number: str) -> None:
    assert verb == "requeue"
    (job_folder(number) / "requeue").touch()


def wait_for(path: Path) -> str:
    """The text of a file, once it has one."""
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
    return path.read_text()


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
