"""Summaries of the benchmark's records, and the completeness of the records that are kept."""

import json
import math
import re

import pytest

from tests.support.benches import RESULTS, load
from tests.support.runs import ROOT


@pytest.fixture(scope="module")
def results():
    return load("results")


def record(arm: str, speed: float, peak: float) -> dict:
    return {
        "shape": "lognormal", "precision": "32-true", "arm": arm, "pairs_per_second": speed,
        "peak_bytes": peak, "flops_per_second": 1e9 * speed, "import_seconds": 5.0,
        "times": [1.0, 2.0, 3.0], "loop_seconds": 3.0, "reported_pairs_per_second": 8.0,
    }  # fmt: skip


def report(runs: list[dict]) -> dict:
    return {
        "machine": {
            "date": "2026-01-01", "cpu": "a cpu", "gpu": None, "cores": 2, "threads": 2,
            "python": "3.11", "versions": {"torch": "2"},
        },
        "matrix_flops_per_second": {"32-true": 1e11},
        "model": {"layers": 8, "hidden": 384, "vocabulary": 8192},
        "pairs_per_step": 8,
        "equality": {"largest_difference": 1e-5, "moved": 0.1, "steps": 6},
        "runs": runs,
    }  # fmt: skip


def test_medians_and_ratios(results):
    """Medians 2 and 8: four times as fast, with 0.7 of the memory; 8 GFLOP/s of 100 are 8%."""
    runs = [record("trl_tuned", speed, 1000) for speed in (1, 2, 9)]
    runs += [record("cached", speed, 700) for speed in (7, 8, 9)]
    rows = {row["arm"]: row for row in results.summarise(report(runs))}
    assert rows["cached"]["pairs_per_second"][0] == 8
    assert rows["cached"]["over_trl_tuned"][0] == 4
    low, high = rows["cached"]["over_trl_tuned"][1:]
    assert 7 / 9 <= low < 4 < high <= 9
    assert rows["cached"]["memory_over_trl_tuned"] == pytest.approx(0.7)
    assert rows["cached"]["utilisation"] == pytest.approx(0.08)
    # 8 pairs a step, three steps in three seconds: 8 a second outside and reported.
    assert rows["cached"]["reported_over_outside"] == pytest.approx(1)


def test_the_files_of_a_report(results, tmp_path):
    runs = [record(arm, speed, 1e9) for arm in ("trl_tuned", "cached") for speed in (1.0, 2.0)]
    results.write_results(tmp_path, report(runs))
    table = (tmp_path / "cpu.md").read_text()
    assert "cached: reference once" in table
    assert json.loads((tmp_path / "cpu.json").read_text())["summary"]
    assert (tmp_path / "cpu.png").stat().st_size > 1000


def test_a_report_of_adapters_alone(results, tmp_path):
    runs = [record(arm, speed, 1e9) for arm in ("trl_lora", "lora") for speed in (1.0, 2.0)]
    results.write_results(tmp_path / "lora", report(runs))
    assert "| LoRA | 2 |" in (tmp_path / "lora" / "cpu.md").read_text()
    assert (tmp_path / "lora" / "cpu.png").stat().st_size > 1000


def test_rows_have_the_lengths_that_are_counted(tmp_path):
    workload = load("workload")
    made = workload.Workload.make(
        tmp_path / "w", workload.Size(200, 32, 64, 1, 2, 2), workload.SHAPES["256/64"], rows=6
    )
    assert made.lengths == ((256, 64, 64),) * 6
    first, second = made.flops(3, 2)
    # By hand for a pair: layers, head, attention.
    weights = 4 * 32 * 32 + 3 * 32 * 64
    attention = 2 * 32 * (2 * 320**2 - 256**2)
    assert first == second == 9 * (2 * weights * 384 + 2 * 200 * 32 * 128 + attention)


def row_of_readme(name: str, rows: list[dict], shape: str, precision: str, arms: tuple) -> str:
    """A row of the table on speed, from the results that are kept."""
    found = {r["arm"]: r for r in rows if (r["shape"], r["precision"]) == (shape, precision)}
    trl, here = (found[arm] for arm in arms)
    return (
        f"| {name} | {'bf16' if precision == 'bf16-mixed' else 'float32'} "
        f"| {trl['pairs_per_second'][0]:.2f} | {here['pairs_per_second'][0]:.2f} "
        f"| {here['over_trl_tuned'][0]:.1f} | {here['memory_over_trl_tuned']:.0%} |"
    )


def test_what_is_kept_is_what_the_readme_says(results):
    kept = json.loads((RESULTS / "cpu.json").read_text())
    assert results.summarise(kept) == kept["summary"]
    adapters = json.loads((RESULTS / "lora" / "cpu.json").read_text())
    assert results.summarise(adapters) == adapters["summary"]
    table = [
        row_of_readme(shape, kept["summary"], shape, precision, ("trl_tuned", "cached"))
        for shape in ("lognormal", "128/128")
        for precision in ("bf16-mixed", "32-true")
    ]
    words = ("lognormal, LoRA", adapters["summary"], "lognormal", "32-true")
    table.append(row_of_readme(*words, ("trl_lora", "lora")))
    readme = (ROOT / "README.md").read_text()
    assert "\n".join(table) in readme
    said = re.search(r"Four values of β.*take\s+(\d+) s against (\d+) s", readme)
    assert said is not None
    sweep = kept["sweep"]
    assert said.groups() == (f"{sweep['ours_seconds']:.0f}", f"{sweep['trl_seconds']:.0f}")


# Beside an older commit --------------------------------------------------------------------------


def test_the_ratio_is_that_of_paired_rounds():
    """Ratios 1.1 and 1/1.1 have the geometric mean 1; their logs are +-0.09531.

    With 2 rounds t is tan(0.475 pi) = 12.706 and sd = 0.09531 * sqrt(2), so the log's error is
    12.706 * 0.09531.
    """
    ratio = load("against").Ratio.of([1.1, 10.0], [1.0, 11.0])
    assert ratio.value == pytest.approx(1)
    assert ratio.high == pytest.approx(math.exp(math.tan(0.475 * math.pi) * math.log(1.1)))
    assert ratio.low == pytest.approx(1 / ratio.high)


def test_a_commit_is_written_out_and_an_unknown_one_is_one_line(tmp_path):
    against = load("against")
    with pytest.raises(SystemExit, match="--against nothing: git knows no such commit"):
        against.checkout("nothing", tmp_path / "a")
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    assert len(against.checkout("HEAD", tmp_path / "b")) == 40
    assert (tmp_path / "b" / "train.py").is_file()


PROGRAM = """
import json, sys
from pathlib import Path

run = Path(next(a for a in sys.argv if a.startswith("hydra.run.dir=")).partition("=")[2])
run.mkdir()
(run / "metrics.jsonl").write_text(json.dumps({"train/loss": LOSS}))
sum(i * i for i in range(300_000))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "said"), [("0.5", False), ("0.25", True)])
def test_both_trees_run_in_turns_and_other_losses_are_said(
    tmp_path, monkeypatch, capsys, loss: str, said: bool
):
    """On two trees whose program only spends a moment."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    against = load("against")
    for name, value in (("here", "0.5"), ("older", loss)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text(PROGRAM.replace("LOSS", value))
    monkeypatch.setattr(against, "ROOT", tmp_path / "here")

    def checkout(commit, folder):
        (tmp_path / "older").rename(folder)
        return commit * 10

    monkeypatch.setattr(against, "checkout", checkout)
    (tmp_path / "work").mkdir()
    ratios = against.compare("abcd", tmp_path / "work", rounds=2)
    assert set(ratios) == set(against.JOBS)
    assert all(ratio.low <= ratio.value <= ratio.high for ratio in ratios.values())
    out = capsys.readouterr().out
    assert "against abcdabcdabcd, 2 rounds" in out
    assert out.count("CPU seconds") == len(ratios)
    assert ("the losses differ" in out) == said
    assert len(list((tmp_path / "work").glob("*-*-*/metrics.jsonl"))) == 6 * len(ratios)
