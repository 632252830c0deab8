"""Failures around a run end it in one line, or not at all: wandb, terminals, disks."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_lightning.run.supervise import disk_fault
from dpo_lightning.tracking import destinations
from tests.support.runs import ROOT, TINY, Run, run_train
from tests.support.waiting import until
from tests.support.warm import run_apart

QUICK = (*TINY, "evaluation.partition_samples=0", "trainer.max_steps=4")
KEY = "a1b2c3d4e5" * 4


def losses(run: Run) -> list[float]:
    return run.values("train/loss")


# wandb ------------------------------------------------------------------------------------------


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A user who is logged in; all of wandb's files go into a folder of the test's own."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "3")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture
def server(request, monkeypatch, tmp_path):
    """A server in a mode; yields the requests that it was sent so far."""
    log = tmp_path / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "wandb_server.py"), request.param],
            stdout=subprocess.PIPE,
            text=True,
        )
        port = process.stdout.readline().strip()
        copy = subprocess.Popen(["cat"], stdin=process.stdout, stdout=file)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        yield log
        process.kill()
        process.wait()
        copy.wait()
        process.stdout.close()


def train_apart(folder: Path, *overrides: str) -> tuple[Run, str]:
    """Trains in a process of its own, as wandb keeps one server for a process."""
    done = run_apart(f"hydra.run.dir={folder}", "trainer.threads=1", *QUICK, *overrides)
    return Run(done.returncode, folder), done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("server", ["works"], indirect=True)
def test_a_server_that_works(online, server, tmp_path):
    run, said = train_apart(tmp_path / "run", "logger.mode=online")
    assert run.code == 0
    assert "offline" not in said
    assert "/me/p/runs/" in said
    until(lambda: "train/loss" in server.read_text())
    # The key is for the header of a request alone.
    assert KEY not in server.read_text()


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["online", "auto"])
@pytest.mark.parametrize("server", ["refuse"], indirect=True)
def test_a_server_that_refuses(online, server, mode, tmp_path):
    run, said = train_apart(tmp_path / "run", f"logger.mode={mode}")
    assert run.code == 0
    assert "recorded offline" in said
    assert len(losses(run)) == 4
    assert list(run.folder.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.faults
@pytest.mark.parametrize("server", ["lost"], indirect=True)
def test_a_server_that_is_lost_on_the_way(online, server, tmp_path):
    """It ends at the first metrics; the run waits 3 s for it at its end, not for ever."""
    run, said = train_apart(tmp_path / "run", "logger.mode=online")
    assert run.code == 0
    assert run.result["status"] == "finished"
    assert [row["step"] for row in run.rows if "train/loss" in row] == [1, 2, 3, 4]
    assert "wandb: the server stopped answering" in said
    [path] = run.folder.glob("wandb/run-*/run-*.wandb")
    assert f"wandb sync {path.parent}" in said


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", pytest.param("auto", marks=pytest.mark.faults)])
def test_no_server(online, mode, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run, said = train_apart(tmp_path / "run", f"logger.mode={mode}")
    assert run.code == 0
    assert "127.0.0.1 does not answer, so this run is recorded offline" in said
    assert len(losses(run)) == 4


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("key", [None, pytest.param("not a key", marks=pytest.mark.faults)])
def test_no_login(online, key, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    run, said = train_apart(tmp_path / "run", "logger.mode=online")
    assert run.code == 0
    assert "recorded offline" in said
    assert list(run.folder.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.slow
def test_wandbs_own_process_dies(tmp_path, monkeypatch, capfd):
    """Whatever it raises, the rows go on into metrics.jsonl, and it is said once."""
    calls = []

    def broken(self, metrics, step=None):
        calls.append(step)
        raise BrokenPipeError(errno.EPIPE, "gone")

    monkeypatch.setattr(destinations.WandbLogger, "log_metrics", broken)
    run = run_train(tmp_path / "run", *QUICK, logger="wandb")
    assert run.code == 0
    # At the first row, and once more at the end: all of them wait behind it.
    assert calls == [1, 1]
    assert len(losses(run)) == 4
    assert capfd.readouterr().out.count("wandb takes no metrics (") == 1


# The terminal -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirection",
    [
        "| head -1",
        pytest.param(">&- 2>&-", marks=pytest.mark.faults),
        pytest.param(">/dev/full 2>/dev/full", marks=pytest.mark.faults),
    ],
)
def test_a_terminal_that_is_gone(redirection, tmp_path):
    run = tmp_path / "run"
    words = " ".join((*QUICK, "logger=none", "trainer.threads=1", f"hydra.run.dir={run}"))
    command = f"set -o pipefail; {sys.executable} -u train.py {words} {redirection}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert Run(0, run).result["status"] == "finished"
    assert (run / "model" / "model.safetensors").exists()
    assert "step 4/4" in (run / "train.log").read_text()


# Disks ------------------------------------------------------------------------------------------


class Full:
    """A disk that is full for the numbered writes, counted from 1."""

    def __init__(self, *numbers: int, torn: bool = False) -> None:
        self.numbers, self.torn, self.count = numbers, torn, 0

    def open(self, path, mode="r", *args, **kwargs):
        file = OPEN(path, mode, *args, **kwargs)
        if path.name != "metrics.jsonl" or "a" not in mode:
            return file
        return _FullFile(file, self)


class _FullFile:
    def __init__(self, file, disk: Full) -> None:
        self._file, self._disk = file, disk

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        self._disk.count += 1
        if self._disk.count not in self._disk.numbers:
            return self._file.write(data)
        if self._disk.torn:
            return self._file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


OPEN = Path.open


@pytest.mark.parametrize("torn", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_full_disk_under_metrics(tmp_path, monkeypatch, capfd, torn):
    """The second and third row do not fit; the fourth write has all three, none torn, in order."""
    disk = Full(2, 3, torn=torn)
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: disk.open(path, *a, **k))
    run = run_train(tmp_path / "run", *QUICK)
    assert run.code == 0
    assert disk.count > 3
    assert [row["step"] for row in run.rows if "train/loss" in row] == [1, 2, 3, 4]
    said = capfd.readouterr().out
    assert said.count("metrics.jsonl cannot be written") == 1
    assert "No space left on device" in said


def test_a_full_disk_under_the_log(tmp_path, capfd, monkeypatch):
    import logging

    emit = logging.StreamHandler.emit

    def full(self, record):
        if not isinstance(self, logging.FileHandler):
            return emit(self, record)
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self.handleError(record)

    monkeypatch.setattr(logging.StreamHandler, "emit", full)
    run = run_train(tmp_path / "run", *QUICK)
    assert run.code == 0
    said = capfd.readouterr().err
    assert said.count("train.log cannot be written: No space left on device") == 1
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.yaml", "model", "evaluation.json"])
def test_a_disk_that_fills_up_ends_the_run_in_one_line(tmp_path, capfd, monkeypatch, name):
    from dpo_lightning.run import conclude as conclusion
    from dpo_lightning.run import session_steps

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "run" / name))

    if name == "config.yaml":
        monkeypatch.setattr(session_steps.yaml, "safe_dump", full)
    else:
        attribute = "export_model" if name == "model" else "write_json"
        monkeypatch.setattr(conclusion, attribute, full)
    run = run_train(tmp_path / "run", *QUICK)
    assert run.code == 2
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err
    [said] = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path / 'run' / name}: No space left on device" in said
    assert "hydra.run.dir=" in said
    assert run.result["status"] == "failed"


def test_a_result_that_cannot_be_written_is_said(tmp_path, capfd, monkeypatch):
    from dpo_lightning.run import record

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record, "write_json", full)
    run = run_train(tmp_path / "run", *QUICK)
    assert run.code == 2
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert "result.json: No space left on device" in captured.err
    assert (run.folder / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x", "f"), "f: No space left on device"),
        (OSError(errno.EROFS, "x", "f"), "f: Read-only file system"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left"),
        (OSError(errno.ENOENT, "x", "f"), None),
        (RuntimeError("boom (os error 2)"), None),
        (ValueError("28"), None),
    ],
)
def test_faults_of_a_disk(error: Exception, words: str | None):
    found = disk_fault(error)
    assert (found is None) == (words is None)
    assert words is None or words in found


# Caches -----------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"p{i}", "chosen": f" a{i}", "rejected": " b"} for i in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("how", ["variable", "setting"])
def test_a_cache_that_is_no_folder(tiny_model, rows, tmp_path, monkeypatch, capfd, how):
    file = tmp_path / "file"
    file.write_text("in the way")
    arguments = [f"model.pretrained={tiny_model}", f"data.train={rows}", "trainer.max_steps=2"]
    arguments += ["evaluation.samples=0", "evaluation.partition_samples=0"]
    if how == "variable":
        monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(file))
    else:
        arguments.append(f"reference.cache_dir={file}")
    run = run_train(tmp_path / "run", *arguments)
    assert run.code == 0
    assert run.result["reference"]["computed"] == 20
    said = capfd.readouterr().out
    assert "token ids could not be cached" in said
    assert "reference.cache_dir=" in said
    assert file.read_text() == "in the way"


def test_a_cache_whose_disk_is_full(tiny_model, rows, tmp_path, monkeypatch, capfd):
    from dpo_lightning.data import token_cache
    from dpo_lightning.reference import cache as reference_cache

    def full(path: Path, data: bytes, *, lasting: bool = True) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reference_cache, "write_whole", full)
    monkeypatch.setattr(token_cache, "write_whole", full)
    arguments = [f"model.pretrained={tiny_model}", f"data.train={rows}", "trainer.max_steps=2"]
    arguments += ["evaluation.samples=0", "evaluation.partition_samples=0"]
    run = run_train(tmp_path / "run", *arguments)
    assert run.code == 0
    assert run.result["reference"]["computed"] == 20
    assert losses(run)[0] == pytest.approx(0.6931472, abs=1e-5)
    assert capfd.readouterr().out.count("No space left on device") == 2


# The hub ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("key", ["model.pretrained", "data.train"])
def test_no_network(tiny_model, rows, tmp_path, key):
    """The hub's address leads to a closed port; nothing is tried again for half a minute."""
    values = {"model.pretrained": str(tiny_model), "data.train": str(rows)} | {key: "nobody/none"}
    done = run_apart(
        *(f"hydra.run.dir={tmp_path / 'run'}", "logger=none"),
        *(f"{name}={value}" for name, value in values.items()),
        env={
            "HF_HUB_OFFLINE": None,
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(tmp_path / "hf"),
        },
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{key}=nobody/none" in said
    assert "local cache" in said
