"""The command ``inspect``: one object, one exit code, and nothing written."""

import json

import pytest

from dpo_lightning.run.inspect.command import main, read_asked
from tests.support.inspected import files_below, inspect_json

PAIRS = [
    {"prompt": "a", "chosen": "yes", "rejected": "no"},
    {"prompt": "a", "chosen": "no", "rejected": "yes"},
    {"prompt": "b", "responses": ["u", "v", "w"], "ranks": [2, 1, 3]},
    {"prompt": "c", "chosen": "same", "rejected": "same", "note": "n"},
    {"prompt": "d", "chosen": "x" * 300, "rejected": "y"},
]
HELD_OUT = [{"prompt": "a", "chosen": "yes", "rejected": "no"}]


@pytest.fixture
def words(tmp_path, monkeypatch, tiny_model) -> list[str]:
    """Five rows and one held-out row, for a model of bytes with 128 positions, in a new folder."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (("rows.jsonl", PAIRS), ("eval.jsonl", HELD_OUT)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *(f"model.pretrained={tiny_model}", "data.train=rows.jsonl", "data.eval=eval.jsonl"),
        *("data.batch_size=2", "trainer.max_steps=3", "reference.cache_dir=cache"),
        "data.max_dropped=1",
    ]


def test_the_object_tells_what_becomes_of_each_row(words, capsys):
    """Bytes, no BOS: row 1 is 1 + 4 + 3 tokens, row 2 the same, row 3 1 + 2 + 2 + 2.

    Row 4 is two identical responses, row 5 has 301 > 128 tokens; the held-out prompt is trained on.
    Steps of 2 groups out of 3 are of 2, 1 and 2 groups; the third is in the second epoch.
    """
    found = inspect_json(capsys, *words)
    train = found["rows"]["train"]
    assert (train["source"], train["read"], train["used"]) == ("rows.jsonl", 5, 3)
    assert train["dropped"] == {"identical_responses": 1, "too_long": 1}
    assert (train["forms"], train["reordered"]) == ({"pair": 4, "ranks": 1}, 1)
    assert train["unread"] == ["note"]
    assert found["rows"]["eval"]["used"] == 1
    assert found["dropped"] == {"identical_responses": 1, "too_long": 1}
    groups = found["groups"]
    assert (groups["train"], groups["eval"], groups["pairs"], groups["prompts"]) == (3, 1, 5, 2)
    assert (groups["responses"], groups["split"]) == ({"2": 2, "3": 1}, "named")
    oddities = {name: kind["count"] for name, kind in found["oddities"]["train"].items()}
    assert {name: count for name, count in oddities.items() if count} == {
        "identical_pairs": 1,
        "contradictions": 1,
        "repeated_prompts": 1,
    }
    assert found["oddities"]["leaked"] == {"count": 1, "places": ["eval.jsonl:1"]}
    assert found["lengths"]["train"]["prompt"]["max"] == 1
    cut = found["truncation"]
    # 1 + 301 + 2 tokens, EOS behind each response.
    assert (cut["max_length"], cut["groups_dropped"], cut["tokens_dropped"]) == (128, 1, 304)
    plan = found["plan"]
    assert (plan["groups"], plan["steps"], plan["steps_per_epoch"]) == (3, 3, 2)
    # Each prompt of one token once for two, two and three responses: 1 + 1 + 2 copies saved.
    assert plan["prompt_tokens_saved"] == 4
    assert plan["share_saved"] == pytest.approx(4 / (9 + 9 + 9))
    assert found["time"]["tokens"] in (8 + 8 + 7 + 8 + 8, 8 + 8 + 7 + 8 + 7)
    assert found["memory"]["fits"]
    assert found["refused"] == []
    assert {"template", "example", "notes", "model", "length_bias"} <= set(found)


def test_evaluations_are_those_of_the_run_and_of_all_sets(words, capsys, tmp_path):
    """Steps 2 and 3 of 3 are evaluated, on the 2 rows of both sets.

    The reference reads the three training groups of 8, 8 and 7 tokens once, the first set's row of
    8 and the second's of 1 + 4 + 2.
    """
    other = {"prompt": "e", "chosen": "one", "rejected": "b"}
    (tmp_path / "other.jsonl").write_text(json.dumps(other) + "\n")
    words = [word for word in words if not word.startswith("data.eval=")]
    words += ["data.eval={first: eval.jsonl, second: other.jsonl}", "evaluation.every_n_steps=2"]
    found = inspect_json(capsys, *words)
    assert found["time"]["reference_tokens"] == 8 + 8 + 7 + 8 + 7
    told = found["plan"]["evaluations"]
    assert (told["every_n_steps"], told["before_last"], told["on_start"]) == (2, 1, False)
    assert (told["rows"], told["rows_at_the_end"]) == (2, 2)
    assert told["sets"] == {"first": 1, "second": 1}
    assert told["says"] == "every 2 steps on all 2 rows, all at the end"
    # One that moves reads each step's rows, and the held-out ones once.
    moving = inspect_json(capsys, *words, "reference.sync_every=1")["time"]
    assert moving["reference_tokens"] == moving["tokens"] + 8 + 7
    assert main(words) == 0
    assert told["says"] in capsys.readouterr().out
    # A limit that leaves no row is what a run would stop for.
    found = inspect_json(capsys, *words[:-1], "evaluation.max_token_share=0.001", code=2)
    assert found["plan"]["evaluations"] is None
    assert found["refused"][0].startswith("evaluation.max_token_share=0.001: evaluations before")


def test_nothing_is_written_and_kept_tokens_are_read(words, capsys, tmp_path, monkeypatch):
    """Neither with an empty folder nor with token ids of an earlier run in it."""
    from dpo_lightning.data import token_cache, tokens

    before = files_below(tmp_path)
    first = inspect_json(capsys, *words)
    assert files_below(tmp_path) == before
    # As a run would keep them.
    kept = token_cache.tokenize_once
    monkeypatch.setattr(
        "dpo_lightning.data.splits.tokenize_once", lambda *a, **k: kept(*a, **(k | {"keep": True}))
    )
    inspect_json(capsys, *words)
    monkeypatch.setattr("dpo_lightning.data.splits.tokenize_once", kept)
    before = files_below(tmp_path)
    assert [name for name in before if name.endswith(".safetensors")]
    sizes = []

    def counted(groups, *args, **options):
        sizes.append(len(groups))
        return tokens.tokenize_groups(groups, *args, **options)

    monkeypatch.setattr(token_cache, "tokenize_groups", counted)
    assert inspect_json(capsys, *words) == first
    assert sizes == []
    assert files_below(tmp_path) == before


def test_what_a_run_would_stop_for_is_said_behind_the_answer(words, capsys, tmp_path):
    """A bad row and too many dropped ones: both are kept, the first is the error, code 2."""
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": 3, "chosen": "a", "rejected": "b"}\n')
    found = inspect_json(capsys, *words[:-1], "data.max_dropped=0.1", code=2)
    assert found["rows"]["train"]["used"] == 3
    assert found["rows"]["train"]["bad"][0]["place"] == "rows.jsonl:6"
    stops = [line.partition(":")[0] for line in found["refused"]]
    assert stops == ["rows.jsonl", "data.max_dropped=0.1"]
    assert main([*words]) == 2
    said = capsys.readouterr()
    assert "3 to train on" in said.out
    assert said.err.splitlines()[-1].startswith("error: rows.jsonl:6: prompt: the number 3")
    assert main([*words, "data.on_bad_row=skip"]) == 0
    assert not (tmp_path / "outputs").exists()


def test_rows_of_which_nothing_is_left_are_still_shown(words, capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIRS[3]) + "\n")
    found = inspect_json(capsys, *words, code=2)
    assert (found["plan"], found["example"], found["groups"]["train"]) == (None, None, 0)
    assert found["oddities"]["train"]["identical_pairs"]["count"] == 1
    assert found["refused"][0].startswith("data.train: no group is left out of 1 rows")
    assert main(words) == 2
    assert "none: no row is left to train on" in capsys.readouterr().out


def test_a_page_and_a_group_by_its_number(words, capsys, tmp_path):
    found = inspect_json(capsys, *words, "--group", "3", "--html=rows.html")
    assert (found["example"]["number"], found["example"]["source"]) == (3, "rows.jsonl:3")
    texts = ["".join(t["text"] for t in r["tokens"]) for r in found["example"]["responses"]]
    # Ranks 2, 1, 3 of u, v, w.
    assert texts == ["v</s>", "u</s>", "w</s>"]
    assert "rows.jsonl" in (tmp_path / "rows.html").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--group", "4"], "--group 4: there are 3 training groups; name one of these"),
        (["--group=0"], "--group 0: needs a whole number from 1 on, such as --group 1"),
        (["--group"], "--group: needs a value behind it"),
        (["--html"], "--html: needs a value behind it"),
        (["--html=none/x.html"], "--html none/x.html: no folder none; make it first"),
        (["seed=1,2"], "seed=1,2 gives several values, but this looks at one run"),
        (["data.train=gone.jsonl"], "data.train=gone.jsonl: "),
    ],
)
def test_a_wrong_word_is_one_line(words, capsys, more, said):
    assert main([*words, *more]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith(f"error: {said}")


def test_flags_stand_anywhere_among_the_settings():
    asked = read_asked(["beta=1", "--json", "--html", "a.html", "seed=2", "--group=7"])
    assert asked.settings == ("beta=1", "seed=2")
    assert (asked.as_json, str(asked.page), asked.number) == (True, "a.html", 7)
