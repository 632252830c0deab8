"""The one grammar of words behind a command, and the frame that its answer stands in."""

import json
import sys

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.run.framed import answer_alone, print_answer, said_help, writing
from dpo_lightning.run.share.words import find_export
from dpo_lightning.run.words import Grammar, read_words

GRAMMAR = Grammar(
    "evaluate",
    flags=("--slice", "--output"),
    switches=("--json",),
    settings=("plugins", "evaluation"),
)


def test_words_are_told_apart_in_any_order(tmp_path, monkeypatch):
    """A value stands behind a space or an equals sign; a folder may have one in its name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beta=1").mkdir()
    words = read_words(
        ["--slice", "a", "run", "evaluation.judge=x", "--json", "beta=1", "--slice=b=c"], GRAMMAR
    )
    assert words.names == ("run", "beta=1")
    assert words.flags == {"--slice": ("a", "b=c")}
    assert words.switches == {"--json"}
    assert words.settings == ("evaluation.judge=x",)
    assert words.one("--output") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--slice"], "--slice: needs a value behind it"),
        (["--slice="], "--slice: needs a value behind it"),
        # Else the file would be called --json, and no object be printed.
        (["--output", "--json"], "--output: needs a value behind it"),
        (["--json=true"], "--json: it takes no value; type --json alone"),
        (["--jsn"], "--jsn: `"),
        (["beta=1"], "beta: `"),
        (["evaluationjudge=x"], "evaluationjudge: `"),
    ],
)
def test_a_word_that_means_nothing_is_refused_by_name(words, said):
    with pytest.raises(UserError) as caught:
        read_words(["run", *words], GRAMMAR)
    assert str(caught.value).startswith(said)


def test_the_remedies_are_taken():
    assert read_words(["run", "--json", "--output", "x"], GRAMMAR).one("--output") == "x"
    assert read_words(["run", "--slice=--json"], GRAMMAR).one("--slice") == "--json"


def test_a_flag_that_counts_once_and_the_only_name():
    with pytest.raises(UserError, match="--output b: it is there 2 times; give it once"):
        read_words(["--output", "a", "--output=b"], GRAMMAR).one("--output")
    assert read_words(["run"], GRAMMAR).only_name("evaluate") == "run"
    for names, said in (([], "no folder: name one policy"), (["a", "b"], "a, b: name one policy")):
        with pytest.raises(UserError, match=said):
            read_words(names, GRAMMAR).only_name("evaluate")


def test_words_of_a_run_are_settings_and_nothing_is_a_name():
    """A run's own grammar knows no names: its settings say what is wrong with them."""
    grammar = Grammar("preflight", flags=("--gib",), switches=(), settings=None)
    words = read_words(["beta=1", "--gib", "80", "+a=b", "--config", "x.yaml"], grammar)
    assert words.settings == ("beta=1", "+a=b", "--config", "x.yaml")
    assert (words.one("--gib"), words.names) == ("80", ())


# The frame ---------------------------------------------------------------------------------------


def test_help_is_said_wherever_it_is_asked_for(capsys):
    text = "usage: {program} as `{other}`, {{}}"
    assert not said_help(["run"], text, "evaluate", other="compare")
    assert capsys.readouterr().out == ""
    assert said_help(["run", "-h"], text, "evaluate", other="compare")
    out = capsys.readouterr().out
    assert out.startswith("usage: ")
    assert " evaluate as `" in out
    assert out.endswith("compare`, {}\n")


def test_the_answer_alone_is_on_stdout_and_is_json(capsys):
    """A number that is not finite is null, as JSON has none such."""
    with answer_alone():
        print("a library's line")
    found = {"metrics": {"loss": float("nan"), "kl": 0.5}}
    print_answer(found, as_json=True, show=lambda own: pytest.fail("it is for a person"))
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"metrics": {"loss": None, "kl": 0.5}}
    assert captured.err == "a library's line\n"
    print_answer(found, as_json=False, show=lambda own: sys.stdout.write(str(own["metrics"]["kl"])))
    assert capsys.readouterr().out == "0.5"


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file/below: Not a directory"), writing(tmp_path):
        (tmp_path / "file" / "below").write_text("y")
    with pytest.raises(UserError) as caught, writing(tmp_path / "page"):
        raise OSError("of no file")
    assert str(caught.value) == f"{tmp_path / 'page'}: of no file"


# What is shared ----------------------------------------------------------------------------------


def test_a_hub_id_is_told_from_a_mistyped_folder(tmp_path, monkeypatch):
    """Neither asks the hub: what is there is shared already."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(UserError, match="`hf download owner/model --local-dir <folder>`"):
        find_export("owner/model")
    for name in ("outputs/rnu", "rnu"):
        with pytest.raises(UserError, match=f"run={name}: no such folder; name a run's"):
            find_export(name)
