"""Reading a sweep's folder in any state, pooling its trials, and the words about them."""

import io
import json
import os
import re
import sys

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.run.page.text import cut, range_text
from dpo_lightning.run.page.values import number
from dpo_lightning.sweeps.report.analysis import Analysis, analyse
from dpo_lightning.sweeps.report.pick import PickRule
from dpo_lightning.sweeps.report.read import TrialResult, override_key, override_value, read_sweep
from dpo_lightning.sweeps.report.text import code_block, escape_markdown, own_words
from dpo_lightning.sweeps.report.write import main, write_report
from tests.support.sweep_folders import scored, scored_metrics, write_trial

ACCURACY = "eval/rewards/accuracies"


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def only(sweep) -> TrialResult:
    [trial] = read_sweep(sweep).trials
    return trial


def analysed(sweep, metric=None) -> Analysis:
    return analyse(read_sweep(sweep), metric)


# Which folders are trials, and in which order -----------------------------------------------------


def test_trials_are_folders_with_a_mark_in_the_order_of_their_values(tmp_path):
    """In the order of texts 10 would come before 2, and 1e-3 after both."""
    for beta in ("10", "2", "1e-3"):
        write_trial(tmp_path, f"beta-{beta}", f"beta={beta}")
    write_trial(tmp_path, "default")
    (tmp_path / "wandb").mkdir()
    (tmp_path / ".staged").mkdir()
    (tmp_path / ".staged" / "result.json").write_text("{}")
    (tmp_path / "result.json").write_text("{}")
    names = [trial.name for trial in read_sweep(tmp_path).trials]
    assert names == ["beta-1e-3", "beta-2", "beta-10", "default"]


@pytest.mark.parametrize(("name", "said"), [("gone", "no such folder"), (".", "no trial in it")])
def test_a_folder_without_trials_is_an_error_that_says_what_to_do(tmp_path, name, said):
    with pytest.raises(UserError, match=f"{said}.*name the folder of a sweep"):
        read_sweep(tmp_path / name)


# What became of a trial --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launched", "said", "status", "error"),
    [
        ("finished", "finished", "finished", None),
        # The launcher has not noticed the end yet.
        ("running", "finished", "finished", None),
        (None, "finished", "finished", None),
        # The launcher saw what the run could not know.
        ("failed", "finished", "failed", "ended with exit code 7"),
        ("stopped", "finished", "stopped", "ended with exit code 7"),
        # The result is an earlier attempt's.
        ("running", "failed", "running", None),
        ("waiting", None, "waiting", None),
        ("running", None, "running", None),
        # It says that it finished, and nothing of it is there.
        ("finished", None, "failed", "ended without a readable result.json"),
        (None, 5, "failed", "ended without a readable result.json"),
        (None, "diverged", "diverged", None),
    ],
)
def test_the_launcher_and_the_run_together_say_what_became_of_a_trial(
    tmp_path, launched, said, status, error
):
    folder = write_trial(tmp_path, "a", result=said is not None)
    change(folder / "trial.json", status=launched, exit_code=7)
    if said is not None:
        change(folder / "result.json", status=said)
    if launched is None:
        (folder / "trial.json").unlink()
    trial = only(tmp_path)
    assert (trial.status, trial.error) == (status, error)
    assert trial.finished == (status == "finished")
    assert trial.failed == (status in ("failed", "stopped", "diverged"))


def test_an_error_is_one_line_and_a_log_is_named_from_the_sweep(tmp_path):
    write_trial(tmp_path, "a", status="failed", error="CUDA out of memory:\n  tried\tto")
    trial = only(tmp_path)
    assert trial.error == "CUDA out of memory: tried to"
    assert trial.log == "a/trial.log"


def test_a_run_that_was_started_by_hand_has_its_own_log(tmp_path):
    folder = write_trial(tmp_path, "a")
    (folder / "trial.json").unlink()
    assert only(tmp_path).log is None
    (folder / "train.log").write_text("")
    assert only(tmp_path).log == "a/train.log"


def test_what_a_trial_was_follows_from_its_overrides_until_it_has_a_result(tmp_path):
    write_trial(tmp_path, "a", "beta=0.3", "+seed=4", "loss='ipo'", status="running", result=False)
    trial = only(tmp_path)
    assert (trial.beta, trial.seed, trial.loss) == (0.3, 4, "ipo")
    assert trial.settings == ("beta=0.3", "loss='ipo'")
    assert (trial.step, trial.command, trial.metric("x")) == (None, None, None)


# Damaged files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["trial.json", "result.json", "evaluation.json", ".hydra/overrides.yaml"]
)
def test_a_damaged_file_is_noted_by_its_name(tmp_path, name):
    folder = write_trial(tmp_path, "a", evaluation={})
    (folder / ".hydra").mkdir()
    (folder / "trial.json").write_text("{}")
    (folder / name).write_text('{"a": [')
    assert read_sweep(tmp_path).notes == (f"a/{name} is damaged and was left out",)


def test_a_torn_last_line_is_no_damage_and_other_lines_are_counted(tmp_path):
    folder = write_trial(tmp_path, "a")
    whole = '{"step": 1, "x": 2.0}\n'
    (folder / "metrics.jsonl").write_text(f'{whole}{whole}{{"step": 2, "x"')
    assert read_sweep(tmp_path).notes == ()
    assert only(tmp_path).series("x") == ([1.0], [2.0])
    (folder / "metrics.jsonl").write_bytes(b'\xff\xfe\n[1]\n\n{"step": 1, "x": 2.0}\nnull')
    assert read_sweep(tmp_path).notes == ("a/metrics.jsonl: 2 damaged lines were left out",)
    assert only(tmp_path).series("x") == ([1.0], [2.0])


def test_of_a_step_that_was_taken_twice_the_later_value_counts(tmp_path):
    """A resumed run went back to step 1 and took step 2 again."""
    rows = [{"step": 1, "x": 1.0}, {"step": 2, "x": 9.0}, {"step": 3, "y": 0.0}]
    rows += [{"step": 2, "x": 2.0}, {"step": 4, "x": None}, {"step": "5", "x": 5.0}]
    write_trial(tmp_path, "a", rows=rows)
    assert only(tmp_path).series("x") == ([1.0, 2.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (2, 2.0), (-0.5, -0.5), (True, None), ("1", None), (None, None), ([1], None),
        (float("nan"), None), (float("inf"), None), (-float("inf"), None), (10**400, None),
        # The square of the first is not finite any more.
        (1e200, None), (1e38, 1e38),
    ],
)  # fmt: skip
def test_numbers_are_finite_and_can_be_reckoned_with(value, read):
    assert number(value) == read


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("beta=0.1", "beta", "0.1"), ("+data.train='a=b'", "data.train", "a=b"),
        ("++x=", "x", ""), ("~x", "x", ""), ("x='", "x", "'"), ('x="y"', "x", "y"),
    ],
)  # fmt: skip
def test_an_override_has_a_key_and_a_value(line, key, value):
    assert (override_key(line), override_value(line)) == (key, value)


def edit_result(**values):
    return lambda folder: change(folder / "result.json", **values)


def edit_trial(**values):
    return lambda folder: change(folder / "trial.json", **values)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        edit_result(metrics={ACCURACY: 1e308, "samples/kl": -1e308}),
        edit_result(metrics={ACCURACY: 0.7, "samples/kl": 1.0, "samples/kl_stderr": -1.0}),
        edit_result(metrics={ACCURACY: 0.7, "samples/kl": 0.0, "samples/kl_stderr": 0.0}),
        edit_result(metrics=[1], throughput=[1], reference="x", command=["x"], step=[1]),
        edit_result(seed=1e300, beta="x", loss=["a"], error=[1]),
        edit_result(beta=-1.0),
        edit_result(versions={"torch": ["2.13.0"], "python": {"a": 1}}),
        edit_trial(name="\x1b[31m\ud800", log="\ud800/trial.log", status="failed"),
        edit_trial(overrides=["beta", 1, None], status=["x"], log=3, name=[]),
        lambda folder: folder.rename(folder.with_name(os.fsdecode(b"beta-\xff"))),
    ],
)
def test_whatever_a_file_holds_there_is_a_report(tmp_path, damage):
    write_trial(tmp_path, "whole", "beta=0.5", metrics={ACCURACY: 0.6, "samples/kl": 2.0})
    damage(write_trial(tmp_path, "odd", "beta=0.1", metrics={ACCURACY: 0.7, "samples/kl": 3.0}))
    report = write_report(tmp_path)
    assert len(report["trials"]) == 2
    assert report["pick"] is not None
    assert "\x1b" not in (tmp_path / "report.md").read_text()


def test_a_trial_of_which_nothing_is_known_but_its_end_has_a_row(tmp_path):
    folder = write_trial(tmp_path, "a", "beta=0.1")
    (folder / "result.json").write_text('{"status": "finished"}')
    report = write_report(tmp_path)
    assert [c["label"] for c in report["configurations"]] == ["β 0.1"]
    assert report["pick"] is None


def test_a_folder_whose_name_is_no_text_is_linked_by_its_bytes(tmp_path):
    write_trial(tmp_path, os.fsdecode(b"beta-\xff"), "beta=0.1", status="failed")
    write_report(tmp_path)
    assert 'href="beta-%FF/trial.log"' in (tmp_path / "report.html").read_text()


def test_curves_that_cannot_be_drawn_are_left_out(tmp_path):
    rows = [{"step": i, "train/loss": 1e308 * (-1) ** i} for i in range(200)]
    write_trial(tmp_path, "a", metrics={ACCURACY: 0.7}, rows=rows)
    write_report(tmp_path)
    assert "Learning curves" not in (tmp_path / "report.html").read_text()


# Pooling and choosing ----------------------------------------------------------------------------


def test_seeds_with_half_of_the_numbers_each_are_pooled_as_far_as_they_go(tmp_path):
    write_trial(tmp_path, "a", "beta=0.1", "seed=1", metrics={ACCURACY: 0.7})
    write_trial(tmp_path, "b", "beta=0.1", "seed=2", metrics={"samples/kl": 3.0})
    report = write_report(tmp_path)
    [found] = report["configurations"]
    assert (found["value"]["mean"], found["kl"]["mean"], found["seeds"]) == (0.7, 3.0, [1, 2])


def test_only_finished_seeds_count_and_the_others_are_said(tmp_path):
    for seed, status in ((1, "finished"), (2, "failed"), (3, "running")):
        write_trial(
            tmp_path, f"s{seed}", "beta=0.1", f"seed={seed}",
            status=status, metrics={ACCURACY: seed / 10},
        )  # fmt: skip
    found = analysed(tmp_path)
    assert found.pick.seeds == [1]
    assert found.pick.value.mean == pytest.approx(0.1)
    assert found.pick.unfinished == 2
    assert "Of its trials 2 did not finish" in found.reason


def test_settings_of_two_commands_in_one_folder_are_told_apart(tmp_path):
    """Both sweep beta alone, on other data; the seed and the folder make no difference."""
    for name, data, seed in (("a", "x.jsonl", 1), ("b", "y.jsonl", 1), ("c", "y.jsonl", 2)):
        write_trial(
            tmp_path, name, "beta=0.1", f"seed={seed}", metrics={ACCURACY: 0.5},
            command=f"python train.py data.train={data} beta=0.1 seed={seed} "
            f"hydra.run.dir={name} resume=auto",
        )  # fmt: skip
    found = analysed(tmp_path)
    parts = [(part.of, [len(c.trials) for c in part.configurations]) for part in (
        found, *found.others
    )]  # fmt: skip
    assert parts == [("data.train y.jsonl", [2]), ("data.train x.jsonl", [1])]


def test_the_kl_error_of_seeds_that_agree_by_chance_is_that_of_their_samples(tmp_path):
    """Seeds 2.0 and 2.0: no spread, but each mean has error 0.4, so theirs is 0.4 / sqrt(2).

    Seeds 1.0 and 3.0: deviation sqrt(2), standard error 1, more than their samples explain.
    """
    for beta, kls in ((0.1, (2.0, 2.0)), (0.2, (1.0, 3.0))):
        for seed, kl in enumerate(kls, start=1):
            write_trial(
                tmp_path, f"b{beta}s{seed}", f"beta={beta}", f"seed={seed}",
                metrics={ACCURACY: 0.5, "samples/kl": kl, "samples/kl_stderr": 0.4},
            )  # fmt: skip
    by_beta = {c.beta: c.kl for c in analysed(tmp_path).configurations}
    assert by_beta[0.1].stderr == pytest.approx(0.4 / 2**0.5)
    assert by_beta[0.2].stderr == pytest.approx(1.0)


def test_the_metric_is_the_first_that_most_trials_have(tmp_path):
    """One of three was scored: its score cannot rank the others."""
    for i in range(3):
        metrics = {ACCURACY: 0.5 + i / 10} | ({"samples/judge": 3.0} if i == 0 else {})
        write_trial(tmp_path, f"t{i}", f"beta={i + 1}", metrics=metrics)
    assert analysed(tmp_path).metric == ACCURACY
    assert analysed(tmp_path, "samples/judge").metric == "samples/judge"
    with pytest.raises(UserError, match=f"they have samples/judge, {ACCURACY}$"):
        analysed(tmp_path, "samples/win_rate")


@pytest.mark.parametrize(
    ("kls", "said"),
    [
        ((1.0, 2.0), "of the 2 configurations that lose at most 0.100 (95% for all 2 at once, not "
         "paired) it is the closest to the reference: KL 1.00 nats"),
        ((1.0, None), "it is not known to be farther: KL 1.00 nats"),
        ((None, None), "1 more lose at most 0.100 (95% for all 2 at once, not paired), and without "
         "a KL nothing says which is closer to the reference"),
        ((2.0, 1.0), "it stays closest to the reference: KL 1.00 nats, not 2.00"),
    ],
)  # fmt: skip
def test_the_reason_claims_no_more_than_is_known(tmp_path, kls, said):
    """Scores a hair apart: 0.01, of errors 0.02 each, 0.028 of their difference."""
    for i, kl in enumerate(kls):
        metrics = {"samples/judge": 1 - i / 100, "samples/judge_stderr": 0.02}
        metrics |= {} if kl is None else {"samples/kl": kl}
        write_trial(tmp_path, f"t{i}", f"beta={i + 1}", metrics=metrics)
    assert said in analyse(read_sweep(tmp_path), None, PickRule(margin=0.1)).reason


def test_items_are_paired_only_where_they_are_the_same(tmp_path):
    """The same prompts: over samples. Other prompts: no item is another's, and seeds are one."""
    for beta in (0.1, 0.2):
        evaluation = scored([1.0, 2.0, 3.0], [0.0] * 3, [1.0] * 3)
        if beta == 0.2:
            evaluation["samples"][0]["judge"] = 0.5
        write_trial(
            tmp_path, f"b{beta}", f"beta={beta}",
            metrics=scored_metrics(evaluation), evaluation=evaluation,
        )  # fmt: skip
    found = analysed(tmp_path).comparison
    assert (found.unit, found.test.count) == ("held-out prompts", 3)
    assert found.test.difference == pytest.approx(0.5 / 3)
    evaluation["samples"][1]["prompt"] = "another"
    (tmp_path / "b0.2" / "evaluation.json").write_text(json.dumps(evaluation))
    found = analysed(tmp_path).comparison
    assert (found.unit, found.test) == (None, None)
    assert "cannot be paired" in found.sentence


def test_ties_are_half_a_win(tmp_path):
    """A win, a tie, a loss and a win: (1 + 0.5 + 0 + 1) / 4 = 0.625; of losses alone 0."""
    for beta, scores in ((0.1, [2.0, 1.0, 0.0, 2.0]), (0.2, [0.0] * 4)):
        evaluation = scored(scores, [1.0] * 4, [1.0] * 4)
        write_trial(
            tmp_path, f"b{beta}", f"beta={beta}",
            metrics=scored_metrics(evaluation), evaluation=evaluation,
        )  # fmt: skip
    found = analysed(tmp_path, "samples/win_rate")
    assert found.pick.value.mean == pytest.approx(0.625)
    assert found.comparison.test.difference == pytest.approx(0.625)


@pytest.mark.parametrize(("key", "paired"), [("data.batch_size", True), ("data.eval", False)])
def test_accuracies_of_other_data_are_ranked_by_themselves(tmp_path, key, paired):
    for value, right in ((1, 6), (2, 4)):
        write_trial(
            tmp_path, f"t{value}", f"{key}={value}", metrics={ACCURACY: right / 8},
            evaluation={"accuracies": [1.0] * right + [0.0] * (8 - right)},
        )  # fmt: skip
    found = analysed(tmp_path)
    assert (found.comparison is not None and found.comparison.test is not None) == paired
    assert len(found.others) == (not paired)


def test_files_of_before_are_read_by_their_old_names(tmp_path):
    """The marks of a run were called scores: the same numbers under both names."""
    found = []
    for age, old in (("now", False), ("before", True)):
        for beta, marks in ((0.1, [2.0, 1.0, 0.0, 2.0]), (0.2, [0.0] * 4)):
            evaluation = scored(marks, [1.0] * 4, [1.0] * 4)
            metrics = scored_metrics(evaluation)
            if old:
                metrics = {k.replace("judge", "score"): v for k, v in metrics.items()}
                evaluation = json.loads(json.dumps(evaluation).replace("judge", "score"))
                evaluation["scorer"] = evaluation.pop("score")
            write_trial(
                tmp_path / age, f"b{beta}", f"beta={beta}", metrics=metrics, evaluation=evaluation
            )
        for name in (None, "samples/win_rate", "samples/score", "samples/judge"):
            analysis = analysed(tmp_path / age, name)
            values = [(c.value, c.win_rate) for c in analysis.configurations]
            found.append((analysis.metric, analysis.reference_value, values))
    assert found[:4] == found[4:]
    assert [metric for metric, *_ in found[:3]] == [
        "samples/judge", "samples/win_rate", "samples/judge"
    ]  # fmt: skip


def test_outcomes_of_pairs_are_items_without_marks(tmp_path):
    """Two wins, a loss, and one unknown: 2/3 of what is known, by the run's own metric."""
    for beta, wins in ((0.1, [1.0, 1.0, 0.0, None]), (0.2, [0.5, 0.5, 0.5, None])):
        evaluation = scored([0.0] * 4, [0.0] * 4, [1.0] * 4)
        for row, win in zip(evaluation["samples"], wins, strict=True):
            row |= {"win": win, "judge": None, "reference_judge": None}
        known = [win for win in wins if win is not None]
        write_trial(
            tmp_path, f"b{beta}", f"beta={beta}", evaluation=evaluation,
            metrics={"samples/win_rate": sum(known) / 3, ACCURACY: 0.5},
        )  # fmt: skip
    found = analysed(tmp_path)
    assert found.metric == "samples/win_rate"
    by_beta = {c.beta: c.value for c in found.configurations}
    assert by_beta[0.1].mean == pytest.approx(2 / 3)
    assert by_beta[0.1].stderr > 0
    assert by_beta[0.2].stderr == 0


def test_the_reference_wins_half_against_itself(tmp_path):
    metrics = {"samples/win_rate": 0.8, "samples/judge": 2.0, "samples/reference_judge": 1.0}
    write_trial(tmp_path, "a", metrics=metrics)
    assert analysed(tmp_path).reference_value == 1.0
    assert analysed(tmp_path, "samples/win_rate").reference_value == 0.5


# Texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"), ("*x* _y_ `z`", r"\*x\* \_y\_ \`z\`"), ("<b>&", "&lt;b&gt;&amp;"),
        ("[a](b)", r"\[a\](b)"), ("one\n\n  two", "one<br>two"), ("# h", r"\# h"),
        ("\x1b[31m\ud800\r\n$x$", r"\[31m<br>\$x\$"), ("\\|", r"\\\|"),
    ],
)  # fmt: skip
def test_nothing_in_a_text_is_markdown(text, escaped):
    assert escape_markdown(text) == escaped


def test_a_fence_is_longer_than_any_in_it():
    block = code_block(["echo ````", "x"])
    assert block.splitlines() == ["`````sh", "echo ````", "x", "`````"]
    assert escape_markdown(block) is block


def test_long_texts_are_cut_where_they_say_less():
    assert cut("abcdef", 3) == "abc…"
    assert cut("abcdef", 3, keep_end=True) == "…def"
    assert cut("ab ", 2) == "ab"
    assert cut(None) == ""


@pytest.mark.parametrize(
    ("command", "own"),
    [
        ("python train.py beta=0.1 hydra.run.dir=x resume=auto", "python train.py beta=0.1"),
        ("python train.py 'plugins=[a b]' hydra/launcher=basic", "python train.py 'plugins=[a b]'"),
        ("python train.py 'name=open", "python train.py 'name=open"),
        ("python train.py name=\x1b[31m", "python train.py 'name=[31m'"),
    ],
)
def test_a_command_is_the_users_own(command, own):
    assert own_words(command) == own


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(0.1, 0.2, "0.100 to 0.200"), (None, 0.2, ""), (0.5, 0.5, ""), (-1, 1, "−1.00 to 1.00")],
)
def test_a_range_without_a_width_is_not_said(low, high, text):
    assert range_text(low, high) == text


# The command -------------------------------------------------------------------------------------


def test_a_terminal_without_greek_letters_gets_the_pick_all_the_same(tmp_path, monkeypatch):
    write_trial(tmp_path, "a", "beta=0.1", metrics={ACCURACY: 0.7})
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main([str(tmp_path)]) == 0
    sys.stdout.flush()
    assert re.search(rb"^pick      \? 0\.1", written.getvalue(), flags=re.MULTILINE)
