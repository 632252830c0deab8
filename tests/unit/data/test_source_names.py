"""The form of a name decides its kind; settings and sources agree on it."""

import pytest

from dpo_lightning.data.source_names import FILE_SUFFIXES, is_address, is_hub_id, is_local_data


@pytest.mark.parametrize(
    ("name", "is_id", "is_file"),
    [
        ("gpt2", True, False),
        ("owner/name-1.5_x", True, False),
        ("_owner/_name", True, False),
        ("a/b/c", False, False),
        ("-x", False, False),
        ("owner/-x", False, False),
        ("owner/", False, False),
        ("größe", False, False),
        ("a b", False, False),
        ("", False, False),
        ("./gpt2", False, True),
        ("../x/y", False, True),
        ("/gpt2", False, True),
        ("~/gpt2", False, True),
        ("rows.jsonl", True, True),
        ("rows.JSON", True, True),
        ("owner/rows.xlsx", True, True),
        ("owner/model-0.6", True, False),
    ],
)
def test_a_name_is_told_apart_by_its_form(name, is_id, is_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (is_hub_id(name), is_local_data(name or "nothing")) == (is_id, is_file)


def test_what_is_there_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_local_data("gpt2")
    (tmp_path / "gpt2").touch()
    assert is_local_data("gpt2")


def test_endings_are_lower_case_with_their_dot():
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in FILE_SUFFIXES)


def test_addresses():
    assert is_address("https://host/rows.jsonl")
    assert is_address("s3://bucket/x")
    assert not is_address("C:/rows.jsonl")
