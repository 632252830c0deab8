"""The writer of checkpoints: durable, or the old one and one line; and its refusals to load."""

import enum
import errno
import os
import pickle
import shutil
from collections import Counter, OrderedDict, defaultdict, namedtuple
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_lightning.errors import CorruptArtifactError, StorageError, UserError
from dpo_lightning.training.checkpoints.files import (
    checkpoint_path,
    find_damage,
    manifest_path,
    read_manifest,
)
from dpo_lightning.training.checkpoints.writer import Checkpoints, DurableCheckpointIO, save_now
from tests.support.recovery import differences


def state(step: int = 4) -> dict:
    torch.manual_seed(step)
    return {"global_step": step, "state_dict": {"w": torch.randn(3000)}, "rest": [1.5, None, (2,)]}


def save(folder: Path, step: int = 4) -> Path:
    path = checkpoint_path(folder, step)
    DurableCheckpointIO({"identity": {}}).save_checkpoint(state(step), path)
    return path


def test_what_is_saved_is_whole_and_comes_back(tmp_path):
    path = save(tmp_path / "new" / "folder")
    assert find_damage(path) is None
    assert read_manifest(path)["step"] == 4
    assert differences(DurableCheckpointIO({}).load_checkpoint(path), state()) == []


def test_a_checkpoint_is_mapped_and_its_file_stays_as_it_is(tmp_path):
    """Whoever reads a part of a large one has that part in memory; what is changed is a copy."""
    path = save(tmp_path)
    loaded = DurableCheckpointIO({}).load_checkpoint(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    loaded["state_dict"]["w"].zero_()
    assert find_damage(path) is None
    again = DurableCheckpointIO({}).load_checkpoint(path)
    path.unlink()
    assert torch.equal(again["state_dict"]["w"], state()["state_dict"]["w"])


def test_the_file_is_beside_its_target_and_synced_before_it_is_renamed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/nowhere")
    calls = []
    real_fsync, real_replace = os.fsync, Path.replace

    def spy_fsync(handle):
        target = Path(f"/proc/self/fd/{handle}").readlink()
        size = target.stat().st_size
        calls.append(("sync", "folder" if target == tmp_path else target.suffixes[0], size > 12000))
        real_fsync(handle)

    def spy_replace(self, target):
        assert self.parent == tmp_path
        calls.append(("rename", Path(target).suffix, self.stat().st_size > 12000))
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    save(tmp_path)
    steps = [call[:2] for call in calls]
    assert steps == [
        ("sync", ".ckpt"),
        ("rename", ".ckpt"),
        ("sync", "folder"),
        ("sync", ".json"),
        ("rename", ".json"),
        ("sync", "folder"),
    ]
    # All of it was written by then.
    assert calls[0][2]
    assert calls[1][2]


def test_a_full_file_system_is_said_before_anything_is_written(tmp_path, monkeypatch):
    old = save(tmp_path, 2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 9000, 9000))
    with pytest.raises(StorageError) as failure:
        save(tmp_path, 4)
    text = str(failure.value)
    assert "step-000004.ckpt" in text
    assert "GiB free" in text
    assert f"resume={old}" in text
    assert failure.value.exit_code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002.ckpt", "step-000002.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("phase", ["write", "sync", "manifest"])
def test_an_error_while_writing_leaves_the_old_one_and_nothing_half(
    tmp_path, monkeypatch, number: int, phase: str
):
    old = save(tmp_path, 2)
    error = OSError(number, os.strerror(number))

    def fail(*_):
        raise error

    if phase == "write":
        monkeypatch.setattr(
            "dpo_lightning.training.checkpoints.writer._Hashed.write", _failing_write(error)
        )
    elif phase == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr("dpo_lightning.training.checkpoints.files.write_json", fail)
    with pytest.raises(StorageError, match=os.strerror(number)):
        save(tmp_path, 4)
    monkeypatch.undo()
    assert find_damage(old) is None
    assert not list(tmp_path.glob(".*"))
    new = checkpoint_path(tmp_path, 4)
    assert find_damage(new) is not None
    assert not manifest_path(new).exists()


def _failing_write(error):
    from dpo_lightning.training.checkpoints.writer import _Hashed

    real = _Hashed.write

    class Full:
        def write(self, data):
            raise error

    def write(self, data):
        if self._bytes > 5000:
            self._file = Full()
        return real(self, data)

    return write


def test_an_interrupt_while_writing_is_one(tmp_path, monkeypatch):
    """Torch makes a RuntimeError of whatever a write raises."""
    monkeypatch.setattr(
        "dpo_lightning.training.checkpoints.writer._Hashed.write",
        _failing_write(KeyboardInterrupt()),
    )
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path)
    assert list(tmp_path.iterdir()) == []


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("canary"),))


@pytest.mark.parametrize("kind", ["torch", "pickle", "text"])
def test_nothing_but_tensors_and_values_is_loaded(tmp_path, monkeypatch, kind: str):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.ckpt"
    if kind == "torch":
        torch.save({"x": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps(Evil()) if kind == "pickle" else b"not a checkpoint")
    with pytest.raises(CorruptArtifactError, match="not loaded"):
        DurableCheckpointIO({}).load_checkpoint(path, weights_only=False)
    assert not (tmp_path / "canary").exists()


def test_what_could_not_be_loaded_again_is_named(tmp_path):
    checkpoint = state() | {"callbacks": {"Mine": {"path": [Path("x")]}}}
    with pytest.raises(UserError, match=r"callbacks\.Mine\.path\[0\], a PosixPath"):
        DurableCheckpointIO({}).save_checkpoint(checkpoint, checkpoint_path(tmp_path, 1))


class Level(enum.IntEnum):
    HIGH = 3


Best = namedtuple("Best", "step loss")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(1.5), "float64"),
        (Level.HIGH, "Level"),
        (np.str_("a"), "str_"),
        (defaultdict(int, a=1), "defaultdict"),
        (Best(4, 0.5), "Best"),
    ],
)
def test_what_is_almost_a_plain_value_is_named_before_it_is_lost(tmp_path, value, kind):
    """Numbers, texts, dicts and tuples to Python, and no plain ones to who loads them."""
    checkpoint = state() | {"callbacks": {"Mine": {"best": value}}}
    with pytest.raises(UserError, match=rf"callbacks\.Mine\.best, a {kind};"):
        DurableCheckpointIO({}).save_checkpoint(checkpoint, checkpoint_path(tmp_path, 1))
    assert list(tmp_path.iterdir()) == []
    torch.save({"best": value}, tmp_path / "by_hand.ckpt")
    with pytest.raises(CorruptArtifactError):
        DurableCheckpointIO({}).load_checkpoint(tmp_path / "by_hand.ckpt")


def test_a_key_that_could_not_be_loaded_again_is_named(tmp_path):
    checkpoint = state() | {"callbacks": {"Mine": {Path("x"): 1}}}
    with pytest.raises(UserError, match=r"callbacks\.Mine\.x, a PosixPath"):
        DurableCheckpointIO({}).save_checkpoint(checkpoint, checkpoint_path(tmp_path, 1))


def test_every_plain_kind_comes_back(tmp_path):
    plain = {
        "values": [True, 3, 1.5, 2j, "a", b"b", None, torch.Size([2]), torch.float32],
        "kinds": (OrderedDict(a=1), Counter("aab"), {1: {(2, 3): [()]}}),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    path = checkpoint_path(tmp_path, 1)
    DurableCheckpointIO({}).save_checkpoint({"global_step": 1, "rest": plain}, path)
    loaded = DurableCheckpointIO({}).load_checkpoint(path)["rest"]
    assert loaded["values"] == plain["values"]
    assert loaded["kinds"] == plain["kinds"]
    assert torch.equal(loaded["parameter"], plain["parameter"])


@pytest.mark.parametrize(
    ("tensors", "free_mib", "fits"),
    [
        # Two names of one tensor of 4 MiB are written once: 5 MiB with what comes beside it.
        (lambda w: {"w": w, "tied": w}, 6, True),
        (lambda w: {"w": w, "other": w.clone()}, 6, False),
        # Of a part of a tensor the whole is written.
        (lambda w: {"part": w[:10]}, 3, False),
        (lambda w: {"part": w[:10].clone()}, 3, True),
    ],
)
def test_a_checkpoint_takes_what_is_behind_its_tensors_once(
    tmp_path, monkeypatch, tensors, free_mib: int, fits: bool
):
    usage = namedtuple("usage", "total used free")
    free = free_mib << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - free, free))
    path = checkpoint_path(tmp_path, 1)
    checkpoint = {"global_step": 1, "state_dict": tensors(torch.randn(1 << 20))}
    with nullcontext() if fits else pytest.raises(StorageError, match="GiB free"):
        DurableCheckpointIO({}).save_checkpoint(checkpoint, path)
    assert path.exists() == fits
    if fits:
        assert path.stat().st_size <= free


class _Strategy:
    def __init__(self, io, log):
        self.checkpoint_io, self._log = io, log

    def broadcast(self, value):
        self._log.append("broadcast")
        return value


class _Trainer:
    """Two ranks as rank 0 sees them: a save ends where all ranks meet."""

    world_size, is_global_zero, global_step = 2, True, 4

    def __init__(self, io):
        self.log = []
        self.strategy = _Strategy(io, self.log)

    def save_checkpoint(self, path):
        self.strategy.checkpoint_io.save_checkpoint(state(), path)
        self.log.append("met")


def test_a_failed_save_meets_the_other_ranks_before_it_is_said(tmp_path):
    """Raised earlier, it would leave them waiting."""
    (tmp_path / "file").touch()
    io = DurableCheckpointIO({})
    trainer = _Trainer(io)
    with pytest.raises(StorageError):
        save_now(trainer, tmp_path / "file" / "step-000004.ckpt")
    assert trainer.log == ["met", "broadcast"]
    save_now(trainer, tmp_path / "step-000004.ckpt")
    # By itself it raises at once.
    with pytest.raises(StorageError):
        io.save_checkpoint(state(), tmp_path / "file" / "step-000004.ckpt")


def test_the_old_one_goes_after_the_new_one_is_whole(tmp_path, monkeypatch):
    old = save(tmp_path, 2)
    seen = []
    real = Path.unlink

    def spy(self, *args, **kwargs):
        if self.name.startswith("step-") and self.exists():
            seen.append((self.name, find_damage(checkpoint_path(tmp_path, 4))))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", spy)
    callback = Checkpoints(tmp_path, every_n_steps=2, keep=1, last=True)
    trainer = _Trainer(DurableCheckpointIO({}))
    callback.on_train_batch_end(trainer, None, None, None, 0)
    assert seen == [(old.name, None), (manifest_path(old).name, None)]
    trainer.log.clear()
    callback.on_train_end(trainer, None)
    assert trainer.log == ["broadcast"]  # its step was saved on the way


@pytest.mark.parametrize(
    ("every", "round_steps", "saved"),
    [
        (4, None, [4, 8]),
        (4, 3, [3, 4, 6, 8, 9]),
        (None, 3, []),  # whoever wants none on the way has none
    ],
)
def test_ends_of_rounds_are_saved_too(tmp_path, monkeypatch, every, round_steps, saved):
    found = []
    monkeypatch.setattr(
        "dpo_lightning.training.checkpoints.writer.save_now",
        lambda trainer, path, **_: found.append(int(path.stem[5:])),
    )
    callback = Checkpoints(
        tmp_path, every_n_steps=every, keep=1, last=True, round_steps=round_steps
    )
    for step in range(1, 10):
        strategy = SimpleNamespace(checkpoint_io=None)
        trainer = SimpleNamespace(global_step=step, is_global_zero=True, strategy=strategy)
        callback.on_train_batch_end(trainer, None, None, None, 0)
    assert found == saved
