"""Rounds: what is drawn is trained on, from the start or the policy before, and resumed exactly."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_lightning import assets
from dpo_lightning.data.rounds import RoundPlan
from dpo_lightning.run.rounds import conduct
from tests.support.ranks import launch
from tests.support.recovery import assert_same_end, checkpoint
from tests.support.runs import TINY, Run, run_train

COUNT, STEPS = 3, 4
ROUNDS = (
    *(*TINY, f"rounds.count={COUNT}", f"rounds.steps={STEPS}", "optimizer.lr=0.01"),
    *("checkpoint.every_n_steps=1", "checkpoint.keep=99", "optimizer.warmup=0"),
    # So that a round has several batches of answers.
    "data.micro_batch_tokens=64",
)
# Four steps of sixteen pairs; four answers make two pairs: 32 prompts.
PLAN = RoundPlan(
    count=COUNT,
    steps=STEPS,
    prompts=None,
    groups_per_prompt=2,
    batch_size=16,
    offline_fraction=0.0,
    seed=1,
)
# Four answers make one ranking: 64 prompts.
RANKED = replace(PLAN, groups_per_prompt=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    run = run_train(tmp_path_factory.mktemp("whole") / "run", *ROUNDS)
    assert run.code == 0
    return run


def rows_of(run: Run, round: int) -> list[dict]:
    lines = (run.folder / "rounds" / f"{round}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def at(run: Run, name: str) -> dict[int, float]:
    """Values of a metric by step."""
    return {row["step"]: row[name] for row in run.rows if name in row}


def test_each_round_leaves_its_rows(whole):
    """Four answers a prompt, two pairs; labels drawn by the reward do not always follow it."""
    policies = set()
    agreeing = total = 0
    for round in (1, 2, 3):
        rows = rows_of(whole, round)
        assert 30 <= len(rows) <= 64
        about = rows[0]["provenance"]
        assert (about["round"], about["step"]) == (round, (round - 1) * STEPS)
        policies.add(about["policy"])
        agreeing += sum(row["marks"][0] > row["marks"][1] for row in rows)
        total += len(rows)
    assert len(policies) == 3
    assert 0.5 * total < agreeing < total
    assert sorted(path.name for path in (whole.folder / "rounds").iterdir()) == [
        *(f".{n}.json" for n in (1, 2, 3)),
        *(f"{n}.jsonl" for n in (1, 2, 3)),
    ]


def test_the_start_is_the_reference_of_all_rounds(whole):
    """The policy is the reference at step 1: ln 2. At step 5 it has moved, and the pairs are new.

    The mean log-probability of the chosen under the reference is ``logps/chosen`` less
    ``logratios/chosen``; here it is computed with the bundled model, response by response.
    """
    loss = at(whole, "train/loss")
    assert loss[1] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(loss[5] - math.log(2)) > 1e-3
    rows = rows_of(whole, 2)
    chosen = [rows[number]["provenance"] for number in PLAN.drawn_groups(STEPS, len(rows), 32)]
    expected = [reference_logp(own["prompt_ids"], own["response_ids"][0]) for own in chosen]
    found = at(whole, "train/logps/chosen")[5] - at(whole, "train/logratios/chosen")[5]
    assert found == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def reference_logp(prompt: list[int], response: list[int]) -> float:
    """Log-probability of a response under the bundled model, token by token."""
    model = AutoModelForCausalLM.from_pretrained(assets.__path__[0] + "/tiny_llama").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].float()
    logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return float(logps.gather(1, torch.tensor(response)[:, None]).sum())


def test_rounds_are_measured_where_they_begin_and_end(whole):
    assert at(whole, "rounds/round") == {0: 1.0, 4: 2.0, 8: 3.0}
    assert at(whole, "rounds/prompts") == {0: 32.0, 4: 32.0, 8: 32.0}
    rewards = at(whole, "controlled/expected_reward")
    assert set(rewards) == {4, 8, 12}
    assert at(whole, "rounds/mark")[8] > at(whole, "rounds/mark")[0]
    # A mean of 128 draws beside the exact mean of all answers.
    spread = at(whole, "rounds/mark_spread")[8]
    assert abs(at(whole, "rounds/mark")[8] - rewards[8]) < 5 * spread / math.sqrt(128)
    result = whole.result
    assert result["epoch"] == COUNT
    assert result["throughput"]["drawn_tokens_per_second"] > 0
    assert result["throughput"]["drawing_seconds"] > 0
    assert result["reference"]["rows"] == 40 + sum(len(rows_of(whole, r)) for r in (1, 2, 3))


@pytest.mark.slow
def test_the_policy_before_is_the_reference_of_each_round(tmp_path):
    """At each round's first step the policy is its reference: ln 2 at steps 1, 5 and 9."""
    run = run_train(tmp_path / "run", *ROUNDS, "rounds.reference=previous")
    loss = at(run, "train/loss")
    assert [loss[step] for step in (1, 5, 9)] == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert abs(loss[6] - math.log(2)) > 1e-4
    # KL is to the start all the same.
    kl = at(run, "controlled/kl_policy_reference")
    assert 0 < kl[4] < kl[8] < kl[12]


@pytest.mark.slow
def test_rankings_are_trained_on_whole(tmp_path):
    """Plackett-Luce of K equal scores is ln K!: ln 24 = 3.178 of four, ln 6 of three."""
    words = ("rounds.groups=ranking", "loss=plackett_luce")
    run = run_train(tmp_path / "run", *ROUNDS, *words)
    assert run.code == 0
    rows = rows_of(run, 1)
    own = [rows[n] for n in RANKED.drawn_groups(0, len(rows), 64)]
    sizes = [len(row["provenance"]["response_ids"]) for row in own]
    assert max(sizes) == 4
    expected = sum(math.log(math.factorial(size)) for size in sizes) / len(sizes)
    assert at(run, "train/loss")[1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["start", "previous"])
def test_a_share_of_each_step_is_given_rows(tmp_path, reference):
    """Half of 64 groups are drawn: 16 prompts. Given rows have values of the same reference."""
    words = ("rounds.offline_fraction=0.5", f"rounds.reference={reference}")
    run = run_train(tmp_path / "run", *ROUNDS, *words)
    assert run.code == 0
    assert at(run, "rounds/prompts")[0] == 16
    loss = at(run, "train/loss")
    assert loss[1] == pytest.approx(math.log(2), abs=1e-6)
    alike = abs(loss[5] - math.log(2)) < 1e-6
    assert alike == (reference == "previous")


@pytest.mark.slow
def test_one_step_a_round_draws_for_each_step(tmp_path):
    """Online DPO: with the policy before as the reference each step begins at ln 2."""
    words = ("rounds.count=6", "rounds.steps=1", "rounds.reference=previous")
    run = run_train(tmp_path / "run", *ROUNDS, *words)
    assert run.code == 0
    assert list(at(run, "train/loss").values()) == pytest.approx([math.log(2)] * 6, abs=1e-6)
    assert at(run, "rounds/prompts") == dict.fromkeys(range(6), 8.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cached", "live"])
def test_a_live_reference_gives_the_same_training(whole, tmp_path, kind):
    run = run_train(tmp_path / "run", *ROUNDS, f"reference={kind}")
    assert run.values("train/loss") == pytest.approx(whole.values("train/loss"), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "reference"),
    [
        *((8, "start"), (6, "previous")),
        *(pytest.param(*case, marks=pytest.mark.long) for case in ((6, "start"), (8, "previous"))),
    ],
)
def test_a_resumed_run_ends_like_an_undisturbed_one(whole, tmp_path, step, reference):
    """Step 6 is inside a round, whose rows are read; at 8 a round begins, and is drawn again."""
    words = (*ROUNDS, f"rounds.reference={reference}")
    first = whole
    if reference == "previous":
        first = run_train(tmp_path / "whole", *words)
    resumed = run_train(tmp_path / "run", *words, f"resume={checkpoint(first, step)}")
    assert_same_end(resumed, first, after=step)
    for round in (1, 2, 3):
        if (resumed.folder / "rounds" / f"{round}.jsonl").exists() or round == 3:
            assert rows_bytes(resumed, round) == rows_bytes(first, round)


def rows_bytes(run: Run, round: int) -> bytes:
    return (run.folder / "rounds" / f"{round}.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["gone", "changed"])
def test_a_round_that_is_resumed_needs_the_rows_it_was_trained_on(tmp_path, capfd, change):
    run = run_train(tmp_path / "run", *ROUNDS, "rounds.count=2", "rounds.steps=2")
    path = run.folder / "rounds" / "2.jsonl"
    if change == "gone":
        path.unlink()
        (path.parent / ".2.json").unlink()
    else:
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    words = (*ROUNDS, "rounds.count=2", "rounds.steps=2", f"resume={checkpoint(run, 3)}")
    again = run_train(tmp_path / "again", *words)
    assert again.code == 4
    [line] = [line for line in capfd.readouterr().err.splitlines() if "rounds/2.jsonl" in line]
    assert "put them back" in line
    assert not (tmp_path / "again" / "rounds").exists()


@pytest.mark.slow
def test_no_group_left_is_said_in_one_line(tmp_path, capfd):
    """At a margin that no two marks have every pair is dropped."""
    run = run_train(tmp_path / "run", *ROUNDS, "rounds.groups=margin", "rounds.min_margin=1000")
    assert run.code == 2
    assert "round 1: the answers to" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["start", pytest.param("previous", marks=pytest.mark.long)])
def test_a_round_of_equal_answers_moves_nothing(tmp_path, monkeypatch, reference):
    """The second round has no group: its steps have no loss and no gradient, and the third goes on.

    So it is with a binary judge and few prompts a round, where all answers may be right.
    """

    def mark_groups(marked, *, round, **how):
        groups, dropped = marked_groups(marked, round=round, **how)
        return ([] if round == 2 else groups), dropped

    marked_groups = conduct.mark_groups
    monkeypatch.setattr(conduct, "mark_groups", mark_groups)
    words = (*ROUNDS, f"rounds.reference={reference}")
    run = run_train(tmp_path / "run", *words)
    assert run.code == 0
    loss, norm = at(run, "train/loss"), at(run, "train/grad_norm")
    assert [step for step, value in loss.items() if value is None] == [5, 6, 7, 8]
    assert {norm[step] for step in (5, 6, 7, 8)} == {0.0}
    assert min(norm[step] for step in (4, 9)) > 0
    assert rows_of(run, 2) == []
    assert len(rows_of(run, 3)) > 20
    resumed = run_train(tmp_path / "resumed", *words, f"resume={checkpoint(run, 6)}")
    assert_same_end(resumed, run, after=6)


@pytest.mark.slow
def test_a_judge_of_ones_own_marks_the_answers(tmp_path):
    """Two marks for each sun: the policy says sun more often round by round."""
    words = ("plugins=[tests.support.round_crash]", "evaluation.judge=sunny", "beta=0.05")
    run = run_train(tmp_path / "run", *ROUNDS, *words)
    assert run.code == 0
    rows = rows_of(run, 1)
    assert {row["provenance"]["judge"] for row in rows} == {"sunny"}
    assert all(row["marks"][0] > row["marks"][1] for row in rows)
    texts = [row["chosen"].split() for row in rows]
    assert [row["marks"][0] for row in rows] == pytest.approx(
        [2.0 * words.count("sun") - 0.3 * len(words) for words in texts]
    )
    marks = at(run, "rounds/mark")
    assert marks[0] < marks[4] < marks[8]


@pytest.mark.slow
def test_a_sweep_of_rounds_has_a_curve_for_each(tmp_path):
    from dpo_lightning.sweeps.report.analysis import analyse
    from dpo_lightning.sweeps.report.read import read_sweep
    from dpo_lightning.sweeps.report.rounds import round_curves
    from dpo_lightning.sweeps.report.write import write_report

    for beta in (0.1, 0.5):
        run = run_train(tmp_path / f"beta-{beta}", *ROUNDS, f"beta={beta}")
        assert run.code == 0
    written = write_report(tmp_path)
    assert written["pick"] is not None
    for name in ("report.html", "report.md"):
        assert "round 3" in (tmp_path / name).read_text(), name
    curves = round_curves(analyse(read_sweep(tmp_path)))
    assert [curve.label for curve in curves] == ["after round 1", "after round 2"]


# Several ranks, and what rounds gain -------------------------------------------------------------


def what_was_drawn(run: Run, round: int) -> list[dict]:
    """Rows without the hash of the policy, whose last bits depend on the order of sums."""
    found = rows_of(run, round)
    for row in found:
        del row["provenance"]["policy"]
    return found


@pytest.mark.long
@pytest.mark.parametrize("reference", ["start", "previous"])
def test_one_and_two_ranks_draw_the_same(tmp_path, reference):
    words = (*ROUNDS, f"rounds.reference={reference}", "rounds.offline_fraction=0.25")
    one = launch(tmp_path / "one", *words)
    two = launch(tmp_path / "two", *words, "strategy=ddp", "trainer.devices=2")
    for round in (1, 2, 3):
        assert what_was_drawn(two, round) == what_was_drawn(one, round)
    assert two.values("train/loss") == pytest.approx(one.values("train/loss"), rel=1e-4)
    assert two.result["reference"]["rows"] == one.result["reference"]["rows"]


@pytest.mark.long
def test_a_resumed_run_of_two_ranks_ends_like_an_undisturbed_one(tmp_path):
    words = (*ROUNDS, "strategy=ddp", "trainer.devices=2")
    whole = launch(tmp_path / "whole", *words)
    resumed = launch(tmp_path / "run", *words, f"resume={checkpoint(whole, 6)}")
    assert_same_end(resumed, whole, after=6)
    assert rows_bytes(resumed, 3) == rows_bytes(whole, 3)


@pytest.mark.long
def test_rounds_come_nearer_to_the_optimum_than_one(tmp_path):
    """At equal steps and labels; by far more than seeds differ (benchmarks/rounds.py)."""
    words = (
        *("data.batch_size=32", "evaluation.samples=0", "evaluation.partition_samples=0"),
        *("data.controlled.eval_groups=64", "beta=0.1"),
    )
    one = run_train(tmp_path / "one", *words, "rounds.count=1", "rounds.steps=384")
    three = run_train(tmp_path / "three", *words, "rounds.count=3", "rounds.steps=128")
    gains = [run.result["metrics"]["controlled/gain_ratio"] for run in (one, three)]
    assert gains[1] > gains[0] + 0.02
    distances = list(at(three, "controlled/kl_optimum_policy").values())
    assert len(distances) == 3
    assert distances == sorted(distances, reverse=True)
    ends = [run.result["metrics"]["controlled/kl_policy_optimum"] for run in (one, three)]
    assert ends[1] < 0.7 * ends[0]
