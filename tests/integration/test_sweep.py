"""Sweeps of real trials: grids, ranks, samplers, the experiments."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dpo_lightning.processes.lifeline import DIE_WITH_PARENT
from tests.support.recovery import rows
from tests.support.runs import ROOT, TINY, Run
from tests.support.sweeps import FAULTS, SMALL, alive, sweep
from tests.support.warm import start_train

pytestmark = pytest.mark.slow

# Grids -------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_grid_over_references_and_seeds_is_pooled(tmp_path):
    done = sweep(
        tmp_path, "reference=auto,none", "seed=1,2", *SMALL, "trainer.max_steps=2",
    )  # fmt: skip
    assert done.code == 0, done.stdout + done.stderr
    assert len(done.trials) == 4
    assert "reference-auto_seed-1" in done.trials
    found = done.report["configurations"]
    assert len(found) == 2
    assert all(c["seeds"] == [1, 2] for c in found)
    assert {c["label"] for c in found} == {"reference auto", "reference none"}
    # The evaluation pairs are the same for both seeds, so the error is over groups and seeds.
    assert all(c["value"]["stderr"] is not None for c in found)


# Says who its process was started by, when it is imported.
WHO = """
import os
from pathlib import Path
parent = Path(f"/proc/{os.getppid()}/cmdline").read_text()
Path(f"started-{os.getpid()}").write_text(parent)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="trials start warm on Linux")
def test_a_warm_trial_is_the_cold_one_to_the_bit(tmp_path):
    """Its steps draw from all generators; where nothing may outlive its parent all start cold."""
    noise = ("plugins=[who,tests.support.recovery]", "trainer.callbacks=[noise]")
    done = {}
    for name, environment in (("warm", {}), ("cold", {DIE_WITH_PARENT: "1"})):
        place = tmp_path / name
        place.mkdir()
        (place / "who.py").write_text(WHO)
        done[name] = sweep(
            place, "beta=0.1,0.5", *SMALL, *noise, "trainer.max_steps=6", **environment
        )
        assert done[name].code == 0, done[name].stdout + done[name].stderr
        started = [path.read_text() for path in place.glob("started-*")]
        assert sum("warm_server" in parent for parent in started) == (2 if name == "warm" else 0)
    for trial in ("beta-0.1", "beta-0.5"):
        warm, cold = (done[name].trial(trial) for name in ("warm", "cold"))
        assert rows(warm) == rows(cold)
        assert warm.result["metrics"] == cold.result["metrics"]
        weights = [run.folder / "model" / "model.safetensors" for run in (warm, cold)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


BLOCKS = """
- {loss: sigmoid, beta: [0.1, 0.5], optimizer.lr: [1e-3, 1e-2]}
- {loss: simpo, beta: 2, optimizer.lr: [1e-3, 1e-2]}
"""


@pytest.mark.long
def test_a_grid_in_blocks_is_one_sweep_and_is_resumed(tmp_path):
    """β and learning rate of two objectives: 4 + 2 trials; cells that are added run alone."""
    (tmp_path / "grid.yaml").write_text(BLOCKS)
    words = ["sweep.trials=grid.yaml", *SMALL, "trainer.max_steps=2"]
    done = sweep(tmp_path, *words)
    assert done.code == 0, done.stdout + done.stderr
    assert len(done.trials) == 6
    assert "beta-2_loss-simpo_optimizer.lr-1e-2" in done.trials
    told = {row["name"]: row for row in done.report["objectives"]["rows"]}
    assert {name: row["cells"] for name, row in told.items()} == {"sigmoid": 4, "simpo": 2}
    assert told["sigmoid"]["map"]["betas"] == [0.1, 0.5]
    assert told["sigmoid"]["map"]["rates"] == [0.001, 0.01]
    assert all(row["device_hours"] > 0 for row in told.values())
    results = [done.trial(name).result for name in done.trials]
    assert {(r["loss"], r["beta"]) for r in results} == {
        ("sigmoid", 0.1), ("sigmoid", 0.5), ("simpo", 2.0),
    }  # fmt: skip
    # One set of held-out rows for all, by name, so that their answers are paired.
    assert len({result["basis"]["held_out"] for result in results}) == 1
    files = [
        json.loads((done.folder / name / "evaluation.json").read_text()) for name in done.trials
    ]
    assert len({tuple(file["groups"]) for file in files}) == 1
    assert len(files[0]["groups"]) == len(files[0]["accuracies"]) == 40
    (tmp_path / "grid.yaml").write_text(BLOCKS.replace("beta: 2,", "beta: [2, 5],"))
    again = sweep(tmp_path, *words)
    assert again.code == 0, again.stdout + again.stderr
    assert len(again.trials) == 8
    assert again.stdout.count(" started on ") == 2


RATES = "optimizer.lr: [1e-2, 1e-3, 1e-4]"
PRUNED_BLOCKS = f"""
- {{loss: sigmoid, beta: [0.1, 0.5], {RATES}}}
- {{loss: simpo, beta: [2, 5], {RATES}}}
"""


@pytest.mark.long
def test_each_objective_and_beta_of_a_pruned_grid_in_blocks_keeps_its_best_rate(tmp_path):
    """Four pools of three rates: each is cut by its own, and its best goes on to the end.

    Half of three, rounded up, is two at the first rung and one at the next, unless nothing tells
    the others apart; the last rung's best of each pool has to be among the finished.
    """
    (tmp_path / "grid.yaml").write_text(PRUNED_BLOCKS)
    done = sweep(
        tmp_path, "sweep.trials=grid.yaml", "sweep.prune=halving", *SMALL, "trainer.max_steps=16",
        "optimizer.warmup=0", "evaluation.samples=0",
    )  # fmt: skip
    assert done.code == 0, done.stdout + done.stderr
    assert len(done.trials) == 12
    pools: dict[tuple[str, float], list[Run]] = {}
    for name in done.trials:
        run = done.trial(name)
        pools.setdefault((run.result["loss"], run.result["beta"]), []).append(run)
    assert sorted(pools) == [("sigmoid", 0.1), ("sigmoid", 0.5), ("simpo", 2.0), ("simpo", 5.0)]
    statuses = [run.result["status"] for runs in pools.values() for run in runs]
    assert set(statuses) == {"finished", "pruned"}
    for pool, runs in pools.items():
        assert len(runs) == 3
        scores: dict[int, list[tuple[float, str]]] = {}
        for run in runs:
            for line in (run.folder / "rungs.jsonl").read_text().splitlines():
                report = json.loads(line)
                assert report["metric"] == "eval/fitted_log_loss"
                scores.setdefault(report["rung"], []).append(
                    (report["value"], run.result["status"])
                )
        assert len(scores[0]) == 3
        assert min(scores[max(scores)])[1] == "finished", pool


@pytest.mark.long
def test_trials_of_two_ranks_are_pruned_like_those_of_one_process(tmp_path):
    """Two gloo ranks report at their rungs, and stop there, as one process does."""
    done = {}
    for name, ranks in (("one", ()), ("two", ("trainer.devices=2", "strategy=ddp"))):
        (tmp_path / name).mkdir()
        done[name] = sweep(
            tmp_path / name, "beta=0.1,0.5", "optimizer.lr=1e-2,1e-4", "sweep.prune=halving",
            "sweep.prune_at=[0.25,0.5]", *SMALL, "trainer.max_steps=8", "optimizer.warmup=0",
            "trainer.precision=32-true", *ranks,
        )  # fmt: skip
        assert done[name].code == 0, done[name].stdout + done[name].stderr
        assert len(done[name].trials) == 4
    ends = []
    for trial in done["one"].trials:
        one, two = (done[name].trial(trial) for name in ("one", "two"))
        ends.append(one.result["status"])
        assert two.result["status"] == ends[-1]
        reports = [
            [json.loads(line) for line in (run.folder / "rungs.jsonl").read_text().splitlines()]
            for run in (one, two)
        ]
        # One that can no longer be cut may run ahead past a rung, if a device is free by then.
        assert min(map(len, reports)) >= 1
        for left, right in zip(*reports, strict=False):
            assert left["values"] == pytest.approx(right["values"], rel=1e-4, abs=1e-6)
            assert {key: left[key] for key in ("rung", "step", "metric")} == {
                key: right[key] for key in ("rung", "step", "metric")
            }
    assert set(ends) == {"finished", "pruned"}


@pytest.mark.faults
def test_ranks_of_one_trial_never_meet_those_of_another(tmp_path):
    """Two gloo ranks a trial; the middle one fails on rank 0 while rank 1 waits for it."""
    (tmp_path / "faults.py").write_text(FAULTS)
    (tmp_path / "broken").touch()
    done = sweep(
        tmp_path, "beta=0.1,0.2,0.6", "plugins=[faults]", *SMALL, "trainer.devices=2",
        "strategy=ddp",
    )  # fmt: skip
    assert done.code == 1
    assert done.trials == ["beta-0.1", "beta-0.2", "beta-0.6"]
    statuses = [done.trial(f"beta-{beta}").result["status"] for beta in ("0.1", "0.2", "0.6")]
    assert statuses == ["finished", "failed", "finished"]
    assert alive(tmp_path) == []
    about = json.loads((done.folder / "beta-0.6" / "trial.json").read_text())
    assert about["devices"] == ["cpu:0", "cpu:1"]
    (tmp_path / "broken").unlink()
    alone = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "beta=0.6", "hydra.run.dir=alone", "logger=none",
         *TINY, "trainer.accelerator=cpu"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    rows = Run(0, tmp_path / "alone").values("train/loss")
    assert done.trial("beta-0.6").values("train/loss") == pytest.approx(rows, rel=1e-5)


def test_ranks_with_different_settings_are_refused(tmp_path):
    """Two processes of one group that were given different betas: an outside launcher's mistake."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        process = start_train(
            *(f"beta=0.{rank + 1}", "hydra.run.dir=run", "logger=none", *TINY),
            *("trainer.accelerator=cpu", "trainer.devices=2", "strategy=ddp"),
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                "NODE_RANK": "0", "LOCAL_RANK": str(rank),
                "DPO_LIGHTNING_CACHE": str(tmp_path / "cache"),
            },
        )  # fmt: skip
        processes.append(process)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert "different settings" in outputs[0]


@pytest.mark.long
def test_a_sampler_chooses_the_next_trials_by_the_last_ones(tmp_path):
    """Optuna's sweeper, in two batches; a trial that diverges has no value and stops nothing."""
    done = sweep(
        tmp_path, "hydra/sweeper=optuna", "hydra/sweeper/sampler=random",
        "hydra.sweeper.sampler.seed=5", "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=4", "beta=choice(0.1,1)",
        "optimizer.lr=choice(0.01,1e30)", "optimizer.max_grad_norm=null", *SMALL,
    )  # fmt: skip
    assert done.code == 1
    statuses = done.report["statuses"]
    assert (statuses["finished"], statuses["diverged"]) == (2, 2)
    chosen = yaml.safe_load((done.folder / "optimization_results.yaml").read_text())
    best = max(
        (run.result for name in done.trials if (run := done.trial(name)).result["metrics"]),
        key=lambda result: result["metrics"].get("controlled/expected_reward", -1),
    )
    assert chosen["best_value"] == best["metrics"]["controlled/expected_reward"]
    assert chosen["best_params"] == {"beta": best["beta"], "optimizer.lr": 0.01}


# The experiments ---------------------------------------------------------------------------------


@pytest.mark.long
def test_the_frontier_of_a_short_sweep(tmp_path):
    """KL falls as beta grows, and every point is on or under the closed-form curve."""
    done = sweep(
        tmp_path, "experiment=frontier", "beta=0.5,2,8", "data.controlled.train_groups=8192",
        "evaluation.samples=64",
    )  # fmt: skip
    assert done.code == 0, done.stdout + done.stderr
    runs = [done.trial(f"beta-{beta}").result["metrics"] for beta in ("0.5", "2", "8")]
    kls = [run["controlled/kl_policy_reference"] for run in runs]
    assert kls == sorted(kls, reverse=True)
    for run in runs:
        assert run["controlled/expected_reward"] <= run["controlled/optimal_reward_at_kl"] + 1e-6
        assert run["controlled/gain_ratio"] > 0.85
        error = run["samples/kl_stderr"]
        assert abs(run["samples/kl"] - run["controlled/kl_policy_reference"]) < 4 * error
    assert sum(done.trial(t).result["reference"]["computed"] for t in done.trials) == 9216
    assert done.report["metric"] == "controlled/expected_reward"
    assert len(done.report["optimum"]) == 60


SCORER = """
from dpo_lightning.plugins import register_scorer

@register_scorer("polite")
def polite(prompts, answers):
    return [float("please" in a.lower()) + len(a) / 1000 for a in answers]
"""


@pytest.mark.long
def test_a_sweep_on_real_data_with_a_scorer(shared: Path, tmp_path):
    (tmp_path / "mine.py").write_text(SCORER)
    done = sweep(
        tmp_path, "beta=0.03,1", "plugins=[mine]", "evaluation.judge=polite",
        f"model.pretrained={shared / 'models' / 'stories260k'}",
        f"data.train={shared / 'data' / 'politeness.jsonl'}",
        "optimizer.lr=5e-4", "trainer.max_steps=20", "data.batch_size=16",
        "trainer.accelerator=cpu", "hydra.launcher.devices=2", "evaluation.samples=64",
        "evaluation.max_new_tokens=24",
    )  # fmt: skip
    assert done.code == 0, done.stdout + done.stderr
    results = [done.trial(name).result for name in done.trials]
    assert len(results) == 2
    rows = results[0]["reference"]["rows"]
    # What 20 steps of 16 rows see, and the evaluation.
    assert rows == 20 * 16 + results[0]["data"]["eval_groups"]
    assert sum(result["reference"]["computed"] for result in results) == rows
    report = done.report
    assert report["metric"] == "samples/judge"
    assert report["kl_metric"] == "samples/kl"
    # Nearly all answers end at 24 tokens: neither judge nor KL says which is better.
    assert min(result["metrics"]["samples/cut_off"] for result in results) > 0.05
    assert report["pick"] is None
    assert report["reason"].startswith("No pick by the judge's mark of sampled responses")
    origins = [c["kl_origin"] for c in report["configurations"]]
    assert {(o["answers"], o["max_new_tokens"], o["temperature"]) for o in origins} == {(64, 24, 1)}
    assert all(o["per_token"] > 0 and o["cut_off"] > 0.05 for o in origins)
    for result in results:
        metrics = result["metrics"]
        assert 0 <= metrics["samples/win_rate"] <= 1
        assert metrics["samples/kl"] > 0
        assert metrics["samples/kl_stderr"] > 0
    # The same draws of the reference in every trial.
    assert len({result["metrics"]["samples/reference_judge"] for result in results}) == 1
    # From the strongest tie to the weakest the KL does not fall.
    kls = {result["beta"]: result["metrics"]["samples/kl"] for result in results}
    assert kls[1] < kls[0.03]
    assert "win rate over the reference" in (done.folder / "report.md").read_text()
