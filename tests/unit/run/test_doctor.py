"""The checks of a machine: each with a stand-in that fails, the table, the object, the code."""

import fcntl
import json
import os
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo_lightning.__main__ import main
from dpo_lightning.run.doctor import command, machine, numbers, ring
from dpo_lightning.run.doctor.checks import run_checks
from dpo_lightning.run.doctor.numbers import Bench
from dpo_lightning.tracking import wandb_runs
from dpo_lightning.tracking.wandb_runs import ServerState
from tests.support.ranks import on_ranks

CPU = Bench(torch.device("cpu"), torch.float32)
# The numbers of a GPU's step, as far as a CPU can compute them.
HALF = Bench(torch.device("cpu"), torch.bfloat16)
TOKEN = "hf_" + "aB3dE5fG7h" * 3


def only(monkeypatch, *checks: tuple[str, Any]) -> None:
    monkeypatch.setattr(command, "all_checks", lambda: list(checks))


def raises(error: Exception) -> Any:
    def find() -> Any:
        raise error

    return find


# The command --------------------------------------------------------------------------------------


def test_one_object_on_stdout_and_all_else_on_stderr(monkeypatch, capsys):
    def chatty() -> Any:
        print("a library says")
        return "ok", "fine"

    only(monkeypatch, ("one", chatty), ("two", lambda: ("warning", "slow")))
    assert main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "checks": [
            {"name": "one", "ok": True, "detail": "fine"},
            {"name": "two", "ok": True, "detail": "warning: slow"},
        ]
    }
    assert "a library says" in captured.err


@pytest.mark.parametrize("words", [[], ["--json"]])
@pytest.mark.parametrize(
    ("bad", "said"),
    [(lambda: ("failed", "broken"), "broken"), (raises(OSError("torn")), "OSError: torn")],
)
def test_a_check_that_fails_or_raises_is_a_line_and_the_code(
    monkeypatch, capsys, words: list[str], bad: Any, said: str
):
    only(monkeypatch, ("bad", bad), ("next", lambda: ("ok", "it runs all the same")))
    assert main(["doctor", *words]) == 2
    out = capsys.readouterr().out
    assert said in out
    assert "it runs all the same" in out
    if words:
        assert [check["ok"] for check in json.loads(out)["checks"]] == [False, True]
    else:
        assert out.splitlines()[-1] == "failed: bad"


def test_no_secret_is_shown():
    [check] = run_checks([("x", raises(RuntimeError(f"401 for {TOKEN}\nmore")))])
    assert TOKEN not in check.detail
    assert "\n" not in check.detail


def test_other_words_are_refused_in_one_line(capsys):
    assert main(["doctor", "beta=0.1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: beta=0.1: `")
    assert error.count("\n") == 1


def test_the_checks_are_all_there():
    names = [name for name, _ in command.all_checks()]
    assert names == [
        *("versions", "devices", "driver", "bfloat16", "attention", "head", "optimizer", "ring"),
        *("outputs", "cache disk", "cache", "hub", "wandb"),
    ]


# What is installed, devices -----------------------------------------------------------------------


def test_versions_are_said_and_one_out_of_range_fails(monkeypatch):
    state, detail = machine.check_versions()
    assert state == "ok"
    assert f"torch {torch.__version__}" in detail
    monkeypatch.setattr(
        machine.importlib.metadata,
        "requires",
        lambda _: ["torch>=99", "numpy>=1", "none-such>=1", 'trl==1; extra == "bench"'],
    )
    state, detail = machine.check_versions()
    assert state == "failed"
    assert f"torch>=99 is needed, and there is {torch.__version__}" in detail
    assert "none-such>=1 is needed, and there is none" in detail
    assert "numpy" not in detail
    assert "trl" not in detail


class Cards:
    """Stand-in for torch's view of some GPUs."""

    def __init__(self, monkeypatch, *capabilities: tuple[int, int]) -> None:
        def card(number: int) -> Any:
            major, minor = capabilities[number]
            return SimpleNamespace(
                name=f"card {number}", total_memory=24 << 30, major=major, minor=minor
            )

        for name, value in {
            "is_available": lambda: bool(capabilities),
            "device_count": lambda: len(capabilities),
            "get_device_properties": card,
            "get_device_name": lambda number: card(number).name,
            "get_device_capability": lambda number: capabilities[number],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_devices(monkeypatch):
    Cards(monkeypatch)
    monkeypatch.setattr(machine, "list_gpus", lambda: [])
    assert machine.check_devices()[0] == "ok"
    Cards(monkeypatch, (9, 0), (7, 5))
    state, detail = machine.check_devices()
    assert state == "ok"
    assert "card 0, 24.0 GiB, capability 9.0; card 1" in detail


@pytest.mark.parametrize(
    ("cuda", "said"), [(None, "is a build without CUDA"), ("13.0", "for CUDA 13.0; update")]
)
def test_gpus_that_torch_does_not_see_fail(monkeypatch, cuda, said):
    Cards(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(machine, "list_gpus", lambda: [SimpleNamespace(slices=())])
    state, detail = machine.check_devices()
    assert (state, said in detail) == ("failed", True), detail
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    state, detail = machine.check_devices()
    assert state == "ok"
    assert "hides the GPUs" in detail


def test_the_driver(monkeypatch, tmp_path):
    Cards(monkeypatch)
    assert machine.check_driver() == ("ok", "no GPU is used")
    Cards(monkeypatch, (9, 0))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '580.1\\n580.1\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    state, detail = machine.check_driver()
    assert state == "ok"
    assert detail.startswith("driver 580.1, torch")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert machine.check_driver()[0] == "warning"


def test_emulated_bfloat16_is_a_warning(monkeypatch):
    Cards(monkeypatch, (9, 0))
    assert machine.check_bfloat16()[0] == "ok"
    Cards(monkeypatch, (9, 0), (7, 5))
    state, detail = machine.check_bfloat16()
    assert state == "warning"
    assert detail.startswith("card 1 would emulate it")
    assert Bench.of_this_machine() == Bench(torch.device("cuda", 0), torch.bfloat16)
    Cards(monkeypatch, (7, 5))
    assert Bench.of_this_machine() == Bench(torch.device("cuda", 0), torch.float32)


# What is computed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bench", [CPU, HALF])
@pytest.mark.parametrize("name", ["check_attention", "check_head", "check_optimizer"])
def test_what_is_right_passes(name: str, bench: Bench):
    state, detail = getattr(numbers, name)(bench)
    assert state == "ok", detail
    assert detail.startswith(bench.name)


def sees_siblings(monkeypatch) -> None:
    """Attention in which a response sees what stands before it in the row."""
    from dpo_lightning.models import attention

    def mask(bucket: Any, window: Any) -> torch.Tensor:
        allowed = bucket.query_positions[:, :, None] - bucket.key_positions[:, None, :] >= -1
        return allowed[:, None]

    monkeypatch.setattr(attention, "_bucket_mask", mask)


def test_wrong_attention_fails(monkeypatch):
    sees_siblings(monkeypatch)
    state, detail = numbers.check_attention(CPU)
    assert state == "failed"
    assert "log-probabilities differ by" in detail


def test_a_kernel_that_is_not_used_is_a_warning(monkeypatch):
    monkeypatch.setattr(
        "dpo_lightning.models.scoring.Scorer.choose_kernel", lambda *_: "it is not there"
    )
    state, detail = numbers.check_attention(CPU)
    assert state == "warning"
    assert detail.endswith("the kernel for any lengths is not used: it is not there")


def test_a_wrong_head_fails(monkeypatch):
    real = numbers.token_logps
    monkeypatch.setattr(numbers, "token_logps", lambda *inputs: real(*inputs) * 1.01)
    assert numbers.check_head(CPU)[0] == "failed"
    monkeypatch.setattr(numbers, "token_logps", lambda *inputs: real(*inputs) * float("nan"))
    assert numbers.check_head(CPU)[0] == "failed"


def test_a_wrong_step_fails(monkeypatch):
    real = numbers.make_optimizer

    def without_decay(parameters: Any, settings: Any) -> Any:
        optimizer = real(parameters, settings)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        return optimizer

    monkeypatch.setattr(numbers, "make_optimizer", without_decay)
    assert numbers.check_optimizer(CPU)[0] == "failed"


# The ring -----------------------------------------------------------------------------------------


def test_one_card_needs_no_ring(monkeypatch):
    Cards(monkeypatch, (9, 0))
    assert ring.check_ring() == ("ok", "one card, so there is nothing between cards")


@pytest.mark.parametrize(
    ("cards", "count", "backend"), [((), 2, "gloo"), (((9, 0),) * 4, 4, "nccl")]
)
def test_each_card_is_a_rank_and_two_processes_are_without_one(
    monkeypatch, cards: Any, count: int, backend: str
):
    Cards(monkeypatch, *cards)
    asked: list[Any] = []

    def run(folder: Path, *options: Any) -> list[str]:
        asked.append(options)
        return ["what 1 received from 0 is not what was sent"] if len(asked) > 1 else []

    monkeypatch.setattr(ring, "_run_ring", run)
    assert ring.check_ring()[0] == "ok"
    state, detail = ring.check_ring()
    assert asked == [(count, backend)] * 2
    assert state == "failed"
    assert "what 1 received from 0" in detail


RANK = """
import json, sys
folder, rank = sys.argv[1:3]
if rank == "0":
    open(f"{folder}/0.json", "w").write(json.dumps({"fault": None}))
elif rank == "1":
    open(f"{folder}/1.json", "w").write(json.dumps({"fault": "1 has another sum"}))
elif rank == "2":
    sys.exit("ncclSystemError: no network")
else:
    import time; time.sleep(600)
"""


def test_what_each_rank_says_is_told_and_one_that_hangs_is_ended(monkeypatch, tmp_path):
    """Four stand-ins: one is well, one wrong, one ends with an error, one does not end."""
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    real = ring.subprocess.Popen

    def start(words: list[str], **options: Any) -> Any:
        return real([sys.executable, str(program), *words[3:]], **options)

    def clock() -> float:
        """The time is over when the first three have said what they have to say."""
        done = all((tmp_path / name).exists() for name in ("0.json", "1.json"))
        return 1e9 if done and (tmp_path / "2.log").stat().st_size else 0.0

    monkeypatch.setattr(ring.subprocess, "Popen", start)
    monkeypatch.setattr(ring, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    assert ring._run_ring(tmp_path, 4, "gloo") == [
        "1 has another sum",
        "2 did not end (ncclSystemError: no network)",
        "3 did not answer",
    ]


def in_ring(rank: int, folder: str, wrong: bool) -> str | None:
    """One rank of a group of processes that is there already."""
    distributed: Any = torch.distributed
    distributed.init_process_group = lambda *_, **__: None
    distributed.destroy_process_group = lambda *_: None
    real = distributed.batch_isend_irecv

    def exchange(operations: Any) -> Any:
        operations[0].tensor = operations[0].tensor + 1
        return real(operations)

    if wrong and rank == 1:
        distributed.batch_isend_irecv = exchange
    return ring.be_rank(Path(folder), rank, 2, "gloo")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_a_link_that_changes_what_is_sent_is_found(tmp_path, wrong: bool):
    found = on_ranks(in_ring, tmp_path, str(tmp_path), wrong)
    said = "what 0 received from 1 is not what was sent" if wrong else None
    assert found == [said, None]


@pytest.mark.slow  # two processes of their own; the quick ones take stand-ins
def test_two_processes_of_this_machine_are_a_ring():
    assert ring.check_ring() == (
        "ok",
        "2 processes of the CPU, gloo: each sends to the next, and all add up",
    )


# Disks and servers --------------------------------------------------------------------------------


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    folder = tmp_path / "not" / "there"
    state, detail = machine.check_folder(folder, "take another", needs_locks=True)
    assert state == "ok", detail
    assert detail.endswith("renames are atomic, locks work")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "state"), [(1 << 20, "failed"), (1 << 28, "warning"), (1 << 40, "ok")]
)
def test_little_room_is_said(monkeypatch, tmp_path, free: int, state: str):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage(1 << 41, 0, free))
    found, detail = machine.check_folder(tmp_path, "take another", needs_locks=True)
    assert found == state
    assert ("make room, or take another" in detail) == (state != "ok")


def test_a_folder_that_cannot_be_written_fails(monkeypatch, tmp_path):
    def replace(self: Path, target: Path) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(Path, "replace", replace)
    state, detail = machine.check_folder(tmp_path, "take another", needs_locks=False)
    assert state == "failed"
    assert detail.endswith("take another")


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize("needs_locks", [True, False])
def test_locks_that_do_not_work_are_said(monkeypatch, tmp_path, refused: bool, needs_locks: bool):
    """They are refused, or two are given at once."""

    def lock(*_: Any) -> None:
        if refused:
            raise OSError(95, os.strerror(95))

    monkeypatch.setattr(fcntl, "flock", lock)
    state, detail = machine.check_folder(tmp_path, "take another", needs_locks=needs_locks)
    assert state == ("failed" if needs_locks else "warning")
    assert "no locks; take another" in detail


def test_what_is_kept_is_counted(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(tmp_path))
    (tmp_path / "reference" / "a").mkdir(parents=True)
    (tmp_path / "reference" / "a" / "x.safetensors").write_bytes(b"x")
    state, detail = machine.check_cache()
    assert state == "ok"
    assert f"{tmp_path}: reference 1 files, 0.00 GiB; tokens 0 files" in detail


class Session:
    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.asked: list[tuple[str, Any]] = []

    def head(self, url: str, **options: Any) -> None:
        self.asked.append((url, options))
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "token", "state", "said"),
    [
        (None, None, "ok", "hub.example answers, without a token"),
        (None, TOKEN, "ok", "hub.example answers, logged in"),
        (ConnectionError(f"https://u:{TOKEN}@hub.example"), TOKEN, "warning", "does not answer"),
    ],
)
def test_the_hub(monkeypatch, error, token, state: str, said: str):
    session = Session(error)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://u:p4ss@hub.example:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    found, detail = machine.check_hub()
    assert found == state
    assert said in detail
    assert "p4ss" not in detail
    assert TOKEN not in detail
    [(_, options)] = session.asked
    assert options["timeout"] <= 5


def test_the_hub_is_not_asked_where_the_user_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_session", None)
    state, detail = machine.check_hub()
    assert state == "ok"
    assert "HF_HUB_OFFLINE" in detail


@pytest.mark.parametrize(
    ("answers", "logged_in", "state", "said"),
    [
        (True, True, "ok", "answers, logged in"),
        (True, False, "ok", "not logged in"),
        (False, True, "warning", "does not answer; runs are recorded offline"),
    ],
)
def test_wandb(monkeypatch, answers: bool, logged_in: bool, state: str, said: str):
    known = ServerState("wandb.example", answers, logged_in)
    monkeypatch.setattr(machine, "server_state", lambda: known)
    found, detail = machine.check_wandb()
    assert found == state
    assert detail.startswith("wandb.example ")
    assert said in detail


def test_the_server_of_wandb_is_asked_as_a_run_asks_it(monkeypatch):
    settings = SimpleNamespace(base_url="http://u:p4ss@127.0.0.1:9")
    stand_in = SimpleNamespace(
        setup=lambda: SimpleNamespace(settings=settings),
        login=lambda **_: False,
        Error=RuntimeError,
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)

    def refuse(address: Any, timeout: float) -> Any:
        assert address == ("127.0.0.1", 9)
        raise OSError

    monkeypatch.setattr(wandb_runs.socket, "create_connection", refuse)
    assert wandb_runs.server_state() == ServerState("127.0.0.1", answers=False, logged_in=False)
