"""The benchmark of a GPU: what it measures by the card, its file, and its answer without one."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT

GIB = 2**30


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("gpu")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


class Arms:
    """Stand-in for arms in processes of their own: ours is twice as fast and drifts a little."""

    def __init__(self) -> None:
        self.turns: list[tuple[str, str]] = []
        self.seconds = 0.0

    def __call__(self, arm: str, out: Path, *, options: dict[str, Any]) -> dict[str, Any]:
        steps = int(options["steps"])
        self.turns.append((arm, options["precision"]))
        self.seconds += 100.0
        pace = 2.0 if arm.startswith("trl") else 1.0
        record = {
            "arm": arm, "times": [pace * step for step in range(steps)], "import_seconds": 1.0,
            "peak_bytes": (10 if arm.startswith("trl") else 5) * GIB,
            "losses": [0.69314718 - 0.01 * step for step in range(steps)],
        }  # fmt: skip
        return record


@pytest.fixture
def arms(gpu, monkeypatch) -> Arms:
    arms = Arms()
    monkeypatch.setattr("run.run_arm", arms)
    monkeypatch.setattr("run.make_adapter", lambda model: model)
    monkeypatch.setattr(gpu, "matrix_rate", lambda *_, **__: 2e12)
    monkeypatch.setattr(gpu, "describe_machine", lambda _: {"gpu": None})
    monkeypatch.setattr(gpu.time, "monotonic", lambda: arms.seconds)
    monkeypatch.setattr("workload.make_model", lambda folder, size: folder.mkdir())
    return arms


def test_arms_take_turns_and_one_file_is_left(gpu, arms, tmp_path, monkeypatch, capsys):
    """Pairs of a step in 1 s for ours and 2 s for TRL: twice as fast with half of the memory."""
    card = {
        "name": "NVIDIA A10", "memory_bytes": None, "driver": "1", "peak_flops_per_second": 4e12,
    }  # fmt: skip
    monkeypatch.setattr(gpu, "describe_card", lambda _: card)
    gpu.show(gpu.measure("cpu", tmp_path / "new" / "gpu.json", minutes=60, threads=1))
    assert arms.turns[:2] == [("trl_tuned", "32-true"), ("cached", "32-true")]
    once = ["trl_tuned", "cached", "trl_lora", "lora"]
    back = ["cached", "trl_tuned", "lora", "trl_lora"]
    assert [arm for arm, _ in arms.turns[2:]] == once + back + once + back + once
    report = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert report["equality"]["largest_difference"] == 0
    rows = {row["arm"]: row for row in report["summary"]}
    assert rows["cached"]["over_trl_tuned"][0] == pytest.approx(2)
    assert rows["lora"]["memory_over_trl_tuned"] == pytest.approx(0.5)
    # The share of what the card could do is half of that of what products reach on it.
    assert rows["cached"]["mfu"] == pytest.approx(rows["cached"]["utilisation"] / 2)
    assert rows["cached"]["peak_bytes"] == 5 * GIB
    assert (report["rounds"], len(report["runs"])) == (5, 20)
    assert "2.00 x TRL" in capsys.readouterr().out


def test_no_round_begins_that_would_end_too_late(gpu, arms, tmp_path):
    """An arm takes 100 s: 200 s for the equality, 400 s a round; the third would end at 1,400 s."""
    report = gpu.measure("cpu", tmp_path / "gpu.json", minutes=1399 / 60, threads=1)
    assert report["rounds"] == 2
    assert report["minutes"] == pytest.approx(1000 / 60)


def test_losses_that_differ_are_not_timed(gpu, arms, tmp_path, monkeypatch):
    def wrong(arm: str, out: Path, *, options: dict[str, Any]) -> dict[str, Any]:
        record = arms(arm, out, options=options)
        record["losses"][-1] += 0.01 * (arm == "cached")
        return record

    monkeypatch.setattr("run.run_arm", wrong)
    with pytest.raises(SystemExit, match="not timed"):
        gpu.measure("cpu", tmp_path / "gpu.json", minutes=60, threads=1)
    assert len(arms.turns) == 2
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize(
    ("memory", "full", "pairs"), [(24, "half", 8), (48, "half", 8), (80, "1b", 16)]
)
def test_sizes_fit_the_card(gpu, memory: int, full: str, pairs: int):
    """18 bytes a weight, in three fifths of the card at most; LoRA's weights take 4 bytes each."""
    weights, adapters = gpu.parts_of("cuda", memory * GIB)
    assert (weights.size, weights.pairs) == (full, pairs)
    sizes = []
    for part in (weights, adapters):
        size = gpu.SIZES[part.size]
        width = size.hidden * size.key_heads // size.heads
        layer = 2 * size.hidden * (size.hidden + width) + 3 * size.hidden * size.intermediate
        sizes.append(size.layers * layer + 2 * size.vocabulary * size.hidden)
    assert 18 * sizes[0] < 0.6 * memory * GIB
    assert 4 * sizes[1] < 0.6 * memory * GIB


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("something else", None),
        (None, None),
    ],
)
def test_the_peak_of_a_card(gpu, card: str | None, peak: float | None):
    assert gpu.peak_of(card) == peak


def test_without_a_gpu_it_is_one_line_and_its_code(gpu, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: no GPU is visible to torch here")
    assert captured.err.count("\n") == 1
    assert "Exit code 2" in (ROOT / "benchmarks" / "README.md").read_text()


def test_that_no_gpu_has_run_it_is_said_until_one_has():
    """In the README before its first heading, where nobody can miss it."""
    results = ROOT / "benchmarks" / "results"
    measured = [*results.glob("gpu*.json")]
    first = (ROOT / "README.md").read_text().partition("\n## ")[0]
    assert ("No GPU has run this project yet" in first) == (not measured)


@pytest.mark.long  # six processes that train with both programs
def test_the_whole_of_it_on_a_model_of_toy_size(tmp_path):
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--minutes", "0", "--threads", "1", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["rounds"] == 1
    assert {row["arm"] for row in report["summary"]} == {"trl_tuned", "cached", "trl_lora", "lora"}
    assert report["equality"]["largest_difference"] < 1e-3
