"""The rows of a round as the training rows of another run: looked at, filtered, replayed."""

import json

import pytest

from dpo_lightning.data.marked import mark_groups
from dpo_lightning.run.rounds.files import rows_path, write_round
from tests.support.marked import facts_of, marked_prompt
from tests.support.models import byte_tokenizer
from tests.support.runs import run_train

pytestmark = pytest.mark.slow  # trains two small policies


def test_a_round_is_filtered_and_trained_on(tmp_path, tiny_model):
    """Forty pairs, whose marks differ by 1 or by 2: all of them, and then the twenty that differ by
    more. A twentieth is held out, and no key has to name what stands beside the texts."""
    prompts = [
        marked_prompt(f"Say {i}.", [f" It is {i}.", " No."], [1.0 + i % 2, 0.0]) for i in range(40)
    ]
    groups, _ = mark_groups(prompts, how="pairs", min_margin=0.0, noise="none", seed=5, round=1)
    write_round(tmp_path, groups, facts_of(groups="pairs"), byte_tokenizer())
    rows = list(map(json.loads, rows_path(tmp_path, 1).read_text().splitlines()))
    kept = [row for row in rows if row["marks"][0] - row["marks"][1] > 1]
    filtered = tmp_path / "filtered.jsonl"
    filtered.write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    for source, count in ((tmp_path / "rounds", 40), (filtered, 20)):
        run = run_train(
            tmp_path / f"run-{count}", f"model.pretrained={tiny_model}", f"data.train={source}",
            "trainer.max_steps=2", "data.batch_size=4", "evaluation.samples=0",
        )  # fmt: skip
        assert run.code == 0
        data = run.result["data"]
        assert data["train_groups"] + data["eval_groups"] == count
        assert data["dropped"] == {}
