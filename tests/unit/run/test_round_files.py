"""Files of rounds: read back to the last bit, read as rows, whole or not there."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.marked import MarkedGroup, mark_groups
from dpo_lightning.data.records import read_rows
from dpo_lightning.data.texts import Message
from dpo_lightning.errors import CorruptArtifactError, StorageError
from dpo_lightning.run.rounds import files
from dpo_lightning.run.rounds.files import facts_path, read_round, rows_path, write_round
from tests.support.inspected import inspect_json
from tests.support.marked import facts_of, marked_prompt, tokenizer_of_bytes
from tests.support.properties import examples

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
TOOLS = '[{"type": "function", "function": {"name": "look"}}]'


def groups_of(*prompts, how="ranking", round=1) -> list[MarkedGroup]:
    return mark_groups(prompts, how=how, min_margin=0.0, noise="none", seed=5, round=round)[0]


def written(folder: Path, *prompts, how="ranking", **facts) -> list[MarkedGroup]:
    groups = groups_of(*prompts, how=how, round=facts.get("round", 1))
    write_round(folder, groups, facts_of(groups=how, **facts), tokenizer_of_bytes())
    return groups


def as_rows(source: Path):
    return read_rows(str(source), format="auto", columns={}, split=None, subset=None, revision=None)


def check_same(groups, own) -> None:
    """Every field of the token groups, ids with their dtype."""
    assert len(groups) == len(own)
    for one, other in zip(groups, (item.group for item in own), strict=True):
        assert one.prompt.dtype == other.prompt.dtype == np.int32
        assert one.prompt.tolist() == other.prompt.tolist()
        assert [ids.tolist() for ids in one.responses] == [ids.tolist() for ids in other.responses]
        assert {ids.dtype for ids in one.responses} == {np.dtype(np.int32)}
        names = ("ranks", "weight", "source", "prompt_key", "target_margin", "confidence")
        assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
        assert one.reference_logps is None


PROMPTS = (
    marked_prompt("Say a.", [" a", " b", " c"], [0.1 + 0.2, 3.0, 0.1 + 0.2]),
    marked_prompt(TURNS, ["Hello.", "No."], [1.0, -1.0], source="given.jsonl:7"),
    marked_prompt(TURNS, ["x\n", "\u2028y"], [1e-300, 0.0], tools=TOOLS),
)
"""A ranking with a tie, whose marks are no short decimals; messages; tools, and odd line ends."""


def test_a_round_is_read_back_to_the_last_bit(tmp_path):
    own = written(tmp_path, *PROMPTS, round=3, step=40, dropped={"tie": 2})
    found = read_round(tmp_path, 3)
    check_same(found.groups, own)
    assert found.groups[0].ranks == (1, 2, 2)
    assert found.marks == [item.marks for item in own]
    assert found.facts == facts_of(round=3, step=40, dropped={"tie": 2})
    assert found.digest == write_round(tmp_path, own, found.facts, tokenizer_of_bytes())


def test_a_round_is_a_file_of_rows(tmp_path):
    """Pairs are chosen and rejected, a longer ranking has ranks; tools stand beside a prompt."""
    written(tmp_path, *PROMPTS)
    found = as_rows(rows_path(tmp_path, 1))
    assert found.bad == []
    text, turns, tooled = found.groups
    assert (text.prompt, text.responses, text.ranks) == ("Say a.", (" b", " a", " c"), (1, 2, 2))
    assert turns.prompt == (Message("system", "Be brief."), Message("user", "Hi?"))
    assert turns.responses == ((Message("assistant", "Hello."),), (Message("assistant", "No."),))
    assert (json.loads(tooled.tools), turns.tools) == (json.loads(TOOLS), "")
    assert [item.prompt_key for item in found.groups] == [item.prompt_key for item in PROMPTS]
    assert found.unread == {"marks", "provenance"}


def test_a_row_says_where_it_comes_from(tmp_path):
    written(tmp_path, PROMPTS[1], how="pairs", judge="m", policy="cd", temperature=0.7)
    [row] = map(json.loads, rows_path(tmp_path, 1).read_text().splitlines())
    assert row["marks"] == [1.0, -1.0]
    about = row["provenance"]
    assert (about["judge"], about["policy"], about["temperature"]) == ("m", "cd", 0.7)
    assert (about["round"], about["step"], about["seed"]) == (1, 0, 5)
    assert (about["groups"], about["noise"], about["answers"]) == ("pairs", "none", [0, 1])
    assert about["source"] == "given.jsonl:7"


def test_equal_rounds_are_equal_files(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, *PROMPTS)
    for path in (rows_path, facts_path):
        one, two = (path(tmp_path / name, 1).read_bytes() for name in ("one", "two"))
        assert one == two


def test_a_folder_of_rounds_is_read_as_rows(tmp_path):
    """The files of facts are no rows, and are not seen as such."""
    for round in (1, 2):
        written(tmp_path, PROMPTS[0], round=round)
    assert len(as_rows(tmp_path / "rounds").groups) == 2


def test_a_round_is_there_as_a_whole_or_not_at_all(tmp_path):
    assert read_round(tmp_path, 1) is None
    written(tmp_path, *PROMPTS)
    # A second attempt that ends between its two files: the facts of the first are not taken.
    with mock.patch.object(files, "write_json", side_effect=KeyboardInterrupt):  # noqa: SIM117
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path, *PROMPTS[:1])
    assert read_round(tmp_path, 1) is None
    own = written(tmp_path, *PROMPTS)
    check_same(read_round(tmp_path, 1).groups, own)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda rows, facts: rows.write_text(rows.read_text().split("\n")[0] + "\n"), "data.train"),
        (lambda rows, facts: rows.unlink(), "No such file"),
        (lambda rows, facts: facts.write_text('{"format": 1}'), "it has no round"),
    ],
    ids=["filtered", "gone", "facts"],
)
def test_rows_that_were_changed_are_named(tmp_path, damage, said):
    written(tmp_path, *PROMPTS)
    damage(rows_path(tmp_path, 1), facts_path(tmp_path, 1))
    with pytest.raises(CorruptArtifactError, match=said) as caught:
        read_round(tmp_path, 1)
    assert "\n" not in str(caught.value)


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "rounds").write_text("in the way")
    with pytest.raises(StorageError, match=r"rounds.*round 1 cannot be written; make room"):
        written(tmp_path, *PROMPTS)


@pytest.mark.slow  # builds a model for its plan
def test_a_round_is_looked_at(capsys, tmp_path, tiny_model):
    """Its groups are those of the run, and what is not read is named."""
    many = [marked_prompt(f"Say {i}.", [f" {i}", " no"], [1.0, 0.0]) for i in range(20)]
    written(tmp_path, *many, how="pairs")
    found = inspect_json(
        capsys, f"model.pretrained={tiny_model}", f"data.train={rows_path(tmp_path, 1)}"
    )
    train = found["rows"]["train"]
    assert (train["read"], train["forms"], train["dropped"]) == (20, {"pair": 20}, {})
    assert train["unread"] == ["marks", "provenance"]


# For all of them ----------------------------------------------------------------------------------

_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
_PROMPTS = st.one_of(
    _TEXTS, st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": _TEXTS}),
                     min_size=1, max_size=2)
)  # fmt: skip
_ANSWERS = st.lists(
    st.tuples(_TEXTS, st.floats(-1e9, 1e9)), min_size=2, max_size=4, unique_by=lambda own: own[0]
)


@settings(max_examples=examples(40))
@given(st.lists(st.tuples(_PROMPTS, _ANSWERS), min_size=1, max_size=3))
def test_any_text_and_any_mark_come_back(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("any")
    prompts = [
        marked_prompt(prompt, [text for text, _ in own], [mark for _, mark in own])
        for prompt, own in drawn
    ]
    own = written(folder, *prompts)
    found = read_round(folder, 1)
    check_same(found.groups, own)
    assert found.marks == [item.marks for item in own]
