"""A run's folder: one run at a time, and an earlier run's files until the first step."""

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_lightning.errors import StorageError, UserError
from dpo_lightning.processes import ownership
from dpo_lightning.processes.ownership import LOCK_FILE, OWNER_FILE, TakenError, take_folder
from dpo_lightning.run import folder as folders
from dpo_lightning.run.folder import RunFolder, hold_run, nothing_to_do
from dpo_lightning.settings.fingerprint import settings_hash
from dpo_lightning.settings.schema import Config
from tests.support.folders import hashes
from tests.support.runs import TINY, Run, run_train


@pytest.fixture
def earlier(tmp_path) -> Path:
    """The folder of a run that finished, with a user's own file in it."""
    folder = tmp_path / "run"
    for name in (".hydra", "model", "checkpoints", "csv"):
        (folder / name).mkdir(parents=True)
    result = {"status": "finished", "step": 7, "settings_hash": settings_hash(Config())}
    (folder / "result.json").write_text(json.dumps(result))
    for name in ("step-000007.ckpt", "step-000007.json", "mine.txt"):
        (folder / "checkpoints" / name).write_text("x")
    for name in ("metrics.jsonl", "config.yaml", "train.log", "notes.txt", "model/a", "csv/m.csv"):
        (folder / name).write_text("x")
    return folder


@contextlib.contextmanager
def held(folder: Path, **settings: object) -> Iterator[RunFolder]:
    with hold_run(Config(**settings), folder, is_writer=True) as found:  # type: ignore[arg-type]
        yield found


# One at a time ------------------------------------------------------------------------------------


def test_a_second_run_is_told_who_is_at_work_and_since_when(tmp_path):
    with held(tmp_path):
        owner = json.loads((tmp_path / OWNER_FILE).read_text())
        with pytest.raises(UserError, match="a run is using it") as refused, held(tmp_path):
            pass
    for word in (f"process {os.getpid()}", owner["host"], owner["started"], "hydra.run.dir="):
        assert word in str(refused.value)
    with held(tmp_path):
        pass
    assert not (tmp_path / OWNER_FILE).exists()


def test_a_forked_worker_does_not_keep_the_folder(tmp_path):
    """It has the lock's descriptor, which O_CLOEXEC does not close in a fork."""
    reader, writer = os.pipe()
    lock = take_folder(tmp_path, print)
    worker = os.fork()
    if not worker:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    os.close(lock._handle)  # as the system does for a trainer that is killed
    lock._handle = None
    ownership._held.remove(lock)
    deadline = time.monotonic() + 10
    while True:
        try:
            take_folder(tmp_path, print).release()
            break
        except TakenError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    os.close(writer)
    os.waitpid(worker, 0)


def owner_file(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    pid, born = ownership.birth(os.getppid())
    facts = {"pid": pid, "born": born, "host": "h", "machine": ownership.machine()} | changes
    (folder / OWNER_FILE).write_text(json.dumps(facts))
    return folder / OWNER_FILE


def test_where_locks_do_not_reach_the_owners_file_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "DEAD_SECONDS", 0.2)
    monkeypatch.setattr(ownership, "_POLL_SECONDS", 0.05)
    waits: list[str] = []
    owner_file(tmp_path)  # a process of this machine that lives
    with pytest.raises(TakenError):
        take_folder(tmp_path, waits.append)
    owner_file(tmp_path, born=1)  # its number is another's by now
    take_folder(tmp_path, waits.append).release()
    assert waits == []
    path = owner_file(tmp_path, machine="elsewhere boot pid", host="elsewhere")
    os.utime(path, (1, 1))  # no sign of life for long
    take_folder(tmp_path, waits.append).release()
    assert waits == []
    owner_file(tmp_path, machine="elsewhere boot pid", host="elsewhere")
    take_folder(tmp_path, waits.append).release()  # none while it is looked at
    assert len(waits) == 1


def test_a_sign_of_life_from_another_machine_keeps_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "DEAD_SECONDS", 5.0)
    monkeypatch.setattr(ownership, "_POLL_SECONDS", 0.01)
    path = owner_file(tmp_path, machine="elsewhere boot pid", host="elsewhere")
    with pytest.raises(TakenError, match="on elsewhere"):
        take_folder(tmp_path, lambda _: os.utime(path, (2, 2)))


def test_a_lock_that_a_launcher_took_is_gone_on_with(tmp_path, monkeypatch):
    handle = os.open(tmp_path / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    assert ownership.try_lock(handle)
    monkeypatch.setenv(ownership.INHERITED_LOCK, str(handle))
    lock = take_folder(tmp_path, print)
    assert lock._handle == handle
    assert ownership.INHERITED_LOCK not in os.environ
    lock.release()


# Until the first step -----------------------------------------------------------------------------


def test_files_of_an_earlier_run_stay_until_this_one_begins(earlier):
    before = hashes(earlier)
    with held(earlier, overwrite=True) as folder:
        folder.put("config.yaml", lambda: b"new")
        folder.put(".hydra/overrides.yaml", lambda: b"[]")
        folder.when_begun(lambda: (earlier / "quarantine.jsonl").write_text("new"))
        assert not folder.takes_result()
        assert hashes(earlier) == before
        folder.begin(resumed=False)
        assert folder.takes_result()
    assert sorted(hashes(earlier)) == [
        *(".hydra/overrides.yaml", "checkpoints/mine.txt", "config.yaml", "notes.txt"),
        "quarantine.jsonl",
    ]
    assert (earlier / "config.yaml").read_text() == "new"


def test_a_run_that_goes_on_keeps_the_course_and_not_the_outcome(earlier):
    with held(earlier, overwrite=True) as folder:
        folder.begin(resumed=True)
    left = hashes(earlier)
    assert {"metrics.jsonl", "train.log", "checkpoints/step-000007.ckpt"} <= {*left}
    assert not {"result.json", "model/a"} & {*left}


def test_a_full_disk_leaves_all_as_it_was(earlier, monkeypatch):
    before = hashes(earlier)
    real, calls = folders.stage, []

    def stage(path, data):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, data)

    monkeypatch.setattr(folders, "stage", stage)
    with held(earlier, overwrite=True) as folder:
        folder.put("config.yaml", lambda: b"new")
        folder.put("metrics.jsonl", lambda: b"new")
        with pytest.raises(UserError, match=r"metrics.jsonl: No space left on device"):
            folder.begin(resumed=False)
    assert hashes(earlier) == before


def test_a_finished_run_is_written_again_only_where_that_is_said(earlier):
    other = Config(beta=0.7)
    with pytest.raises(UserError, match=r"has finished \(step 7\); overwrite=true"):
        nothing_to_do(other, earlier)
    with pytest.raises(UserError, match="overwrite=true continues it"):
        nothing_to_do(Config(beta=0.7, resume="auto"), earlier)
    assert not nothing_to_do(Config(beta=0.7, overwrite=True), earlier)
    assert nothing_to_do(Config(resume="auto"), earlier)
    (earlier / "result.json").write_text('{"status": "fini')
    with pytest.raises(UserError, match="has finished"):  # its export is there
        nothing_to_do(other, earlier)
    (earlier / "result.json").unlink()
    assert not nothing_to_do(other, earlier)


@pytest.mark.parametrize("name", ["model", "config.yaml", "evaluation.json"])
def test_what_no_run_made_is_not_written_over(tmp_path, name):
    (tmp_path / name).mkdir() if name == "model" else (tmp_path / name).touch()
    with pytest.raises(UserError, match="was made by no run"):
        nothing_to_do(Config(), tmp_path)


def test_a_folder_where_a_file_is_written_is_said_at_the_start(earlier):
    (earlier / "checkpoints" / "step-000020.ckpt").mkdir()
    with pytest.raises(UserError, match=r"step-000020.ckpt is a folder"):
        nothing_to_do(Config(resume="auto"), earlier)


def test_the_rounds_of_an_earlier_run_are_no_hindrance_and_go_with_it(earlier):
    (earlier / "rounds").mkdir()
    (earlier / "rounds" / "1.jsonl").write_text("x")
    (earlier / "result.json").write_text('{"status": "stopped", "step": 7}')
    for overwrite, resumed, stays in (
        (False, True, True),
        (True, True, True),
        (True, False, False),
    ):
        with held(earlier, overwrite=overwrite) as folder:
            folder.begin(resumed=resumed)
        assert (earlier / "rounds" / "1.jsonl").exists() == stays


def test_a_folder_that_is_deleted_is_found_out(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with held(run) as folder:
        folder.check()
        run.rename(tmp_path / "moved")
        run.mkdir()  # another one of that name
        with pytest.raises(StorageError, match="deleted or moved"):
            folder.check()
        assert not folder.takes_result()


# Real starts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    run = run_train(
        tmp_path_factory.mktemp("finished") / "run",
        *(*TINY, "trainer.max_steps=2", "evaluation.partition_samples=0"),
    )
    assert run.code == 0
    return run


@pytest.mark.parametrize(
    "moment",
    [
        "dpo_lightning.cli.hold_run",
        "dpo_lightning.run.supervise.read_sources",
        "dpo_lightning.run.session.find_checkpoint",
        "dpo_lightning.run.session_steps.make_trainer",
        "lightning.pytorch.Trainer.fit",
    ],
)
@pytest.mark.parametrize("how", [KeyboardInterrupt, RuntimeError])
def test_a_start_that_does_not_come_to_a_step_leaves_an_earlier_run(
    finished: Run, monkeypatch, moment: str, how: type[BaseException]
):
    before = hashes(finished.folder)

    def stop(*_: object, **__: object) -> None:
        raise how("stopped")

    monkeypatch.setattr(moment, stop)
    code = run_train(
        finished.folder, *TINY, "overwrite=true", "beta=0.3", "trainer.max_steps=2"
    ).code
    assert code == (130 if how is KeyboardInterrupt else 1)
    assert hashes(finished.folder) == before


def test_a_start_that_failed_gives_way_to_the_next(tmp_path, monkeypatch):
    """It left nothing but why it failed, and the newer failure is the one to know."""
    for said in ("one", "two"):

        def stop(*_: object, said: str = said, **__: object) -> None:
            raise RuntimeError(said)

        monkeypatch.setattr("dpo_lightning.run.session.prepare", stop)
        run = run_train(tmp_path / "run", *TINY)
        assert run.code == 1
        assert said in run.result["error"]


def test_a_refused_resume_leaves_an_earlier_run(finished: Run, capfd):
    before = hashes(finished.folder)
    for typed in (("beta=0.3",), ("beta=0.3", "seed=4", "overwrite=true")):
        run = run_train(finished.folder, *TINY, "resume=auto", "trainer.max_steps=2", *typed)
        assert run.code == 2
        assert hashes(finished.folder) == before
    said = capfd.readouterr().err
    assert "beta=0.1 seed=1" in said  # all at once
    assert "beta=0.3 seed=4" in said


def test_a_folder_that_goes_while_the_run_is_at_work_ends_it(tmp_path, capfd, monkeypatch):
    import shutil

    from dpo_lightning.training.module import DPOModule

    real = DPOModule.training_step

    def step(self, *args, **kwargs):
        if self.global_step == 1:
            shutil.rmtree(tmp_path / "run")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(DPOModule, "training_step", step)
    assert run_train(tmp_path / "run", *TINY, "trainer.max_steps=3").code == 2
    assert "deleted or moved" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
