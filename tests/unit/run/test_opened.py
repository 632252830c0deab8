"""Names that users give: told apart, refused in one line, and composed into settings."""

import json
from pathlib import Path

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.run import opened as opening
from dpo_lightning.run.opened import (
    compose_opened,
    last_step,
    names_rows,
    open_all,
    open_named,
)
from dpo_lightning.run.words import Grammar, check_settings, read_words
from dpo_lightning.settings.compose import ready_hydra


def folder(path: Path, **files: object) -> Path:
    """A folder with files; names have __ for a dot."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text)
    return path


def whole(path: Path) -> Path:
    return folder(path, config__json={"model_type": "llama"}, model__safetensors="x")


def adapter(path: Path, base: str | None) -> Path:
    values = {"base_model_name_or_path": base, "peft_type": "LORA"}
    return folder(path, adapter_config__json=values, adapter_model__safetensors="x")


def run(path: Path, *, of_adapter: bool = False, base: str | None = None) -> Path:
    folder(path, config__yaml="beta: 0.1\ntrainer:\n  max_steps: 8\n", result__json={"step": 6})
    adapter(path / "model", base) if of_adapter else whole(path / "model")
    return path


def refusal(*words: object, **named: object) -> str:
    with pytest.raises(UserError) as caught:
        open_named(*map(str, words), **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_brings_its_settings_and_its_reference(tmp_path):
    found = open_named(str(run(tmp_path / "a")))
    export = str(tmp_path / "a" / "model")
    assert (found.kind, found.run) == ("run", tmp_path / "a")
    assert (found.weights, found.adapter, found.reference) == (export, None, None)
    assert found.words == ("--config", str(tmp_path / "a" / "config.yaml"))
    assert found.trained_beta
    assert last_step(tmp_path / "a") == (6, 8)
    own = open_named(str(run(tmp_path / "b", of_adapter=True, base="org/base")))
    assert (own.kind, own.weights) == ("run", "org/base")
    assert own.adapter == str(tmp_path / "b" / "model")


def test_a_model_alone_needs_a_reference(tmp_path):
    model, other = whole(tmp_path / "m"), whole(tmp_path / "r")
    said = refusal(model)
    assert said.startswith(f"run={model}: a model alone has no reference to be compared with")
    assert "--reference MODEL" in said
    found = open_named(str(model), reference=str(other))
    assert (found.kind, found.weights, found.reference) == ("model", str(model), str(other))
    assert not found.trained_beta
    export = run(tmp_path / "a") / "model"
    assert f"name its run, {tmp_path / 'a'}, which has one" in refusal(export)
    # As a reference a run is its trained policy.
    of_run = open_named(str(model), reference=str(tmp_path / "a"))
    assert of_run.reference == str(export)


def test_an_adapter_is_compared_with_its_base(tmp_path):
    base = whole(tmp_path / "base")
    own = adapter(tmp_path / "own", str(base))
    found = open_named(str(own))
    assert (found.kind, found.weights, found.adapter) == ("adapter", str(base), str(own))
    assert (found.reference, found.tokenizer) == (None, None)
    assert found.words[0] == "peft=lora"
    assert "reference.adapter=base" in found.words
    other = adapter(tmp_path / "other", str(base))
    with_other = open_named(str(own), reference=str(other))
    assert f"reference.adapter='{other}'" in with_other.words
    assert "reference.adapter=base" not in with_other.words
    said = refusal(base, reference=str(other))
    assert said.startswith(f"--reference {other}: an adapter cannot be the reference of whole")


def test_folders_that_cannot_answer_are_refused_by_name(tmp_path):
    assert "it is a sweep's folder" in refusal(folder(tmp_path / "s", sweep__json="{}"))
    assert "the run is failed; resume=" in refusal(
        folder(tmp_path / "f", result__json={"status": "failed"})
    )
    assert "the folder has no config.json or adapter_config.json" in refusal(folder(tmp_path / "e"))
    assert "no weights" in refusal(folder(tmp_path / "w", config__json="{}"), reference="a/b")
    pickled = folder(tmp_path / "p", config__json="{}", pytorch_model__bin="x")
    assert "is a pickle" in refusal(pickled, reference="a/b")
    assert "is a file" in refusal(tmp_path / "p" / "config.json")
    assert "names no base model" in refusal(adapter(tmp_path / "n", None))
    assert "its base model is /gone/x, which is not there" in refusal(
        adapter(tmp_path / "g", "/gone/x")
    )
    damaged = folder(tmp_path / "d", adapter_config__json="{", adapter_model__safetensors="x")
    assert "its adapter_config.json is damaged" in refusal(damaged)
    assert "a run, which has a reference of its own" in refusal(
        run(tmp_path / "r"), reference="a/b"
    )


def test_a_mistyped_folder_is_no_hub_id(tmp_path, monkeypatch):
    """Two words with a slash are an id, unless the first of them is a folder that is here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    asked = []
    monkeypatch.setattr(opening, "_hub_adapter", lambda name: asked.append(name))
    for name in ("none", "outputs/run", "a/b/c", str(tmp_path / "x"), "../x"):
        assert refusal(name, reference="a/b").startswith(f"run={name}: no such folder")
    assert asked == []
    found = open_named("org/model", reference="org/start")
    assert (found.weights, found.reference, asked) == (
        "org/model",
        "org/start",
        ["org/model", "org/start"],
    )


def test_an_adapter_of_the_hub_is_known_by_its_config(monkeypatch):
    of_hub = {"org/lora": {"base_model_name_or_path": "org/base"}}
    monkeypatch.setattr(opening, "_hub_adapter", of_hub.get)
    found = open_named("org/lora")
    assert (found.kind, found.weights, found.adapter) == ("adapter", "org/base", "org/lora")


def test_runs_and_models_stand_beside_each_other(tmp_path):
    names = [str(run(tmp_path / "a")), str(whole(tmp_path / "m"))]
    found = open_all(names, reference="org/start")
    assert [own.reference for own in found] == [None, "org/start"]
    with pytest.raises(UserError, match="all of these are runs"):
        open_all(names[:1], reference="org/start")


@pytest.mark.parametrize("name", ["plain", "it's, {x} [y]", "b\\c=d"])
def test_settings_of_a_model_are_composed_whatever_its_name(tmp_path, name: str):
    """All rows that are named are held out: they stand in the place of training rows."""
    model, rows = whole(tmp_path / name), tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    found = open_named(str(model), reference=str(whole(tmp_path / f"{name} 2")))
    with ready_hydra():
        config = compose_opened(found, [f"data.eval={rows}", "data.columns.prompt=question"])
    assert config.model.pretrained == str(model)
    assert config.reference.pretrained == str(tmp_path / f"{name} 2")
    assert (config.data.train, config.data.eval) == (str(rows), None)
    assert config.data.columns == {"prompt": "question"}


def test_errors_about_rows_name_the_key_that_was_typed(tmp_path):
    found = open_named(str(whole(tmp_path / "m")), reference=str(whole(tmp_path / "r")))
    with ready_hydra(), pytest.raises(UserError) as caught:
        compose_opened(found, ["data.eval={path: a.jsonl, weight: 7}"])
    assert "data.eval=" in str(caught.value)
    assert "data.train" not in str(caught.value)


def test_settings_of_a_run_that_lost_them(tmp_path):
    found = open_named(str(run(tmp_path / "a")))
    (tmp_path / "a" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"its config\.yaml is gone"):
        compose_opened(found)
    assert last_step(tmp_path / "a") is None


# Words ------------------------------------------------------------------------------------------

GRAMMAR = Grammar(
    "evaluate", ("--slice",), ("--json",), ("evaluation", "data.columns", "data.eval")
)


def test_words_are_told_apart_in_any_order():
    found = read_words(
        ["--slice=a", "x", "evaluation.samples=3", "--json", "--slice", "b", "+data.columns.p=q"],
        GRAMMAR,
    )
    assert found.names == ("x",)
    assert found.flags == {"--slice": ("a", "b")}
    assert found.switches == {"--json"}
    assert found.settings == ("evaluation.samples=3", "+data.columns.p=q")
    with pytest.raises(UserError, match="it is there 2 times"):
        found.one("--slice")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("beta=0.3", "beta: `"),
        ("--jsn", "--jsn: `"),
        ("evaluations.x=1", "evaluations.x: `"),
        ("--slice", "--slice: needs a value"),
        ("-x", "-x: `"),
    ],
)
def test_a_word_without_meaning_is_refused_with_those_that_have_one(word: str, said: str):
    with pytest.raises(UserError) as caught:
        read_words([word], GRAMMAR)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["beta=0.3"], "beta: it is what "),
        (["data.columns.prompt=q"], "data.columns.prompt: "),
        (["evaluation.every_n_steps=3"], "evaluation.every_n_steps: it is for training, "),
    ],
)
def test_a_run_keeps_what_it_was_trained_with(tmp_path, words: list[str], said: str):
    found = open_named(str(run(tmp_path / "a")))
    with pytest.raises(UserError) as caught:
        check_settings(found, words)
    assert str(caught.value).startswith(said)
    check_settings(found, ["data.eval=x.jsonl", "data.columns.prompt=q", "evaluation.samples=3"])


def test_a_model_alone_needs_rows(tmp_path):
    found = open_named(str(whole(tmp_path / "m")), reference="org/start")
    with pytest.raises(
        UserError, match=r"has no rows of its own; name held-out ones with data\.ev"
    ):
        check_settings(found, [])
    check_settings(found, ["data.eval=x.jsonl", "beta=0.3"])
    assert names_rows(["+data.eval=x"])
    assert not names_rows(["data.eval_split=x"])
