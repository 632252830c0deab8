"""Manifests: the whole checkpoints, the one to resume from, those to keep, the order of writes."""

import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.errors import CorruptArtifactError
from dpo_lightning.files import staged_name
from dpo_lightning.training.checkpoints import files as checkpoints
from dpo_lightning.training.checkpoints.files import (
    Content,
    changed_settings,
    checkpoint_path,
    find_checkpoint,
    find_damage,
    manifest_path,
    new_digest,
    prune,
    publish,
    read_manifest,
    remove_leftovers,
)
from tests.support.properties import examples


def content(data: bytes) -> Content:
    digest = new_digest()
    digest.update(data)
    return Content(len(data), digest.hexdigest())


def save(folder: Path, step: int, data: bytes | None = None) -> Path:
    data = b"weights of step %d" % step if data is None else data
    path = checkpoint_path(folder, step)
    staged_name(path).write_bytes(data)
    publish(staged_name(path), path, content(data), step=step, facts={"identity": {"beta": 0.1}})
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_a_file_and_its_manifest(tmp_path):
    path = save(tmp_path, 10)
    assert names(tmp_path) == ["step-000010.ckpt", "step-000010.json"]
    assert find_damage(path) is None
    manifest = read_manifest(path)
    assert manifest["step"] == 10
    assert manifest["bytes"] == len(b"weights of step 10")
    assert manifest["identity"] == {"beta": 0.1}


@pytest.mark.parametrize("at", range(0, 100, 10))
def test_a_truncated_file_is_found_out(tmp_path, at: int):
    path = save(tmp_path, 1, bytes(range(200)))
    path.write_bytes(path.read_bytes()[: 2 * at])
    assert f"{2 * at} bytes" in find_damage(path)


@given(place=st.integers(0, 199), bit=st.integers(0, 7))
@settings(max_examples=examples(60))
def test_a_flipped_bit_is_found_out(tmp_path_factory, place: int, bit: int):
    path = save(tmp_path_factory.mktemp("flip"), 1, bytes(range(200)))
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)
    assert find_damage(path) == "its content is not what was written"


def test_every_flipped_bit_of_a_manifest_is_found_out(tmp_path):
    path = save(tmp_path, 1)
    manifest = manifest_path(path)
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            manifest.write_bytes(data)
            assert find_damage(path) is not None, (place, bit)
    manifest.write_bytes(whole)
    assert find_damage(path) is None


def test_what_has_no_manifest_was_not_finished(tmp_path):
    path = save(tmp_path, 3)
    manifest_path(path).unlink()
    assert "not finished" in find_damage(path)
    with pytest.raises(CorruptArtifactError, match="start again without resume"):
        find_checkpoint(str(path), tmp_path)
    older = save(tmp_path, 2)
    with pytest.raises(CorruptArtifactError, match=f"resume={older} is whole"):
        find_checkpoint(str(path), tmp_path)
    with pytest.raises(CorruptArtifactError, match=r"step-000003\.json"):
        read_manifest(path)


def test_another_format_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_FORMAT", 2)
    path = save(tmp_path, 3)
    monkeypatch.undo()
    assert "format 2, not 1" in find_damage(path)


def test_the_newest_whole_one_is_taken_and_what_is_passed_over_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "checkpoints").mkdir()
    paths = [save(tmp_path / "checkpoints", step) for step in (2, 10, 9)]
    assert find_checkpoint("auto", tmp_path) == paths[1]
    paths[1].write_bytes(b"other")
    manifest_path(paths[2]).unlink()
    caplog.clear()
    assert find_checkpoint("auto", tmp_path) == paths[0]
    assert "step-000010.ckpt: it has 5 bytes" in caplog.text
    assert "step-000009.ckpt: it was not finished" in caplog.text
    assert f"resuming from {paths[0]}" in caplog.text
    paths[0].unlink()
    assert find_checkpoint("auto", tmp_path) is None
    with pytest.raises(CorruptArtifactError, match="no intact checkpoint"):
        find_checkpoint(str(tmp_path), tmp_path)


def test_a_manifest_comes_last_after_everything_is_on_disk(tmp_path, monkeypatch):
    """Calls as the system sees them: each file is synced before it is renamed, the folder after."""
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def spy_fsync(handle):
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        calls.append(f"sync {'folder' if name == tmp_path.name else kind(name)}")
        real_fsync(handle)

    def kind(name: str) -> str:
        return "manifest" if ".json" in name else "checkpoint"

    def spy_replace(self, target):
        calls.append(f"rename {kind(Path(target).name)}")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    save(tmp_path, 1)
    assert calls == [
        "rename checkpoint",
        "sync folder",
        "sync manifest",
        "rename manifest",
        "sync folder",
    ]


@pytest.mark.parametrize("after", ["manifest of both", "rename"])
def test_a_checkpoint_that_is_saved_again_is_whole_at_every_moment(tmp_path, monkeypatch, after):
    """A process that dies between the two files of one step leaves the old or the new one whole."""
    path = save(tmp_path, 4, b"old")
    real = Path.replace

    class Died(BaseException):
        pass

    def dying(self, target):
        is_manifest = Path(target).suffix == ".json"
        if after == "rename" and is_manifest and path.read_bytes() == b"new":
            raise Died
        if after == "manifest of both" and not is_manifest:
            raise Died
        return real(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(Died):
        save(tmp_path, 4, b"new")
    assert path.read_bytes() == (b"new" if after == "rename" else b"old")
    assert find_damage(path) is None
    monkeypatch.undo()
    save(tmp_path, 4, b"newest")
    assert find_damage(path) is None
    assert "replaces" not in read_manifest(path)


def test_only_the_newest_stay_and_only_finished_ones_count(tmp_path):
    paths = {step: save(tmp_path, step) for step in (1, 2, 3, 4)}
    manifest_path(paths[3]).unlink()
    prune(tmp_path, newest=paths[4], keep=2)
    assert names(tmp_path) == [
        "step-000002.ckpt",
        "step-000002.json",
        "step-000004.ckpt",
        "step-000004.json",
    ]
    # A run that went back to step 2 has left the course that led to 4.
    now = save(tmp_path, 3)
    prune(tmp_path, newest=now, keep=1)
    assert names(tmp_path) == ["step-000003.ckpt", "step-000003.json"]


def test_what_a_killed_process_left_goes(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-000002.ckpt.4711").write_bytes(b"half")
    (tmp_path / ".step-000001.json.4711").write_bytes(b"half")
    (tmp_path / "step-000000.json").write_text("{}")
    (tmp_path / "notes.json").write_text("{}")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["notes.json", "step-000001.ckpt", "step-000001.json"]
    remove_leftovers(tmp_path / "nowhere")


def test_what_changed_has_both_values_and_new_keys_do_not_count():
    saved = json.loads(json.dumps({"beta": 0.1, "data": "a", "gone": 1, "terms": {"x": 0.5}}))
    now = {"beta": 0.5, "data": "a", "new": 2, "terms": {"x": 0.5}}
    assert changed_settings(saved, now) == {"beta": {"from": 0.1, "to": 0.5}}
