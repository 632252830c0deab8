"""Files as a whole and the settings that go with them; a fault is one line with its remedy."""

import json
from pathlib import Path

import datasets
import pytest

from dpo_lightning.data.records import Message
from dpo_lightning.errors import UserError
from tests.support.sources import read, refused, write

GOOD = {"prompt": "Say hi.", "chosen": " Hello.", "rejected": " Go away."}


# ------------------------------------------------------------------------------------------- jsonl


def test_bom_crlf_and_blank_lines_keep_the_line_numbers(tmp_path):
    line = json.dumps(GOOD).encode()
    content = b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line + b"\r\n" + b"{\r\n" + line
    rows = read(write(tmp_path / "a.jsonl", content))
    assert [group.source for group in rows.groups] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 4, 6)]
    assert [(bad.source, bad.row) for bad in rows.bad] == [(f"{tmp_path}/a.jsonl:5", "{")]
    assert rows.total == 4


def test_a_line_separator_in_a_text_ends_no_line(tmp_path):
    row = {**GOOD, "chosen": "a\u2028b\x85c"}
    content = json.dumps(row, ensure_ascii=False).encode() + b"\n" + json.dumps(GOOD).encode()
    rows = read(write(tmp_path / "a.jsonl", content))
    assert rows.groups[0].responses[0] == "a\u2028b\x85c"
    assert rows.groups[1].source.endswith(":2")


def test_suffix_and_home_are_understood(tmp_path, monkeypatch):
    write(tmp_path / "a.JSONL", GOOD)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/a.JSONL").groups[0].source == "~/a.JSONL:1"


# -------------------------------------------------------------------------------------------- json


def test_json_counts_elements(tmp_path):
    path = write(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps([GOOD, 3, GOOD]).encode())
    rows = read(path)
    assert [group.source for group in rows.groups] == [f"{path}:1", f"{path}:3"]
    assert [(bad.source, bad.field, bad.row) for bad in rows.bad] == [(f"{path}:2", "row", "3")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no rows"),
        (b"[]", "no rows"),
        (b" \n", "no rows"),
        (b'{"data": []}', "the top level is an object of 'data', expected a list of rows"),
        (b'[{"a": 1},\n oops]', "invalid JSON at line 2 column 2"),
        (b'[\n"\xff"]', "line 2: not UTF-8: byte 0xff at byte 2"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"1" * 5000 + b"]", "a number too long"),
    ],
)
def test_bad_json(tmp_path, content, problem):
    message = refused(write(tmp_path / "a.json", content))
    assert message.startswith(f"data.train={tmp_path}/a.json: ")
    assert problem in message


def test_any_depth_is_a_bad_row_or_refused(tmp_path):
    # How deep Python reads JSON depends on its version; what it reads it has to write again.
    message = ""
    for depth in (10, *range(800, 1000), *range(1450, 1500), *range(9950, 10_000), 100_000):
        content = f"[{json.dumps(GOOD)}, {'[' * depth}{']' * depth}]".encode()
        path = write(tmp_path / "a.json", content)
        try:
            rows = read(path)
        except UserError as error:
            message = str(error)
        else:
            assert (len(rows.groups), len(rows.bad)) == (1, 1)
    assert "nested too deeply" in message


def test_half_a_character_is_written_as_json_writes_it(tmp_path):
    path = write(tmp_path / "a.json", [GOOD, {**GOOD, "chosen": "\u00e9\ud800"}])
    (bad,) = read(path).bad
    assert bad.row == '{"prompt": "Say hi.", "chosen": "\u00e9\\ud800", "rejected": " Go away."}'


# ---------------------------------------------------------------------------------------- no file


def test_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "politeness.jsonl", GOOD)
    assert refused("politness.jsonl") == (
        "data.train=politness.jsonl: no such file; did you mean politeness.jsonl?"
    )
    assert refused("other.jsonl", key="data.eval") == (
        f"data.eval=other.jsonl: no such file (here is {tmp_path}); name a file "
        "(.jsonl, .ndjson, .json, .parquet, .csv, .tsv or .arrow) in data.eval="
    )
    assert f"there is no directory {tmp_path}/x either" in refused(tmp_path / "x" / "a.jsonl")


@pytest.mark.parametrize(
    "source",
    [
        *["./name", "../name", "/nowhere/name", "~/name", "~nobody-of-that-name/x", "a/b/c"],
        *["name.csv", "name.jsonl.gz", "name.JSONL", "org/name.parquet", "", " ", "a" * 400],
        *["a\nb", "a\0b", "a\ud800b"],
    ],
)
def test_what_cannot_be_a_data_set_is_no_hub_id(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    assert refused(source).startswith("data.train=")


def test_directory(tmp_path):
    write(tmp_path / "c.txt", b"")
    assert refused(tmp_path).startswith(
        f"data.train={tmp_path}: the folder has no file of rows; they end in .jsonl, "
    )
    write(tmp_path / "b.json", [GOOD])
    assert read(tmp_path).groups[0].source == f"{tmp_path}/b.json:1"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.zip", "a.parquet.gz", "a"])
def test_unknown_suffix(tmp_path, name):
    path = write(tmp_path / name, GOOD)
    assert refused(path).endswith("expected .jsonl, .ndjson, .json, .parquet, .csv, .tsv or .arrow")


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_empty_jsonl(tmp_path, content):
    assert "no rows" in refused(write(tmp_path / "a.jsonl", content))


def test_unreadable_file(tmp_path, monkeypatch):
    def denied(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.jsonl", GOOD)
    monkeypatch.setattr(Path, "open", denied)
    assert refused(path) == f"data.train={path}: cannot be read: Permission denied"


# ----------------------------------------------------------------------------------- data settings


def test_wrong_columns_everywhere_are_one_error(tmp_path):
    rows = [{"prompt": "p", "better": "a", "worse": "b"}] * 3
    message = refused(write(tmp_path / "a.json", rows))
    assert message == (
        f"data.train={tmp_path}/a.json: the columns of every row are wrong: 'chosen' is missing, "
        "and no 'responses'; found 'prompt', 'better', 'worse'; expected prompt, chosen, rejected; "
        "or prompt, responses (best first, or with ranks or scores); or prompt, response, "
        "label; map other names, as in "
        "'data.columns={chosen: better, rejected: worse}'"
    )
    mapped = read(tmp_path / "a.json", columns={"chosen": "better", "rejected": "worse"})
    assert len(mapped.groups) == 3


def test_a_question_column_does_not_go_unnoticed(tmp_path):
    rows = [{"question": "q", "chosen": "Yes", "rejected": "No"}]
    message = refused(write(tmp_path / "a.json", rows))
    assert "'prompt' is missing, and 'question' may be it" in message
    assert "'data.columns={prompt: question}'" in message


def test_sharegpt_needs_its_columns(tmp_path):
    message = refused(write(tmp_path / "a.json", [GOOD]), format="sharegpt")
    assert "'conversations' is missing" in message
    assert "data.format=" in message


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"promt": "q"}, "'promt' is not a field of a row, did you mean prompt?"),
        ({"zzz": "q"}, "expected one of prompt, chosen"),
        ({"prompt": "promtp"}, "no row of {0} has this column, did you mean 'prompt'?"),
        ({"weight": "importance"}, "no row of {0} has this column; found 'prompt', 'chosen'"),
        ({"chosen": "rejected", "prompt": "rejected"}, "chosen and prompt are both 'rejected'"),
        ({"conversations": "prompt"}, "set data.format=sharegpt"),
    ],
)
def test_wrong_columns_setting(tmp_path, columns, problem):
    path = write(tmp_path / "a.jsonl", GOOD)
    message = refused(path, columns=columns)
    assert message.startswith("data.columns")
    assert problem.format(f"data.train={path}") in message


def test_wrong_format_setting(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    assert refused(path, format="parrot").startswith(
        "data.format=parrot: expected one of auto, rows, openai, "
    )
    assert "data.columns={prompt: q}" in refused(path, format="sharegpt", columns={"prompt": "q"})


def test_settings_of_the_hub_are_said_to_be_unused_by_a_file(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    assert read(path).notes == []
    (note,) = read(path, subset="harmless-base").notes
    assert note.startswith("data.subset=harmless-base")


# --------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(
    ("name", "format", "count"),
    [
        ("politeness.jsonl", "auto", 1100),
        ("hh_harmless_raw.jsonl", "auto", 400),
        ("sharegpt_dpo.json", "sharegpt", 300),
        ("openassistant_ranked.jsonl", "rows", 212),
    ],
)
def test_real_files(shared, name, format, count):
    path = shared / "data" / name
    rows = read(path, format=format)
    assert (rows.total, len(rows.groups), rows.bad) == (count, count, [])
    assert rows.groups[-1].source == f"{path}:{count}"
    if name.startswith("hh_"):
        assert all(group.prompt.endswith("\n\nAssistant:") for group in rows.groups)
        originals = [json.loads(line) for line in path.read_text().splitlines()]
        for group, row in zip(rows.groups, originals, strict=True):
            whole = [group.prompt + response for response in group.responses]
            assert whole == [row["chosen"], row["rejected"]]
    elif name.startswith("openassistant"):
        originals = [json.loads(line) for line in path.read_text().splitlines()]
        for group, row in zip(rows.groups, originals, strict=True):
            assert list(group.ranks) == sorted(group.ranks)
            best = row["responses"][row["ranks"].index(min(row["ranks"]))]
            assert group.responses[0] == (Message("assistant", best),)
            assert len(group.responses) == len(row["responses"])
    elif name.startswith("sharegpt"):
        assert {group.prompt[-1].role for group in rows.groups} == {"user"}
        roles = {message.role for group in rows.groups for message in group.prompt}
        assert roles == {"system", "user", "assistant"}
