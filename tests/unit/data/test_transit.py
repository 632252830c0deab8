"""Batches that come from another process: whole, in few tensors, and no process is left behind."""

import ctypes
import dataclasses
import io
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_lightning.data.datamodule import PreferenceDataModule, begin_worker
from dpo_lightning.data.packing import StepBatch, make_step_batch
from dpo_lightning.data.transit import put_together, taken_apart
from tests.support.batches import random_groups
from tests.support.runs import ROOT
from tests.support.waiting import until


def step(groups: int = 40, *, rank: int = 0, world_size: int = 1) -> StepBatch:
    return make_step_batch(
        random_groups(groups), range(groups), rank=rank, world_size=world_size,
        micro_batch_tokens=32, shared=True, equal_counts=world_size > 1,
    )  # fmt: skip


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if dataclasses.is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)
        )
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def sent(batch: StepBatch) -> tuple[StepBatch, int]:
    """The batch as it arrives, and the tensors that went through the queue."""
    through = []

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                through.append(value)
            return NotImplemented

    file = io.BytesIO()
    Pickler(file).dump(batch)
    return pickle.loads(file.getvalue()), len(through)


@pytest.mark.parametrize("batch", [step(), step(1), step(1, rank=1, world_size=3)])
def test_a_step_arrives_as_it_was_in_a_tensor_for_each_type(batch: StepBatch):
    assert len(batch.micro_batches) > 0
    arrived, tensors = sent(batch)
    assert same(batch, arrived)
    assert tensors == 3  # whole numbers of two sizes, and float32


def test_a_step_without_groups_arrives():
    batch = make_step_batch(
        random_groups(1), [0], rank=1, world_size=2, micro_batch_tokens=32, shared=True
    )
    assert batch.micro_batches == ()
    assert same(sent(batch)[0], batch)


def test_what_arrived_has_memory_of_its_own():
    """Else the memory that both processes share would live as long as the batch."""
    left, buffers = taken_apart(step())
    arrived = put_together(left, buffers)
    shared = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    own = {
        getattr(micro, field.name).untyped_storage().data_ptr()
        for micro in arrived.micro_batches
        for field in dataclasses.fields(micro)
        if isinstance(getattr(micro, field.name), torch.Tensor)
    }
    assert not shared & own


# Workers ----------------------------------------------------------------------------------------


def test_a_loader_makes_such_workers():
    data = PreferenceDataModule(
        train_groups=random_groups(2), eval_groups=random_groups(2), batch_size=1,
        micro_batch_tokens=64, total_steps=2, seed=1, shared=True, num_workers=0,
    )  # fmt: skip
    data.trainer = dataclasses.make_dataclass("Trainer", ["global_step", "global_rank"])(0, 0)
    data.trainer.world_size = 1
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert loader.worker_init_fn.func is begin_worker
        assert loader.worker_init_fn.keywords == {"parent": os.getpid()}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")
def test_a_worker_is_ended_by_the_system_and_by_nobody_else():
    code = (
        "import ctypes, os, signal, sys\n"
        "from dpo_lightning.processes.lifeline import end_with\n"
        "end_with(os.getppid())\n"
        "found = ctypes.c_int()\n"
        "ctypes.CDLL(None).prctl(2, ctypes.byref(found), 0, 0, 0)\n"
        "sys.exit(found.value)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == signal.SIGKILL
    assert ctypes.CDLL(None).prctl(2, ctypes.byref(found := ctypes.c_int()), 0, 0, 0) == 0
    assert found.value == 0, "the trainer itself is not to die with its parent"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
@pytest.mark.parametrize("by_system", [True, False])
def test_a_worker_ends_with_a_trainer_that_was_killed(by_system):
    """Also where the system does not do it, and where the trainer was gone before."""
    code = (
        "import os, sys, time\n"
        "from dpo_lightning.processes import lifeline\n"
        "lifeline._POLL_SECONDS = 0.01\n"
        f"if not {by_system}: lifeline._die_with_parent = lambda: None\n"
        "trainer = os.getpid()\n"
        "if os.fork() == 0:\n"
        "    lifeline.end_with(trainer)\n"
        "    print(os.getpid(), flush=True)\n"
        "time.sleep(600)\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    worker = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()

    def gone() -> bool:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return True
        return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    until(gone)
