"""Checkpoints that a thread writes: of the state as it was, in order, and no failure is lost."""

import errno
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_lightning.errors import StorageError
from dpo_lightning.training.checkpoints import background, writer
from dpo_lightning.training.checkpoints.background import on_host
from dpo_lightning.training.checkpoints.files import (
    checkpoint_path,
    find_damage,
    manifest_path,
    saved_checkpoints,
)
from dpo_lightning.training.checkpoints.writer import (
    WRITE_FAILED,
    Checkpoints,
    DurableCheckpointIO,
    is_saved,
    save_now,
)
from tests.support.recovery import differences, load
from tests.support.waiting import until


class Gate:
    """Holds a thread's writes back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.error: OSError | None = None
        self.threads: list[str] = []
        real = writer._Hashed.write

        def write(hashed: Any, data: Any) -> int:
            self.threads.append(threading.current_thread().name)
            if threading.current_thread() is not threading.main_thread():
                self.reached.set()
                assert self.opened.wait(30)
            if self.error is not None:
                hashed.error = self.error
                raise self.error
            return real(hashed, data)

        monkeypatch.setattr(writer._Hashed, "write", write)


class Training:
    """A trainer, as far as saving goes, whose state is one tensor that each step changes."""

    world_size, is_global_zero = 1, True

    def __init__(self, folder: Path, *, keep: int = 2, every: int = 1, last: bool = True) -> None:
        self.global_step = 0
        self.weight = torch.zeros(3000)
        self.checkpoint_io = DurableCheckpointIO({}, background=True)
        self.callback = Checkpoints(folder, every_n_steps=every, keep=keep, last=last)
        self.stop_signal = 0
        self.met: list[Any] = []

    @property
    def strategy(self) -> "Training":
        return self

    def broadcast(self, value: Any) -> Any:
        self.met.append(value)
        return value

    def save_checkpoint(self, path: Path) -> None:
        state = {"global_step": self.global_step, "state_dict": {"w": self.weight}}
        self.checkpoint_io.save_checkpoint(state, path)

    def step(self) -> None:
        self.global_step += 1
        self.weight += 1
        # What ranks agree about in a step.
        self.stop_signal = WRITE_FAILED if self.checkpoint_io.has_failed else 0
        self.callback.on_train_batch_end(self, self, None, None, 0)

    def end(self) -> None:
        self.callback.on_train_end(self, self)


@pytest.fixture
def gate(monkeypatch) -> Any:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def values(path: Path) -> list[float]:
    return load(path)["state_dict"]["w"].unique().tolist()


def test_steps_go_on_while_a_checkpoint_is_written_as_it_was(tmp_path, gate):
    training = Training(tmp_path, every=2)
    training.step()
    training.step()
    assert gate.reached.wait(30)
    training.step()
    path = checkpoint_path(tmp_path, 2)
    assert find_damage(path) is not None
    assert training.weight[0] == 3
    gate.opened.set()
    training.checkpoint_io.finish()
    assert find_damage(path) is None
    assert values(path) == [2]
    assert {*gate.threads} == {"checkpoint"}


def test_one_at_a_time_and_older_ones_go_in_order(tmp_path, gate):
    """The second save waits for the first; with keep=1 one is left, the last."""
    training = Training(tmp_path, keep=1)
    training.step()
    second = threading.Thread(target=training.step)
    second.start()
    assert gate.reached.wait(30)
    second.join(0.05)
    assert second.is_alive(), "two checkpoints were on their way at once"
    gate.opened.set()
    second.join(30)
    training.end()
    assert saved_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 2)]
    assert values(checkpoint_path(tmp_path, 2)) == [2]


def failing(training: Training, gate: Gate) -> None:
    """Lets the first save succeed and the second fail, as on a disk that fills meanwhile."""
    gate.opened.set()
    training.step()
    training.checkpoint_io.finish()
    gate.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    training.step()
    until(lambda: training.checkpoint_io.has_failed)


def check_first_is_left(tmp_path: Path) -> None:
    assert find_damage(checkpoint_path(tmp_path, 1)) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000001.ckpt",
        "step-000001.json",
    ]


def test_a_failure_comes_out_at_the_next_step(tmp_path, gate):
    training = Training(tmp_path)
    failing(training, gate)
    gate.error = None
    with pytest.raises(StorageError) as failure:
        training.step()
    assert "step-000002.ckpt: No space left" in str(failure.value)
    assert f"resume={checkpoint_path(tmp_path, 1)} resumes" in str(failure.value)
    check_first_is_left(tmp_path)


def test_a_failure_comes_out_at_the_end(tmp_path, gate):
    training = Training(tmp_path, last=False)
    failing(training, gate)
    with pytest.raises(StorageError, match=r"step-000002\.ckpt: No space left"):
        training.end()
    check_first_is_left(tmp_path)


def test_a_failure_on_several_ranks_comes_out_where_all_have_agreed(tmp_path, gate):
    """Rank 0 alone would leave the others waiting in the next step."""
    training = Training(tmp_path)
    training.world_size = 2
    failing(training, gate)
    training.met.clear()
    # It fails between the step's meeting and the hooks after it: nobody else knows yet.
    training.callback._every = None
    training.stop_signal = 0
    training.callback.on_train_batch_end(training, training, None, None, 0)
    assert training.met == []
    with pytest.raises(StorageError):
        training.step()
    [told] = training.met
    assert isinstance(told, StorageError)


def test_who_waits_for_a_checkpoint_has_it_and_no_copy_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "on_host", None)
    training = Training(tmp_path)
    save_now(training, checkpoint_path(tmp_path, 0))
    assert find_damage(checkpoint_path(tmp_path, 0)) is None


def test_the_end_waits_and_does_not_write_twice(tmp_path, gate):
    training = Training(tmp_path)
    training.step()
    assert gate.reached.wait(30)
    threading.Timer(0.05, gate.opened.set).start()
    training.end()
    assert find_damage(checkpoint_path(tmp_path, 1)) is None
    assert {*gate.threads} == {"checkpoint"}


def test_what_is_asked_for_while_it_is_written_is_waited_for(tmp_path, gate):
    """A signal that comes right after a save: the same step is not saved again."""
    training = Training(tmp_path)
    training.step()
    threading.Timer(0.05, gate.opened.set).start()
    assert is_saved(training, checkpoint_path(tmp_path, 1))
    assert not is_saved(training, checkpoint_path(tmp_path, 2))
    assert manifest_path(checkpoint_path(tmp_path, 1)).exists()


def test_whatever_ends_the_training_waits_and_says_what_failed(tmp_path, gate, caplog):
    training = Training(tmp_path)
    failing(training, gate)
    training.callback.on_exception(training, training, KeyboardInterrupt())
    assert "step-000002.ckpt: No space left" in caplog.text
    training.callback.on_exception(training, training, KeyboardInterrupt())
    assert len(caplog.records) == 1


def test_without_room_for_a_copy_the_training_waits_and_that_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(background, "_machine_bytes", lambda: 1 << 20)
    training = Training(tmp_path)
    training.step()
    assert find_damage(checkpoint_path(tmp_path, 1)) is None
    assert "written while the training waits" in caplog.text


# The copy ----------------------------------------------------------------------------------------


def test_a_copy_is_the_same_and_changes_no_more():
    torch.manual_seed(0)
    whole = torch.randn(40)
    named = OrderedDict(a=whole[:10], b=whole[10:].view(5, 6).t())
    named._metadata = {"": {"version": 1}}
    state = {
        "state_dict": named,
        "tied": whole,
        "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "rest": [1.5, None, (torch.tensor(3), "x"), {}],
    }
    copied = on_host(state)
    assert differences(copied["rest"], state["rest"]) == []
    assert type(copied["parameter"]) is torch.nn.Parameter
    assert copied["state_dict"]._metadata == named._metadata
    before = named["b"].clone()
    assert copied["state_dict"]["b"].stride() == (1, 6)
    whole += 1
    assert torch.equal(copied["state_dict"]["b"], before)
    # What shares memory does so in the copy, and so in the file.
    names = ("a", "b")
    shared = {copied["state_dict"][name].untyped_storage().data_ptr() for name in names}
    assert shared == {copied["tied"].untyped_storage().data_ptr()}
    assert shared != {whole.untyped_storage().data_ptr()}


def test_a_file_is_the_same_whoever_writes_it(tmp_path):
    training = Training(tmp_path / "thread")
    training.step()
    training.end()
    state = {"global_step": 1, "state_dict": {"w": torch.ones(3000)}}
    plain = checkpoint_path(tmp_path / "plain", 1)
    DurableCheckpointIO({}).save_checkpoint(state, plain)
    assert checkpoint_path(tmp_path / "thread", 1).read_bytes() == plain.read_bytes()
