"""Batches on their way: whole, in one buffer, pinned; and no process is left behind."""

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
from lightning.fabric.utilities.apply_func import move_data_to_device

from dpo_lightning.data.datamodule import PreferenceDataModule, _TrainSteps, begin_worker
from dpo_lightning.data.packing import GroupBatch, StepBatch, make_step_batch
from dpo_lightning.data.transit import taken_apart
from dpo_lightning.models import scoring
from dpo_lightning.models.attention import AttentionPlan
from dpo_lightning.models.kernel import HeadShape, Kernel
from dpo_lightning.models.rope import RopeLengths
from dpo_lightning.models.scoring import Scorer
from tests.support.batches import random_groups
from tests.support.runs import ROOT
from tests.support.waiting import until


def step(
    groups: int = 40, *, rank: int = 0, world_size: int = 1, gathers: Any = "buckets"
) -> StepBatch:
    return make_step_batch(
        random_groups(groups), range(groups), rank=rank, world_size=world_size,
        micro_batch_tokens=32, shared=True, equal_counts=world_size > 1, gathers=gathers,
    )  # fmt: skip


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor of nested dataclasses and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    return [t for item in value for t in tensors(item)] if isinstance(value, tuple) else []


def storages(value: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(value)}


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


EACH = [step(), step(1), step(1, rank=1, world_size=3), step(gathers="sequences")]


@pytest.mark.parametrize("batch", EACH)
def test_a_step_arrives_as_it_was_in_one_tensor(batch: StepBatch):
    assert len(batch.micro_batches) > 0
    assert len(storages(batch)) > 15
    arrived, through = sent(batch)
    assert same(batch, arrived)
    assert through == 1
    assert len(storages(arrived)) == 1


def test_a_step_without_groups_arrives():
    batch = make_step_batch(
        random_groups(1), [0], rank=1, world_size=2, micro_batch_tokens=32, shared=True
    )
    assert batch.micro_batches == ()
    assert same(sent(batch)[0], batch)
    assert batch.to("meta") is batch


def test_what_arrived_has_memory_of_its_own():
    """Else the memory that both processes share would live as long as the batch."""
    receive, (left, buffer) = step().__reduce__()
    assert not storages(receive(left, buffer)) & storages(buffer)


@pytest.mark.parametrize("batch", EACH)
def test_tensors_begin_where_any_kernel_may_read_them(batch: StepBatch):
    arrived, _ = sent(batch)
    for tensor in tensors(arrived):
        assert tensor.is_contiguous()
        assert tensor.storage_offset() * tensor.element_size() % 64 == 0


def test_a_part_takes_its_own_part_along():
    """The second micro-batch of a packed step: its own bytes, and no copy of them."""
    arrived, _ = sent(step())
    micro = arrived.micro_batches[1]
    _, buffer = taken_apart(micro)
    assert storages(buffer) == storages(arrived)
    sizes = [-(-t.numel() * t.element_size() // 64) * 64 for t in tensors(micro)]
    assert len(buffer) <= sum(sizes)
    assert same(sent(micro)[0], micro)


def test_what_is_put_in_later_is_sent_along():
    """A packed step with a tensor of another place: the buffer is made anew."""
    arrived, _ = sent(step(1))
    [micro] = arrived.micro_batches
    other = dataclasses.replace(micro, weight=micro.weight * 3)
    again, through = sent(dataclasses.replace(arrived, micro_batches=(other,)))
    assert through == 1
    assert again.micro_batches[0].weight.tolist() == other.weight.tolist()


# Pinned memory and devices ------------------------------------------------------------------------


class Copies:
    """Stand-ins for pinned memory, which needs a GPU, and the copies out of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pinned: set[int] = set()
        self.made: list[tuple[bool, bool]] = []
        real = torch.Tensor.to

        def pin(tensor: torch.Tensor) -> torch.Tensor:
            copy = tensor.clone()
            self.pinned.add(copy.untyped_storage().data_ptr())
            return copy

        def is_pinned(tensor: torch.Tensor) -> bool:
            return tensor.untyped_storage().data_ptr() in self.pinned

        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if args and str(args[0]).startswith("meta"):
                self.made.append((is_pinned(tensor), kwargs.get("non_blocking", False)))
            return real(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
        monkeypatch.setattr(torch.Tensor, "is_pinned", is_pinned)
        monkeypatch.setattr(torch.Tensor, "to", to)


@pytest.mark.parametrize("batch", EACH)
def test_a_step_is_pinned_once_and_copied_once_without_waiting(monkeypatch, batch: StepBatch):
    copies = Copies(monkeypatch)
    pinned = batch.pin_memory()
    assert len(copies.pinned) == 1
    assert storages(pinned) == copies.pinned
    assert same(pinned, batch)
    moved = move_data_to_device(pinned, torch.device("meta"))
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert copies.made == [(True, True)]


def test_what_is_not_pinned_is_waited_for(monkeypatch):
    """Its memory may be changed or freed as soon as the call returns."""
    copies = Copies(monkeypatch)
    step().to("meta")
    assert copies.made == [(False, False)]
    step().to("meta", non_blocking=True)
    assert copies.made[1] == (False, True)


def test_a_step_that_is_there_stays_as_it_is():
    batch = step()
    assert batch.to("cpu") is batch
    assert batch.to(torch.device("cpu")) is batch


def test_the_loader_pins_what_is_for_a_gpu(monkeypatch):
    copies = Copies(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    data = data_module(pinned=True)
    batch = next(iter(data.train_dataloader()))
    assert storages(batch) <= copies.pinned
    copies.pinned.clear()
    assert not storages(next(iter(data_module().train_dataloader()))) & copies.pinned


# What attention takes -----------------------------------------------------------------------------


def test_buckets_and_sequences_travel_only_where_they_are_used():
    """A group [P | y1 | y2] has three sequences; their tensors beside the others of a group."""
    [buckets] = step(1).micro_batches
    [sequences] = step(1, gathers="sequences").micro_batches
    [neither] = step(1, gathers="none").micro_batches
    common = len(tensors(neither))
    assert len(tensors(sequences)) == common + 3  # keys, and two ends
    assert len(tensors(buckets)) == common + 4 * len(buckets.buckets) + 1
    assert (buckets.sequences, sequences.bucketed) == (None, None)
    for micro in (sequences, neither):
        assert same(micro.in_buckets(), buckets.bucketed), "made when they are asked for"


KERNEL = Kernel({}, supposed=True)


@pytest.mark.parametrize("kernel", [KERNEL, None])
def test_a_plan_takes_what_the_batch_brings_and_makes_nothing(monkeypatch, kernel: Kernel | None):
    [micro] = step(1, gathers="buckets" if kernel is None else "sequences").micro_batches
    made: list[GroupBatch] = []
    monkeypatch.setattr(GroupBatch, "in_buckets", made.append)
    plan = AttentionPlan(micro, kernel=kernel)
    assert plan.sequences is micro.sequences
    if kernel is None:
        assert plan.buckets is micro.bucketed.buckets
        assert plan.inverse is micro.bucketed.inverse
    assert not made


def test_a_plan_makes_buckets_when_a_layer_asks_and_once():
    [micro] = step(1, gathers="sequences").micro_batches
    plan = AttentionPlan(micro, kernel=KERNEL)
    assert plan.buckets is plan.buckets
    assert same(plan.bucketed, step(1).micro_batches[0].bucketed)


@pytest.mark.parametrize(
    ("path", "sizes", "lengths", "gathers"),
    [
        ("flat", (), RopeLengths(), "buckets"),
        ("flat", (512,), RopeLengths(), "buckets"),
        ("flat", (64,), RopeLengths(), "sequences"),
        # As in Gemma 4: the kernel takes the one kind of layer, and not the other.
        ("flat", (64, 512), RopeLengths(), "both"),
        ("padded", (64,), RopeLengths(), "none"),
        ("flat", (64,), RopeLengths(steps=(8,)), "none"),
    ],
)
def test_a_scorer_says_what_batches_bring_for_it(monkeypatch, path, sizes, lengths, gathers):
    """With a kernel that is right where it may be used."""
    monkeypatch.setattr(scoring, "varlen_fault", lambda *_: None)
    scorer = Scorer(path, lengths, {HeadShape(4, 2, size, size): 3 for size in sizes})
    scorer.choose_kernel(torch.device("meta"), torch.bfloat16)
    assert scorer.gathers == gathers
    [both] = step(1, gathers="both").micro_batches
    assert None not in (both.bucketed, both.sequences)


# Workers ----------------------------------------------------------------------------------------


def data_module(**options: Any) -> PreferenceDataModule:
    values: dict[str, Any] = {"num_workers": 0, "total_steps": 2} | options
    data = PreferenceDataModule(
        train_groups=random_groups(40), eval_groups=random_groups(2), batch_size=20,
        micro_batch_tokens=32, seed=1, shared=True, **values,
    )  # fmt: skip
    data.trainer = dataclasses.make_dataclass("Trainer", ["global_step", "global_rank"])(0, 0)
    data.trainer.world_size = 1
    return data


def test_a_loader_makes_such_workers():
    data = data_module()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert loader.worker_init_fn.func is begin_worker
        assert loader.worker_init_fn.keywords == {"parent": os.getpid()}


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


class Counting(_TrainSteps):
    """Steps that bring along how many files their worker has open."""

    def __getitem__(self, step: int) -> StepBatch:
        return dataclasses.replace(super().__getitem__(step), tokens=open_files())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_the_open_files_of_a_worker_and_its_trainer_stay_as_many(monkeypatch):
    """Twelve steps of more than ten micro-batches, the last three of which are kept."""
    monkeypatch.setattr("dpo_lightning.data.datamodule._TrainSteps", Counting)
    before = open_files()
    kept: list[StepBatch] = []
    here, there = [], []
    for batch in data_module(num_workers=1, total_steps=12).train_dataloader():
        assert len(batch.micro_batches) > 10
        kept = [*kept[-2:], batch]
        here.append(open_files())
        there.append(batch.tokens)
    assert len(here) == 12
    assert max(here[1:]) - min(here[1:]) <= 2
    # A worker is two steps ahead, and has more or fewer of them sent off; one file that stays
    # open of each step would be ten.
    assert max(there[1:]) - min(there[1:]) <= 6
    assert max(here) - before < 20


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
