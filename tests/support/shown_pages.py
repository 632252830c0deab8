"""Pages of every kind out of folders that no run made, full of what is hard to show."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from dpo_lightning.run.page.write import write_run_page
from dpo_lightning.sweeps.compare.command import compare
from dpo_lightning.sweeps.compare.page import comparison_page
from dpo_lightning.sweeps.compare.subjects import Subject, group_items
from dpo_lightning.sweeps.report.write import write_report
from tests.support.sweep_folders import curve, scored, scored_metrics, write_trial

HOSTILE = '<b>"β" -- & </title>'
WORD = "w" * 120
REWARD, KL = "controlled/expected_reward", "controlled/kl_policy_reference"


def write_run(folder: Path) -> Path:
    """The page of a run that diverged after 12,000 steps, with texts of every length."""
    rows: list[dict[str, Any]] = [
        {
            "step": step,
            "train/loss": 0.69 - step / 30_000,
            "train/rewards/accuracies": 0.5 + step / 40_000,
            "train/rewards/margins": -step / 7e6,
            "train/learning_rate": 5e-7 * (1 - step / 12_000),
            "train/grad_norm": 12_345.0 + step,
        }
        for step in range(100, 12_001, 100)
    ]
    rows[-1] |= {"eval/loss": 0.5, "samples/kl": 1.2e-5}
    answers = [
        {"prompt": HOSTILE, "before": "first", "after": "then", "reference": "", "preferred": WORD},
        {"prompt": "long " * 90, "before": WORD, "after": f"line\n\tline {WORD}", "reference": "r"},
    ]
    samples = [{"prompt": "q", "policy": "p " * 200, "reference": "r", "judge": 7.25}]
    made = write_trial(
        folder, f"loss-sigmoid_data.train-{WORD}", "beta=0.1", status="diverged",
        error=f"loss is nan at step 12,001: {HOSTILE} {WORD}", rows=rows,
        metrics={f"eval/by_length/{i}/rewards/accuracies": 0.5 + i / 99 for i in range(30)},
        evaluation={"answers": answers, "samples": samples},
        command=f"dpo-lightning train data.train=/{WORD}/rows.jsonl beta=0.1",
    )  # fmt: skip
    result = json.loads((made / "result.json").read_text())
    result |= {
        "signs": [{"says": f"the policy hardly moved: {WORD}"}],
        "step": 12_000,
        "exported_step": 12_000,
        "model": {"name": WORD},
        "data": {"train_groups": 986_000, "eval_groups": 109, "dropped": {"too_long": 3_456}},
        "throughput": {"pairs_per_second": 12.5, "tokens_per_second": 81_234.5, "seconds": 9_000},
        "versions": dict.fromkeys(("torch", "lightning", "transformers"), "2.13.0+cpu"),
    }
    (made / "result.json").write_text(json.dumps(result))
    (made / "config.yaml").write_text(json.dumps({"beta": 0.3, "data": {"train": f"/{WORD}"}}))
    (made / "model").mkdir()
    return write_run_page(made)


def _policy(sweep: Path, beta: float, seed: int, *more: str, reward: float, kl: float) -> Path:
    """A finished trial of the embedded task with a judge's marks and curves."""
    evaluation = scored([1.0, 2.0], [0.0, 3.0], [kl, kl])
    evaluation["optimum"] = [
        {"kl": x / 4, "reward": 1.5 + 2 * math.sqrt(x / 4), "beta": 1.0} for x in range(60)
    ]
    name = "_".join((f"beta-{beta}", f"seed-{seed}", *(one.replace("=", "-") for one in more)))
    metrics = scored_metrics(evaluation) | {
        REWARD: reward, KL: kl, "controlled/reference_reward": 1.5, "eval/rewards/accuracies": 0.8,
        "controlled/gain_ratio": 0.9, "eval/logratios/chosen": -13.48,
    }  # fmt: skip
    folder = write_trial(
        sweep, name, f"beta={beta}", f"seed={seed}", *more, metrics=metrics,
        evaluation=evaluation, rows=curve(60, level=0.3),
    )  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    result |= {"model": {"name": "qwen3-0.6b"}, "data": {"train_groups": 986, "eval_groups": 109}}
    result["throughput"] |= {"total_seconds": 4_000.0}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_sweep(sweep: Path) -> dict[str, Any]:
    """The report of three β with two seeds each, and of a trial that failed at length.

    Returns:
        What the report says, the content of ``sweep.json``.
    """
    for beta in (0.05, 0.1, 1.0):
        for seed in (1, 2):
            _policy(sweep, beta, seed, reward=6 - beta - seed / 9, kl=0.3 / beta)
    write_trial(sweep, "x", "beta=2", status="failed", error=f"{HOSTILE} {WORD * 3}")
    return write_report(sweep)


def write_wide_sweep(sweep: Path) -> dict[str, Any]:
    """The report of two objectives over β and learning rate, with all that a report may have.

    Marks of a leaderboard, the frontier of one policy, signs, and labels as long as a path.
    """
    for number, beta in enumerate((0.01, 0.03, 0.1, 0.3, 1.0, 3.0)):
        for rate in ("5e-07", "1e-06", "2e-06"):
            reward = 6 - abs(number - 2) * 0.7 - float(rate) * 1e5
            _policy(sweep, beta, 1, f"optimizer.lr={rate}", reward=reward, kl=4.9 - number)
    for beta, more in ((2.0, "loss.gamma=1"), (10.0, f"data.train={'rows' * 9}.jsonl")):
        folder = _policy(sweep, beta, 1, "loss=simpo", more, reward=5 + beta / 20, kl=2 + beta / 9)
    result = json.loads((folder / "result.json").read_text())
    result["signs"] = [{"says": f"answers never end: 61 of 64 were cut off {WORD}"}]
    (folder / "result.json").write_text(json.dumps(result))
    points = [
        {
            "lambda": share, "beta": 0.5 / share if share else None, "method": "decoded",
            "reward": 1 + share, "reward_interval": [share, 2 + share], "kl": 2 * share,
            "kl_interval": [2 * share, 3 * share], "ess": 16.0, "gain_ratio": 0.97,
            "samples": [{"prompt": "q " * 30, "response": f"{share} {WORD}"}],
        }
        for share in (0.0, 0.25, 0.5, 1.0, 2.0)
    ]  # fmt: skip
    found = {"axis": "beta", "points": points, "notes": ["β is 0.5/λ."], "drawn": {"as_run": True}}
    (folder / "interpolation.json").write_text(json.dumps(found))
    board = sweep.parent / "leaderboard.csv"
    board.write_text(f"name,win_rate,length_controlled\n{folder.name},17.25,22.0\nnobody,1,2\n")
    return write_report(sweep, marks=board)


def write_comparison(path: Path) -> Path:
    """The page of three policies, of which one has a long name."""
    names = [f"p{n:03}-g" for n in range(40)]
    subjects = [
        Subject(
            label,
            f"runs/{label}",
            beta,
            {
                metric: group_items(names, [float((n * step) % 7 > 2) for n in range(40)])
                for metric in ("eval/rewards/accuracies", "eval/fitted_log_loss", "samples/kl")
            },
            Counter(names),
            {},
            [{"prompt": f"{WORD} {HOSTILE}", "preferred": "good", "answer": f"{label} {WORD}"}],
        )
        for label, beta, step in (("beta-0.1", 0.1, 3), ("beta-3", 3.0, 5), (WORD, None, 2))
    ]
    path.write_text(comparison_page(compare(subjects), subjects))
    return path
