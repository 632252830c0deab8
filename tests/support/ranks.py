"""Runs on two processes of this machine."""

import datetime
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.runs import Run
from tests.support.warm import run_apart

# Far more than any rank takes: who waits longer waits for a rank that will never come.
LIMIT = 60


def launch(folder: Path, *overrides: str) -> Run:
    """A run to its end; the second rank is started by the first one."""
    done = run_apart(
        *(f"hydra.run.dir={folder}", "logger=none", "trainer.accelerator=cpu"),
        *("trainer.threads=1", "evaluation.samples=0", *overrides),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(done.returncode, folder)


def on_ranks(function: Callable[..., Any], folder: Path, *arguments: Any, count: int = 2) -> list:
    """What a function gives on each rank of a process group, in forks of this process.

    Forks save the imports. A rank that raises, or that waits in vain for another, fails the test.

    Args:
        function: Takes the rank and the arguments; what it gives is pickled.
        folder: An empty one of the test's.
        *arguments: What else it takes.
        count: Ranks.
    """
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_be_rank, args=(rank, count, folder, function, arguments))
        for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(2 * LIMIT)
    late = [number for number, rank in enumerate(ranks) if rank.exitcode is None]
    for number in late:
        ranks[number].kill()
        ranks[number].join()
    said = [path.read_text() for path in sorted(folder.glob("rank-*.txt"))]
    assert not late, (late, said)
    assert [rank.exitcode for rank in ranks] == [0] * count, "\n".join(said)
    return [pickle.loads((folder / f"rank-{n}.pkl").read_bytes()) for n in range(count)]


def _be_rank(rank: int, count: int, folder: Path, function: Callable[..., Any], arguments) -> None:
    import torch

    # As every fork of a process that has threads of OpenMP: they are not there any more.
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(count)}
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=count,
            timeout=datetime.timedelta(seconds=LIMIT),
        )
        found = function(rank, *arguments)
        (folder / f"rank-{rank}.pkl").write_bytes(pickle.dumps(found))
        torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"rank-{rank}.txt").write_text(traceback.format_exc())
        raise
