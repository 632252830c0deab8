"""The report of a sweep, from folders of files: its ranking, pick, tests, figures and words."""

import json
import math
import re
import subprocess
import sys

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.run.page.text import number_text
from dpo_lightning.sweeps.report.analysis import analyse
from dpo_lightning.sweeps.report.read import read_sweep
from dpo_lightning.sweeps.report.text import error_text, label_of
from dpo_lightning.sweeps.report.write import main, write_report
from tests.support.runs import ROOT
from tests.support.sweep_folders import curve, scored, scored_metrics, write_trial


def reward_trial(sweep, beta: float, reward: float, kl: float, *, seed: int = 1, **more):
    metrics = {
        "controlled/expected_reward": reward,
        "controlled/kl_policy_reference": kl,
        "controlled/reference_reward": 1.5,
        "samples/kl": kl + 0.01,
        "samples/kl_stderr": 0.1,
        # Grows with beta by itself: whoever ranks by it gets the order wrong.
        "eval/rewards/margins": 10 * beta,
        "eval/rewards/accuracies": 0.8,
        "eval/logratios/chosen": -kl,
        "eval/logratios/rejected": -2 * kl,
    }
    optimum = [{"kl": x, "reward": 1.5 + 2 * math.sqrt(x), "beta": 1.0} for x in range(7)]
    return write_trial(
        sweep,
        f"beta-{beta}_seed-{seed}",
        f"beta={beta}",
        f"seed={seed}",
        metrics=metrics,
        evaluation={"answers": [], "optimum": optimum, "samples": []},
        rows=curve(60, level=0.3),
        **more,
    )


@pytest.fixture
def sweep(tmp_path):
    return tmp_path / "2026-11-24_sweep"


# Ranking -----------------------------------------------------------------------------------------


def test_trials_are_ranked_by_reward_and_never_by_margin(sweep):
    for beta, reward, kl in ((0.1, 6.0, 5.0), (1.0, 5.0, 1.5), (10.0, 2.0, 0.1)):
        reward_trial(sweep, beta, reward, kl)
    report = write_report(sweep)
    assert report["metric"] == "controlled/expected_reward"
    assert report["kl_metric"] == "controlled/kl_policy_reference"
    assert [c["beta"] for c in report["configurations"]] == [0.1, 1.0, 10.0]
    assert report["pick"]["beta"] == 0.1
    assert report["reference_value"] == 1.5
    assert len(report["optimum"]) == 7


def test_a_reward_margin_cannot_be_asked_for(sweep):
    reward_trial(sweep, 0.1, 6.0, 5.0)
    with pytest.raises(UserError, match="not one to rank by"):
        write_report(sweep, metric="eval/rewards/margins")
    with pytest.raises(UserError, match="no finished trial has it"):
        write_report(sweep, metric="samples/judge")


def test_scores_of_the_same_prompts_are_paired(sweep):
    """Scores s, s + 2 alternate over 100 prompts, so each mean is s + 1, of error 0.1.

    Means 2.00, 1.995 and 1.80, all moving together: the differences are the same everywhere, and
    their errors are the floor alone, a deviation of 1 over 100 prompts, 0.01. The second loses at
    most 0.005 + 2 * 0.01, the third more than the margin, a hundredth of the gain of 2, is 0.02.
    """
    for beta, mean, kl in ((0.1, 2.0, 9.0), (0.3, 1.995, 4.0), (1.0, 1.8, 1.0)):
        scores = [mean - 1 + 2 * (i % 2) for i in range(100)]
        evaluation = scored(scores, [0.0] * 100, [kl] * 100)
        write_trial(
            sweep, f"beta-{beta}", f"beta={beta}",
            metrics=scored_metrics(evaluation), evaluation=evaluation,
        )  # fmt: skip
    report = write_report(sweep, margin=0.03)
    assert report["metric"] == "samples/judge"
    assert report["configurations"][0]["beta"] == 0.1
    assert report["configurations"][0]["value"]["stderr"] == pytest.approx(0.1, rel=0.1)
    assert report["pick"]["beta"] == 0.3
    assert "KL 4.00 nats" in report["pick"]["reason"]
    bounds = [c["upper"] for c in report["decision"]["candidates"]]
    assert 0.005 + 1.6 * 0.01 < bounds[1] < 0.005 + 2 * 0.01
    assert 0.2 + 1.6 * 0.01 < bounds[2] < 0.2 + 2 * 0.01
    assert report["comparison"]["unit"] == "held-out prompts"
    assert report["comparison"]["test"]["difference"] == pytest.approx(0.005)
    assert report["comparison"]["test"]["p"] < 0.001
    # By itself the margin is a hundredth of the gain, and the second does not keep that.
    undecided = write_report(sweep)
    assert undecided["decision"]["margin"] == pytest.approx(0.02)
    assert (undecided["pick"]["beta"], undecided["pick"]["undecided"]) == (0.1, True)


def test_without_a_scorer_the_accuracy_ranks_with_its_bootstrap_interval(sweep):
    """300 of 400 groups right: the standard error is sqrt(0.75 * 0.25 / 400) = 0.02165."""
    for beta, right in ((0.1, 300), (0.5, 200)):
        write_trial(
            sweep, f"beta-{beta}", f"beta={beta}",
            metrics={
                "eval/rewards/accuracies": right / 400, "samples/kl": 2.0,
                "samples/kl_stderr": 0.25,
            },
            evaluation={"accuracies": [1.0] * right + [0.0] * (400 - right), "samples": []},
        )  # fmt: skip
    report = write_report(sweep)
    best = report["configurations"][0]
    assert report["metric"] == "eval/rewards/accuracies"
    assert (best["beta"], best["value"]["mean"]) == (0.1, 0.75)
    assert best["value"]["stderr"] == pytest.approx(0.02165, rel=0.1)
    assert best["value"]["low"] == pytest.approx(0.75 - 1.96 * 0.02165, abs=0.006)
    assert best["kl"] == pytest.approx(
        {"mean": 2.0, "stderr": 0.25, "low": 2 - 1.96 * 0.25, "high": 2 + 1.96 * 0.25}, abs=1e-3
    )


def test_seeds_are_pooled_and_the_best_two_compared_seed_by_seed(sweep):
    """Means of three seeds: 5 and 4; differences 0.9, 1.0, 1.1. Of 2^3 signs p is at least 2/8."""
    for beta, rewards in ((0.1, (4.9, 5.0, 5.1)), (1.0, (4.0, 4.0, 4.0))):
        for seed, reward in enumerate(rewards, start=1):
            reward_trial(sweep, beta, reward, 1.0, seed=seed)
    report = write_report(sweep)
    assert [c["seeds"] for c in report["configurations"]] == [[1, 2, 3], [1, 2, 3]]
    best = report["configurations"][0]
    assert best["value"]["mean"] == pytest.approx(5.0)
    assert best["value"]["stderr"] == pytest.approx(0.1 / math.sqrt(3))
    assert best["trials"] == ["beta-0.1_seed-1", "beta-0.1_seed-2", "beta-0.1_seed-3"]
    test = report["comparison"]["test"]
    assert (test["difference"], test["count"]) == (pytest.approx(1.0), 3)
    assert test["p"] == pytest.approx(0.25)
    assert "no p could be below 0.25" in report["comparison"]["sentence"]


def test_settings_that_differ_are_not_pooled(sweep):
    for i, (key, value) in enumerate(
        [("reference", "auto"), ("reference", "none"), ("loss", "ipo")]
    ):
        write_trial(
            sweep, f"t{i}", "beta=0.1", f"{key}={value}",
            metrics={"eval/rewards/accuracies": 0.5 + i / 10},
        )  # fmt: skip
    labels = [c["label"] for c in write_report(sweep)["configurations"]]
    assert labels == [
        "β 0.1, loss ipo",
        "β 0.1, reference none, loss sigmoid",
        "β 0.1, reference auto, loss sigmoid",
    ]


def test_ties_and_missing_kls_still_have_a_pick(sweep):
    for beta in (0.1, 0.2):
        write_trial(sweep, f"b{beta}", f"beta={beta}", metrics={"eval/rewards/accuracies": 0.8})
    report = write_report(sweep)
    assert report["pick"]["beta"] in (0.1, 0.2)
    assert report["kl_metric"] is None


# Sweeps that did not go well ---------------------------------------------------------------------


def test_failed_and_running_trials_are_named_with_their_logs(sweep):
    reward_trial(sweep, 0.1, 6.0, 5.0)
    write_trial(sweep, "beta-0.2", "beta=0.2", status="failed", error="out of memory")
    write_trial(sweep, "beta-0.3", "beta=0.3", status="running", result=False)
    report = write_report(sweep)
    assert report["statuses"] == {"finished": 1, "failed": 1, "running": 1}
    assert [c["beta"] for c in report["configurations"]] == [0.1]
    for text in ((sweep / "report.html").read_text(), (sweep / "report.md").read_text()):
        assert "out of memory" in text
        assert "beta-0.2/trial.log" in text
        assert "running" in text
    by_name = {trial["name"]: trial for trial in report["trials"]}
    assert by_name["beta-0.2"]["log"] == "beta-0.2/trial.log"
    assert by_name["beta-0.3"]["error"] is None


def test_signs_of_a_failed_training_stand_beside_their_trial(sweep):
    reward_trial(sweep, 0.1, 6.0, 5.0)
    folder = reward_trial(sweep, 0.2, 5.0, 4.0)
    result = json.loads((folder / "result.json").read_text())
    said = "answers repeat themselves: 40% | of <them>; raise beta"
    result["signs"] = [{"name": "x", "values": {"y": 0.4}, "says": said}, {"name": "x"}, 7]
    (folder / "result.json").write_text(json.dumps(result))
    report = write_report(sweep)
    assert [trial["signs"] for trial in report["trials"]] == [[], [said]]
    page, text = ((sweep / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "<h2>Signs of a failed training</h2>" in page
    assert "40% | of &lt;them&gt;; raise beta" in page
    [line] = [line for line in text.splitlines() if "repeat themselves" in line]
    assert line.startswith("| beta-0.2\\_seed-1 | answers")
    result["signs"] = []
    (folder / "result.json").write_text(json.dumps(result))
    write_report(sweep)
    assert "Signs of a failed" not in (sweep / "report.md").read_text()


def test_a_sweep_without_a_finished_trial_has_a_report_without_a_pick(sweep):
    write_trial(sweep, "a", "beta=0.1", status="diverged", error="nan")
    report = write_report(sweep)
    assert report["pick"] is None
    assert "No trial has finished" in (sweep / "report.md").read_text()
    assert (sweep / "frontier.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["result.json", "evaluation.json", "trial.json", "metrics.jsonl"])
@pytest.mark.parametrize("text", ["", "{", "[1]", '{"metrics": [1]}', "\0\xff", '{"a": 1}\n{"tor'])
def test_damaged_files_say_less_and_stop_nothing(sweep, name, text):
    reward_trial(sweep, 0.1, 6.0, 5.0)
    folder = reward_trial(sweep, 0.2, 5.0, 4.0)
    (folder / name).write_text(text, encoding="latin-1")
    assert analyse(read_sweep(sweep)).configurations[0].beta == 0.1


def test_a_trial_that_its_launcher_saw_fail_is_not_finished(sweep):
    """A trial is killed by a signal after it had written its result."""
    folder = reward_trial(sweep, 0.1, 6.0, 5.0)
    about = json.loads((folder / "trial.json").read_text())
    (folder / "trial.json").write_text(json.dumps(about | {"status": "failed", "exit_code": -9}))
    report = write_report(sweep)
    assert report["statuses"] == {"failed": 1}
    assert report["trials"][0]["error"] == "ended with exit code -9"


def test_trials_of_another_launcher_are_known_by_hydras_overrides(sweep):
    for beta in (0.1, 0.2):
        folder = reward_trial(sweep, beta, 6.0, 5.0)
        (folder / "trial.json").unlink()
        (folder / ".hydra").mkdir()
        lines = [f"beta={beta}", "data.batch_size=8", "hydra.sweep.dir=s"]
        (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {line}\n" for line in lines))
    assert [t.overrides for t in read_sweep(sweep).trials] == [("beta=0.1",), ("beta=0.2",)]


def test_values_that_are_no_numbers_do_not_count(sweep):
    reward_trial(sweep, 0.1, 6.0, 5.0)
    folder = reward_trial(sweep, 0.2, 7.0, 5.0)
    result = json.loads((folder / "result.json").read_text())
    result["metrics"]["controlled/expected_reward"] = None
    (folder / "result.json").write_text(json.dumps(result))
    report = write_report(sweep, metric="controlled/expected_reward")
    assert report["pick"]["beta"] == 0.1
    assert report["configurations"][1]["value"] is None
    # Left to itself it takes what all of them have.
    assert write_report(sweep)["metric"] == "eval/rewards/accuracies"


# What is written ---------------------------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script> | `x` **b** ![i](http://e) \x1b[31m \ud800 $\\frac$ " + "y" * 5000
)


def hostile_sweep(sweep) -> None:
    evaluation = scored([1.0, 2.0], [0.0, 3.0], [0.1, 0.2])
    for row in evaluation["samples"]:
        row |= dict.fromkeys(("prompt", "preferred", "reference", "policy"), HOSTILE)
    write_trial(
        sweep, "a", "beta=0.1", f"name='{HOSTILE[:60]}'",
        metrics=scored_metrics(evaluation), evaluation=evaluation, rows=curve(50, level=0.2),
        command=f"python train.py beta=0.1 'name={HOSTILE[:60]}'",
    )  # fmt: skip
    write_trial(sweep, "b", "beta=0.2", status="failed", error=HOSTILE)


def test_texts_of_a_data_set_are_no_markup(sweep):
    hostile_sweep(sweep)
    write_report(sweep)
    html = (sweep / "report.html").read_text()
    # The only script is the page's own, and the page lets no other run.
    assert html.count("<script") == 1
    assert "&lt;script&gt;" in html
    assert "\x1b" not in html
    assert "y" * 500 not in html
    markdown = (sweep / "report.md").read_text()
    outside = re.sub(r"```.*?```", "", markdown, flags=re.S)
    assert "<script" not in outside
    assert "![i](" not in outside
    # A pipe or a line break would end a cell: every row of a table has as many cells as its head.
    lines = outside.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            if lines[number - 1].startswith("|"):
                assert cells == len(re.findall(r"(?<!\\)\|", lines[number - 1])), line


@pytest.mark.slow
def test_the_report_says_the_same_twice(sweep):
    reward_trial(sweep, 0.1, 6.0, 5.0)
    reward_trial(sweep, 1.0, 5.0, 1.0)
    write_report(sweep)
    names = ("report.html", "report.md", "frontier.png", "sweep.json", "trials.csv")
    first = [(sweep / name).read_bytes() for name in names]
    write_report(sweep)
    assert [(sweep / name).read_bytes() for name in names] == first
    assert sorted(path.name for path in sweep.iterdir() if path.is_file()) == sorted(names)


def test_answers_stand_side_by_side_and_commands_reproduce_the_rows(sweep):
    for beta in (0.1, 1.0):
        answers = [
            {"prompt": "Hi", "preferred": "good", "reference": "ref", "after": f"from {beta}"}
        ]
        write_trial(
            sweep, f"b{beta}", f"beta={beta}",
            metrics={"eval/rewards/accuracies": 0.8}, evaluation={"answers": answers},
            command=f"python train.py beta={beta} hydra.run.dir=x hydra.mode=RUN resume=auto",
        )  # fmt: skip
    report = write_report(sweep)
    line = next(x for x in (sweep / "report.md").read_text().splitlines() if x.startswith("| Hi"))
    # The recommended one comes first.
    assert line == "| Hi | from 0.1 | ref | good | from 1.0 |"
    commands = [c["commands"] for c in report["configurations"]]
    assert sorted(commands) == [["python train.py beta=0.1"], ["python train.py beta=1.0"]]


def test_many_configurations_are_drawn_and_few_answers_shown(sweep):
    for i in range(40):
        evaluation = scored([float(i), i + 1.0], [0.0, 0.0], [0.1 * i, 0.1 * i])
        write_trial(
            sweep, f"t{i}", f"beta={0.01 * (i + 1):g}",
            metrics=scored_metrics(evaluation), evaluation=evaluation,
        )  # fmt: skip
    write_report(sweep)
    markdown = (sweep / "report.md").read_text()
    [head] = [x for x in markdown.splitlines() if x.startswith("| prompt |")]
    assert head.count("β") == 7
    assert "β 0.4 " in head  # the pick is among them


# The command -------------------------------------------------------------------------------------


def test_a_report_made_again_keeps_the_rule_of_the_sweep(sweep, capsys):
    """The rule that a sweep was started with is that of `report SWEEP`, until a flag changes it."""
    reward_trial(sweep, 0.1, 6.0, 9.0)
    reward_trial(sweep, 0.5, 5.0, 4.0)
    write_report(sweep, margin=0.03, kl_budget=12.0)

    def made(*flags):
        assert main([str(sweep), *flags]) == 0
        return json.loads((sweep / "sweep.json").read_text())

    assert made()["asked"] == {"metric": None, "margin": 0.03, "kl_budget": 12.0}
    assert made()["decision"]["margin"] == 0.03
    assert "--margin=0.03 --kl-budget=12.0" in (sweep / "report.md").read_text()
    changed = made("--margin", "0.01", "--kl-budget=none")
    assert changed["asked"] == {"metric": None, "margin": 0.01, "kl_budget": None}
    assert changed["decision"]["margin"] == 0.01
    # The sweep's own end says all of its rule.
    assert write_report(sweep)["asked"] == {"metric": None, "margin": None, "kl_budget": None}
    with pytest.raises(SystemExit):
        main([str(sweep), "--margin", "-1"])
    assert "must be a finite number >= 0, or none" in capsys.readouterr().err


def test_the_command_writes_it_at_any_time(sweep, capsys):
    reward_trial(sweep, 0.1, 6.0, 5.0)
    assert main([str(sweep)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert main([str(sweep), "--metric", "eval/rewards/accuracies"]) == 0
    assert json.loads((sweep / "sweep.json").read_text())["metric"] == "eval/rewards/accuracies"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nowhere"], "no such folder"), ([".", "--metric", "loss"], "no trial in it")],
)
def test_a_wrong_folder_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_it_needs_no_torch(sweep):
    reward_trial(sweep, 0.1, 6.0, 5.0)
    code = (
        "import sys; from dpo_lightning.sweeps.report.write import main;"
        f"main([{str(sweep)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


# Small parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0, "0"), (0.12345, "0.123"), (-1.5, "−1.50"), (123.4, "123"),
        (2634.4, "2,634"), (987654.0, "987,654"), (12345678.0, "1.23e+07"), (1e-7, "1.00e−07"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("mean", "stderr", "text"),
    [
        (0.84237, 0.0123, "0.842 ± 0.012"), (12.3, 4.56, "12.3 ± 4.6"), (0.5, None, "0.500"),
        (-3.0, 0.5, "−3.00 ± 0.50"), (1.23456, 0.0, "1.235"), (None, 0.1, "–"),
        (150.0, 12.0, "150 ± 12"),
    ],
)  # fmt: skip
def test_errors_decide_the_digits(mean, stderr, text):
    assert error_text(mean, stderr) == text


def test_labels_are_short():
    assert label_of(["beta=0.1", "optimizer.lr=1e-05"], 0.1) == "β 0.1, lr 1e-05"
    assert label_of([], 0.3) == "β 0.3"
    assert label_of(["data.train=/a/very/long/folder/with/a/name/rows.jsonl"], None).endswith(
        "rows.jsonl"
    )


def test_the_closed_form_is_only_drawn_for_the_true_reward(sweep):
    reward_trial(sweep, 0.1, 6.0, 5.0)
    assert analyse(read_sweep(sweep)).optimum
    assert analyse(read_sweep(sweep), "eval/rewards/accuracies").optimum == ()
