"""Settings of judges: the old name, what an open one comes to, and what may stand nowhere."""

import dataclasses
from pathlib import Path

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.settings.compose import compose_one, ready_hydra
from dpo_lightning.settings.judging import (
    gives_marks,
    hashed_evaluation,
    judge_label,
    judge_settings,
    longest_answer,
)
from dpo_lightning.settings.overrides import with_own_names
from dpo_lightning.settings.recorded import read_recorded
from dpo_lightning.settings.schema import Config

ENDPOINT = (
    "evaluation.judge=endpoint",
    "evaluation.judge_url=http://localhost:8000/v1/",
    "evaluation.judge_model=m",
)


def composed(*words: str) -> Config:
    with ready_hydra():
        return compose_one(list(words))


def test_the_old_name_is_the_new_one():
    assert with_own_names(["evaluation.scorer=a,b", "+evaluation.scorer=c"]) == [
        "evaluation.judge=a,b", "+evaluation.judge=c"
    ]  # fmt: skip
    assert with_own_names(["sweep.metric=samples/score"]) == ["sweep.metric=samples/judge"]
    assert composed("evaluation.scorer=org/m").evaluation.judge == "org/m"


def test_the_old_name_in_a_file_of_settings(tmp_path):
    """In a file of the user's it is read by the schema; in a run's own it is renamed."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nevaluation:\n  scorer: org/m\n"
    )
    found = composed(f"--config-dir={tmp_path}", "experiment=mine").evaluation
    assert (found.judge, found.scorer) == ("org/m", None)
    (tmp_path / "config.yaml").write_text("evaluation: {scorer: org/m, judge_form: pairs}\n")
    values = read_recorded(tmp_path / "config.yaml").values
    assert values["evaluation.judge"] == "org/m"
    assert "evaluation.scorer" not in values


def test_another_judge_takes_nothing_of_a_recorded_endpoint(tmp_path):
    recorded = dataclasses.asdict(composed(*ENDPOINT).evaluation)
    lines = [f"  {key}: {value}" for key, value in recorded.items() if value not in (None, {})]
    (tmp_path / "config.yaml").write_text("\n".join(["evaluation:", *lines]))
    config = f"{tmp_path}/config.yaml"
    assert composed("--config", config).evaluation.judge_model == "m"
    for judge in ("none", "org/m"):
        found = composed("--config", config, f"evaluation.judge={judge}").evaluation
        assert (found.judge, found.judge_url) == (None if judge == "none" else judge, None)
    found = composed("--config", config, "evaluation.judge_model=n").evaluation
    assert (found.judge, found.judge_url) == ("endpoint", "http://localhost:8000/v1/")


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        ((), 256),
        (("evaluation.judge=org/m",), 512),
        (ENDPOINT, 512),
        (("evaluation.judge=none",), 256),
        (("evaluation.judge=org/m", "evaluation.max_new_tokens=64"), 64),
        (("evaluation.max_new_tokens=1000",), 1000),
    ],
)
def test_answers_are_longer_where_they_are_judged(words, tokens):
    assert longest_answer(composed(*words)) == tokens


def test_a_judge_as_plain_values(tmp_path):
    config = composed(*ENDPOINT, "evaluation.judge_price=[1,2.5]")
    settings = judge_settings(config, cache=tmp_path)
    assert settings.endpoint.url == "http://localhost:8000/v1"
    assert settings.endpoint.price == (1.0, 2.5)
    assert settings.cache == tmp_path / "marks"
    assert not settings.marks
    assert not gives_marks(config.evaluation)
    assert judge_settings(composed("evaluation.judge=none"), cache=tmp_path) is None


def test_a_label_tells_judges_apart_and_not_how_they_are_reached(tmp_path):
    (tmp_path / "q.txt").write_text("{prompt} {first} {second}")
    label = judge_label(composed(*ENDPOINT).evaluation)
    for same in ("evaluation.judge_timeout=5", "evaluation.judge_concurrency=1"):
        assert judge_label(composed(*ENDPOINT, same).evaluation) == label
    for other in (
        *("evaluation.judge_form=marks", "evaluation.judge_model=n"),
        *("+evaluation.judge_options.top_p=0.5", f"evaluation.judge_prompt={tmp_path}/q.txt"),
    ):
        assert judge_label(composed(*ENDPOINT, other).evaluation) != label, other
    assert judge_label(composed("evaluation.judge=org/m").evaluation) == "org/m"


def test_only_what_changes_marks_is_hashed():
    base = hashed_evaluation(dataclasses.asdict(composed(*ENDPOINT).evaluation))
    assert {"judge_url", "judge_model", "judge_form", "judge_prompt"} <= base.keys()
    assert not {"judge_timeout", "judge_price", "judge_key_variable", "scorer"} & base.keys()
    plain = hashed_evaluation(dataclasses.asdict(composed().evaluation))
    assert not [key for key in plain if key.startswith("judge_")]


@pytest.mark.parametrize(
    "word",
    [
        "evaluation.judge_url=ftp://host/v1",
        "evaluation.judge_url=localhost:8000",
        "evaluation.judge_url='http://host/v1?a=b'",
        "evaluation.judge_key_variable='not a name'",
        "evaluation.judge_key_variable=sk-live",
        "evaluation.judge_price=[1]",
        "evaluation.judge_price=[1,-1]",
        "evaluation.judge_form=trios",
        "evaluation.judge_concurrency=0",
        "evaluation.judge_retries=-1",
        "evaluation.judge_timeout=0",
    ],
)
def test_wrong_values_are_named(word):
    key = word.partition("=")[0]
    with pytest.raises(UserError, match=f"{key}=.* must be "):
        composed(word)


def test_a_key_is_no_setting(monkeypatch):
    """Neither as a setting, nor in the address, and a value of the environment is known."""
    key = "sk-proj-abcdefghijklmnop0123456789"
    monkeypatch.setenv("MY_JUDGE_API_KEY", key)
    for word in (
        *(f"evaluation.judge_key_variable={key}", f"+evaluation.judge_options.user={key}"),
        *(f"evaluation.judge_url=http://me:{key}@host/v1", "+evaluation.judge_options.api_key=x"),
    ):
        with pytest.raises(UserError, match="credentials are no settings") as caught:
            composed(word)
        assert key not in str(caught.value)


def test_a_question_of_ones_own_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("q.txt").write_text("{prompt}: {answer}?")
    composed(*ENDPOINT, "evaluation.judge_prompt=q.txt", "evaluation.judge_form=marks")
    with pytest.raises(UserError, match=r"needs \{prompt\}, \{first\}, \{second\} and no other"):
        composed(*ENDPOINT, "evaluation.judge_prompt=q.txt")
