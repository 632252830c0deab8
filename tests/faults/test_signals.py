"""Twenty runs that are stopped at random steps, by one process or two, and then go on."""

import os
import random
import signal

import pytest

from tests.support.runs import run_train
from tests.support.signals import (
    LONG,
    SMALL,
    TWO,
    assert_same_weights,
    ended,
    ranks_of,
    start,
    wait_for_step,
)

pytestmark = pytest.mark.faults

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = run_train(tmp_path_factory.mktemp("whole") / "run", *SMALL, *LONG)
    assert run.code == 0
    return run


@pytest.mark.parametrize("repetition", range(10))
@pytest.mark.parametrize("ranks", [1, 2])
def test_signals_at_random_steps(whole, tmp_path, ranks: int, repetition: int):
    """Signals go to one rank, the other, or the whole group, as a terminal sends them."""
    seed = random.randrange(10_000)
    moments = random.Random(seed)
    signum = moments.choice(list(CODES))
    folder = tmp_path / "run"
    process = start(folder, *SMALL, *LONG, *(TWO if ranks == 2 else ()))
    wait_for_step(folder, process, moments.randrange(1, 150))
    target = moments.choice(["group", *range(ranks)])
    if target == "group":
        os.killpg(process.pid, signum)
    else:
        os.kill(ranks_of(process)[target], signum)
    run = ended(folder, process)
    said = f"seed {seed}, {target}, {folder.with_suffix('.log').read_text()}"
    assert run.code == CODES[signum], said
    assert run.result["status"] == "stopped", said
    assert (folder / "checkpoints" / f"step-{run.result['step']:06d}.ckpt").exists(), said
    resumed = run_train(folder, *SMALL, *LONG, "resume=auto")
    assert resumed.code == 0, said
    assert_same_weights(whole, resumed, exact=ranks == 1)
