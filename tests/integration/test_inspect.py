"""The command ``inspect`` beside the run that it speaks of, and on real files."""

import json

import pytest

from tests.support.inspected import files_below, inspect_json
from tests.support.runs import TINY, run_train


# It trains.
@pytest.mark.slow
def test_a_run_is_what_was_said_of_it(tmp_path, monkeypatch, capsys, tiny_model, pairs_file):
    """Groups, dropped rows, steps, memory and reference rows; then its speed tells the time."""
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    more = [
        {"prompt": "x", "chosen": "same", "rejected": "same"},
        {"prompt": "y", "chosen": "z" * 200, "rejected": "short"},
    ]
    text = pairs_file.read_text() + "".join(json.dumps(row) + "\n" for row in more)
    rows.write_text(text)
    words = [f"model.pretrained={tiny_model}", f"data.train={rows}", "data.batch_size=16"]
    words += ["trainer.max_steps=5", "trainer.threads=1", "evaluation.samples=0", "logger=none"]
    said = inspect_json(capsys, *words)
    run = run_train(tmp_path / "outputs" / "runs" / "one", *words)
    result = run.result
    assert result["data"]["train_groups"] == said["groups"]["train"]
    assert result["data"]["eval_groups"] == said["groups"]["eval"]
    assert result["data"]["train_pairs"] == said["groups"]["pairs"]
    assert said["dropped"] == {"identical_responses": 1, "too_long": 1}
    assert {name: n for name, n in result["data"]["dropped"].items() if n} == said["dropped"]
    assert result["step"] == said["plan"]["steps"] == 5
    assert result["memory"]["estimated_bytes"] == said["memory"]["parts"]
    assert said["time"]["seconds"] is None
    before = files_below(tmp_path)
    again = inspect_json(capsys, *words)["time"]
    assert files_below(tmp_path) == before
    speed = result["throughput"]["tokens_per_second"]
    assert again["measured"] == {"run": "outputs/runs/one", "tokens_per_second": speed}
    assert again["seconds"] == pytest.approx(again["tokens"] / speed)
    # The same tokens over the same seconds.
    assert again["seconds"] == pytest.approx(result["throughput"]["seconds"], rel=1e-6)


# It loads the bundled model and draws all pairs.
@pytest.mark.slow
def test_the_embedded_task_is_inspected_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = inspect_json(capsys, *TINY)
    assert (found["groups"]["train"], found["groups"]["eval"]) == (96, 40)
    assert found["groups"]["prompts"] <= 8
    assert found["lengths"]["train"]["response"]["max"] <= 5
    assert found["oddities"]["train"]["identical_pairs"]["count"] == 0
    assert found["plan"]["steps"] == 6
    assert list(tmp_path.iterdir()) == []


# They tokenize real files.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("politeness.jsonl", {"identical_pairs": 6, "prefixes": 3, "several_turns": 0}),
        ("hh_harmless_raw.jsonl", {"empty_responses": 1, "long_conversations": 282}),
        ("sharegpt_dpo.json", {"duplicates": 5}),
        ("openassistant_ranked.jsonl", {"duplicates": 0}),
    ],
)
def test_real_files_are_named_with_their_dirt(
    shared, tmp_path, monkeypatch, capsys, name, expected
):
    monkeypatch.chdir(tmp_path)
    before = files_below(shared / "data")
    model = shared / "models" / "stories260k"
    words = [f"model.pretrained={model}", f"data.train={shared / 'data' / name}"]
    found = inspect_json(capsys, *words, "data.max_dropped=1")
    kinds = {key: found["oddities"]["train"][key]["count"] for key in expected}
    assert kinds == expected
    rows, dropped = found["rows"]["train"], found["dropped"]
    assert rows["read"] == rows["used"] + sum(dropped.values())
    assert found["groups"]["train"] + found["groups"]["eval"] == rows["used"]
    if name == "politeness.jsonl":
        assert dropped == {"identical_responses": 6}
        assert rows["unread"] == ["input", "instruction", "output"]
    elif name == "hh_harmless_raw.jsonl":
        assert dropped["empty_response"] == 1
    elif name == "sharegpt_dpo.json":
        # Long, as its README says: most rows are beyond 512 tokens.
        assert found["truncation"]["groups_dropped"] == dropped["too_long"] > 150
        assert found["truncation"]["whole"]["max"] > 10_000
        assert found["template"]["used"]
    else:
        assert max(map(int, found["groups"]["responses"])) > 4
        assert rows["forms"] == {"ranks": rows["read"]}
    assert files_below(shared / "data") == before
    assert list(tmp_path.iterdir()) == []
