"""Runs on two processes of this machine, and functions on the ranks of a process group."""

import datetime
import importlib
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.runs import Run
from tests.support.warm import ROOT, Order, own_environment, run_apart, warm_process

# Far more than any rank takes: who waits longer waits for a rank that will never come.
LIMIT = 60


def launch(folder: Path, *overrides: str) -> Run:
    """Runs a command to its end; the second rank is started by the first one."""
    done = run_apart(
        *(f"hydra.run.dir={folder}", "logger=none", "trainer.accelerator=cpu"),
        *("trainer.threads=1", "evaluation.samples=0", *overrides),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(done.returncode, folder)


def on_ranks(
    function: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2
) -> list[Any]:
    """Calls a function on each rank of a process group, in forks of the warm process.

    A rank that raises, or that waits in vain for another, fails the test.

    Args:
        function: Of a module's top; takes the rank and the arguments; what it gives is pickled.
        folder: An empty one of the test's.
        *arguments: Its further arguments; pickled.
        count: Ranks.
    """
    (folder / "arguments.pkl").write_bytes(pickle.dumps(arguments))
    ranks = []
    for rank in range(count):
        numbers = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(count)}
        order = Order(
            argv=["rank", str(folder), f"{function.__module__}:{function.__name__}"],
            environment=own_environment() | numbers,
            cwd=str(ROOT),
            session=False,
            target="tests.support.ranks:be_rank",
            path=[],
        )
        ranks.append(warm_process().start(order, 1, 2))
    codes: dict[int, int | None] = dict.fromkeys(ranks)
    deadline = time.monotonic() + 2 * LIMIT
    while None in codes.values() and time.monotonic() < deadline:
        codes |= {pid: warm_process().code_of(pid) for pid, code in codes.items() if code is None}
        time.sleep(0.01)
    for pid in (pid for pid, code in codes.items() if code is None):
        os.kill(pid, 9)
    said = "\n".join(path.read_text() for path in sorted(folder.glob("rank-*.txt")))
    assert [*codes.values()] == [0] * count, f"{codes}\n{said}"
    return [pickle.loads((folder / f"rank-{n}.pkl").read_bytes()) for n in range(count)]


def be_rank() -> int:
    """The program of a rank: its folder and its function are its arguments."""
    import torch

    folder, function = Path(sys.argv[1]), sys.argv[2]
    rank, count = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=count,
            timeout=datetime.timedelta(seconds=LIMIT),
        )
        module, _, name = function.partition(":")
        arguments = pickle.loads((folder / "arguments.pkl").read_bytes())
        found = getattr(importlib.import_module(module), name)(rank, *arguments)
        (folder / f"rank-{rank}.pkl").write_bytes(pickle.dumps(found))
        torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"rank-{rank}.txt").write_text(traceback.format_exc())
        raise
    return 0
