"""Claims on work: one process has it, a dead one's is free at once, and no file is left."""

import errno
import fcntl
import json
import os
import signal
from pathlib import Path

import pytest

from dpo_lightning.processes import ownership
from dpo_lightning.processes.work_claims import claim_work, claimant


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / ".block.claim"


def test_one_has_the_work_until_it_releases_it(path):
    claim = claim_work(path)
    assert claim is not None
    assert not claim.is_taken_over
    assert claim_work(path) is None
    assert claimant(path).startswith(f"process {os.getpid()} on ")
    claim.release()
    claim.release()
    assert [*path.parent.iterdir()] == []
    again = claim_work(path)
    assert again is not None
    again.release()


def test_a_killed_ones_work_is_free_at_once(path):
    """The system lifts its lock; the file that it left is taken over."""
    reader, writer = os.pipe()
    worker = os.fork()
    if not worker:
        claim_work(path)
        os.write(writer, b"x")
        signal.pause()
    os.read(reader, 1)
    assert claim_work(path) is None
    assert claimant(path).startswith(f"process {worker} on ")
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    claim = claim_work(path)
    assert claim is not None
    assert claim.is_taken_over
    assert claimant(path).startswith(f"process {os.getpid()} on ")
    claim.release()
    assert [*path.parent.iterdir()] == []


def test_a_file_that_was_released_after_it_was_opened_is_no_claim(path, monkeypatch):
    """Between the open and the lock of the second the first one releases: its file is gone."""
    first = claim_work(path)
    real = fcntl.flock

    def late(handle: int, flags: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        first.release()
        real(handle, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    second = claim_work(path)
    assert second is not None
    assert path.exists()
    assert claim_work(path) is None
    second.release()


def without_locks(handle: int, flags: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_where_there_are_no_locks_the_named_process_decides(path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    claim = claim_work(path)
    assert claim is not None
    assert claim_work(path) is None
    claim.release()
    owner = ownership.this_process()
    for facts, is_free in (
        (owner | {"born": 1}, True),  # its number is another's by now
        (owner | {"machine": "elsewhere"}, False),  # nothing is known of it from here
        ({}, False),  # it has not signed yet
    ):
        path.write_text(json.dumps(facts))
        claim = claim_work(path)
        assert (claim is not None) == is_free, facts
        if claim is not None:
            claim.release()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        claim_work(tmp_path / "file" / ".block.claim")


def test_a_full_disk_costs_the_name_alone(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    claim = claim_work(path)
    assert claim is not None
    assert claimant(path) == "another process"
    assert claim_work(path) is None
    claim.release()
