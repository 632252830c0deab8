"""Sizes at the edge: evaluation groups over ranks, one group, more batch than data, one token."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT, Run, run_train

BARE = ("evaluation.samples=0", "evaluation.partition_samples=0", "optimizer.warmup=0")
SIZES = range(1, 10)


def few(folder: Path, n: int) -> list[str]:
    """Settings of one training group in a batch of two; n evaluation groups, eight at once."""
    return [
        *(
            f"hydra.run.dir={folder / str(n)}",
            "data.controlled.train_groups=1",
            "data.batch_size=2",
        ),
        *(f"data.controlled.eval_groups={n}", "trainer.accelerator=cpu", *BARE),
    ]


# Both ranks go through all sizes in one process group: starting one takes longer than a run.
RANK = """
import json, sys
from dpo_lightning.cli import main
codes = [main(arguments) for arguments in json.loads(sys.stdin.read())]
sys.exit(max(codes))
"""


@pytest.mark.faults  # half a minute; test_ddp.py has five groups on two ranks
def test_every_evaluation_group_counts_once_on_two_ranks(tmp_path):
    """Sums and counts over ranks are those of one process, for n = 1 ... 9 groups.

    A sampler that pads repeats a group for every odd n: of n groups with losses l, its mean would
    be (sum of l + l_0) / (n + 1).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines = [
        [*few(tmp_path / "two", n), "strategy=ddp", "trainer.devices=2", "logger=none"]
        for n in SIZES
    ]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            cwd=ROOT,
            env=os.environ
            | {"WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.stdin.write(json.dumps(lines))
        rank.stdin.close()
    try:
        said = [rank.stdout.read() for rank in ranks]
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0], said
    finally:
        for rank in ranks:
            rank.kill()
    for n in SIZES:
        two = Run(0, tmp_path / "two" / str(n))
        one = run_train(tmp_path / "one" / str(n), *few(tmp_path / "one", n))
        assert one.code == 0
        assert two.result["data"]["eval_groups"] == n
        for name in ("eval/loss", "eval/rewards/margins", "eval/logps/chosen"):
            expected = one.result["metrics"][name]
            assert two.result["metrics"][name] == pytest.approx(expected, rel=1e-5), (n, name)
        # Shares of n groups, halves for ties: exact whatever the weights' last bits are.
        accuracy = two.result["metrics"]["eval/rewards/accuracies"]
        assert accuracy == one.result["metrics"]["eval/rewards/accuracies"]
        assert (2 * n * accuracy) == pytest.approx(round(2 * n * accuracy), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "batch_size", "max_steps", "steps", "epochs"),
    [
        (1, 32, None, 1, 1),  # one group, and more batch than data
        pytest.param(5, 4, None, 2, 1, marks=pytest.mark.slow),  # the last step is short: 4 + 1
        pytest.param(5, 4, 1, 1, 0.5, marks=pytest.mark.slow),  # ends under the epoch
        (5, 4, 7, 7, 3.5),  # goes beyond it, three times and a half
        pytest.param(1, 1, 3, 3, 3, marks=pytest.mark.slow),
    ],
)
def test_steps_and_epochs(tmp_path, groups, batch_size, max_steps, steps, epochs):
    """Steps are ceil(groups / batch size) to a pass; every step of the run has its row."""
    run = run_train(
        tmp_path / "run",
        f"data.controlled.train_groups={groups}",
        "data.controlled.eval_groups=3",
        f"data.batch_size={batch_size}",
        f"trainer.max_steps={'null' if max_steps is None else max_steps}",
        *BARE,
    )
    assert run.code == 0
    assert (run.result["step"], run.result["epoch"]) == (steps, epochs)
    assert [row["step"] for row in run.rows if "train/loss" in row] == list(range(1, steps + 1))
    assert run.values("train/loss")[0] == pytest.approx(0.6931472, abs=1e-6)
    assert run.result["metrics"]["eval/rewards/accuracies"] in (
        0,
        1 / 6,
        1 / 3,
        0.5,
        2 / 3,
        5 / 6,
        1,
    )


def with_rows(tmp_path, tiny_model, rows, *more: str) -> Run:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_train(
        tmp_path / "run", f"model.pretrained={tiny_model}", f"data.train={path}", *BARE, *more
    )


def test_nothing_to_evaluate_on(tmp_path, tiny_model):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    run = with_rows(tmp_path, tiny_model, rows, "data.eval_fraction=0")
    assert run.code == 0
    assert (run.result["data"]["train_groups"], run.result["data"]["eval_groups"]) == (3, 0)
    assert not [name for name in run.result["metrics"] if name.startswith("eval/")]


def test_one_row(tmp_path, tiny_model):
    run = with_rows(tmp_path, tiny_model, [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert run.code == 0
    assert (run.result["data"]["train_groups"], run.result["data"]["eval_groups"]) == (1, 0)


def test_an_evaluation_file_without_rows_is_refused(tmp_path, tiny_model, capfd):
    (tmp_path / "none.jsonl").write_text("\n \n")
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    run = with_rows(tmp_path, tiny_model, rows, f"data.eval={tmp_path / 'none.jsonl'}")
    assert run.code == 2
    assert f"data.eval={tmp_path / 'none.jsonl'}: no rows" in run.result["error"]
    assert "Traceback" not in capfd.readouterr().err


def test_responses_of_one_token(tmp_path, tiny_model):
    """A prompt of 2 bytes and 3 tokens in all leave each response its first byte alone."""
    rows = [
        {"prompt": f"p{i}", "responses": ["abc", "bcd", "cde"], "ranks": [1, 1, 2]}
        for i in range(4)
    ]
    more = ("data.max_length=3", "data.truncation=response", "data.eval_fraction=0.25")
    run = with_rows(tmp_path, tiny_model, rows, *more)
    assert run.code == 0
    assert run.result["data"]["changed"] == {"truncated_response": 4}
    # Of three responses with ranks 1, 1, 2 two pairs are strictly ranked.
    assert run.result["data"]["train_pairs"] == 6
    assert run.values("train/loss")[0] == pytest.approx(0.6931472, abs=1e-5)
