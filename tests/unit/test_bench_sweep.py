"""The benchmark of whole sweeps: its arms, its arithmetic, and the table that is kept."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """The module, imported with its neighbours as the program does."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import sweep  # type: ignore[import-not-found]
        import sweep_results  # type: ignore[import-not-found]

        sweep.results = sweep_results
        yield sweep
    finally:
        sys.path.remove(str(BENCHMARKS))


def run(arm: str, turn: int, wall: float, cpu: float) -> dict:
    return {"arm": arm, "round": turn, "wall_seconds": wall, "cpu_seconds": cpu}


def part(runs: list[dict], **more) -> dict:
    machine = {"date": "2026-01-01", "cpu": "a cpu", "cores": 2}
    return {
        "machine": machine,
        "against": "abcd" * 10,
        "load": 0.1,
        "betas": [0.1] * 8,
        "runs": runs,
    } | more


def test_one_run_of_trl_is_its_start_its_steps_and_its_evaluation(bench):
    """Built 30 s after the start; after 8 steps of 5 s come steps of 2 s each.

    100 steps are 200 s, and with an evaluation of 7 s the run takes 30 + 200 + 7 = 237 s.
    """
    times = [135.0 + 5 * i for i in range(8)] + [172.0 + 2 * i for i in range(21)]
    record = {"started": 100.0, "built": 130.0, "times": times, "evaluation_seconds": 7.0}
    found = bench.trl_seconds(record, steps=100)
    assert found["step_seconds"] == pytest.approx(2.0)
    assert found["steady_steps"] == 20
    assert found["run_seconds"] == pytest.approx(237.0)


def test_the_ratios_are_of_paired_rounds_and_of_eight_runs(bench):
    """Tiny: 10 and 20 against 20 and 40 s are 0.5. Pruned: 90 over 8 * 135 = 1080 s is 1 / 12."""
    tiny = [run("there", 1, 40, 8), run("here", 0, 10, 2), run("there", 0, 20, 4)]
    tiny += [run("here", 1, 20, 4)]
    runs = [run("grid here", 0, 200, 1), run("grid there", 0, 225, 1), run("pruned", 0, 90, 1)]
    runs.append(run("one rung", 0, 45, 1))
    more = {"trl": [{"round": 0, "run_seconds": 135.0}], "rows": 2048, "steps": 256}
    more |= {"pairs": 8, "precision": "32-true", "shape": "short"}
    report = {
        "tiny": part(tiny),
        "large": part(runs, **more, model={"layers": 8, "hidden": 384}),
    }
    found = {name: value for name, (value, *_) in bench.results.ratios(report).items()}
    assert found == pytest.approx(
        {
            "eight tiny trials over the older commit": 0.5,
            "their CPU seconds over the older commit": 0.5,
            "whole grid over TRL tuned, one β after the other": 200 / 1080,
            "whole grid over the older commit's": 200 / 225,
            "pruned over the older commit's whole grid": 0.4,
            "pruned over TRL tuned, one β after the other": 1 / 12,
            "one rung over the older commit's whole grid": 0.2,
            "one rung over TRL tuned, one β after the other": 1 / 24,
        }
    )
    table = bench.results.table(report)
    assert "| here | 2 | 15.0 | 3.0 |" in table
    assert "| TRL tuned, 8 runs | 1 | 1080.0 | – |" in table
    assert "there is abcdabcdabcd" in table


@pytest.mark.parametrize("known", [True, False])
def test_the_pruned_sweep_is_an_arm_where_the_checkout_knows_it(
    bench, tmp_path, monkeypatch, known
):
    swept, asked = [], {}

    def sweep(tree, folder, settings, *, betas):
        assert betas == (0.1, 0.2)
        swept.append((folder.name, tree.name, set(bench.PRUNED["pruned"]) <= set(settings)))
        return bench.Spent(1.0, 2.0)

    def arm(name, out, *, options):
        asked.update(options)
        times = [float(i) for i in range(options["steps"])]
        return {"started": 0.0, "built": 3.0, "times": times, "evaluation_seconds": 1.0}

    monkeypatch.setattr(bench, "knows", lambda *_: known)
    monkeypatch.setattr(bench, "run_sweep", sweep)
    monkeypatch.setattr(bench, "run_arm", arm)
    trees = {"here": Path("here"), "there": Path("there")}
    scale = bench.Scale((0.1, 0.2), "toy", 64, 16, 4, 4)
    found = bench.large(trees, tmp_path, scale=scale, rounds=2, threads=1)
    names = [name for name, *_ in swept]
    grids = ["large-grid here-0", "large-grid there-0"]
    if known:
        assert names[:4] == [*grids, "large-pruned-0", "large-one rung-0"]
        assert names[4:6] == ["large-one rung-1", "large-pruned-1"]  # the other way round
    else:
        assert names == [*grids, "large-grid there-1", "large-grid here-1"]
    assert [tree for name, tree, pruned in swept if pruned] == ["here"] * 4 * known
    # The steps that are timed and those before them; all rows have their reference computed.
    assert asked["steps"] == 1 + bench.WARM + 4
    assert len(asked["ordered"].read_text().splitlines()) == 64
    assert [one["run_seconds"] for one in found["trl"]] == [3.0 + 16 + 1.0] * 2


PROGRAM = """
import json, subprocess, sys
from pathlib import Path

run = Path(next(a for a in sys.argv if a.startswith("hydra.sweep.dir=")).partition("=")[2])
run.mkdir()
status = ["finished"] * 7 + [STATUS]
(run / "sweep.json").write_text(json.dumps({"trials": [{"status": s} for s in status]}))
burn = "import time\\nwhile time.process_time() < 0.3: pass"
# A process that nobody waits for.
subprocess.Popen([sys.executable, "-c", burn], start_new_session=True)
"""

OUTSIDE = """
import sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import sweep
sweep.adopt_orphans()
spent = sweep.run_sweep(Path({tree!r}), Path({folder!r}), [])
print(spent.cpu >= 0.3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "said"), [("pruned", "True"), ("failed", "7 of 8 trials ended")]
)
def test_a_sweep_is_timed_with_all_its_processes_and_only_whole(tmp_path, status, said):
    (tmp_path / "train.py").write_text(PROGRAM.replace("STATUS", repr(status)))
    code = OUTSIDE.format(
        benchmarks=str(BENCHMARKS), tree=str(tmp_path), folder=str(tmp_path / "run")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said in done.stdout + done.stderr


def test_the_page_has_the_table_of_what_is_kept(bench):
    file = BENCHMARKS / "results" / "sweep.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    assert bench.results.ratios(kept) == kept.get("ratios", {})
    page = (BENCHMARKS / "README.md").read_text()
    begin, end = (page.index(mark) for mark in bench.results.MARKS)
    assert (
        page[begin + len(bench.results.MARKS[0]) : end].strip() == bench.results.table(kept).strip()
    )


def test_a_toy_does_not_overwrite_what_was_measured(bench, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--toy"])
    with pytest.raises(SystemExit, match="name another folder"):
        bench.main()


def test_arms_that_are_timed_again_take_the_place_of_their_own_figures_alone(bench):
    work = {name: 1 for name in ("betas", "rows", "evaluated", "pairs", "steps")}
    work |= {"precision": "32-true", "shape": "short", "model": {"layers": 8}}
    work |= {"machine": {"cpu": "a cpu"}, "load": 0.1}
    kept = work | {"runs": [run("grid here", 0, 9, 1), run("pruned", 0, 5, 1)], "trl": [1]}
    found = work | {"runs": [run("pruned", 0, 4, 1)]}
    merged = bench.merged(kept, found, ["pruned"])
    assert merged["runs"] == [run("grid here", 0, 9, 1), run("pruned", 0, 4, 1)]
    assert (merged["trl"], merged["again"]["arms"]) == ([1], ["pruned"])
    for other in ({"shape": "lognormal"}, {"machine": {"cpu": "another"}}):
        with pytest.raises(SystemExit, match="--again: the kept figures"):
            bench.merged(kept, found | other, ["pruned"])
