"""Remedies that messages print, followed: the message may not come back, and nothing worse come.

A case of another room is a row of ``OTHER_CASES``: settings, and who answers them.
"""

import json
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from dpo_lightning.settings.messages import unknown_key
from tests.support.remedies import (
    Case,
    advice_of,
    faults_of,
    filled,
    followed,
    packages_in,
    settings_in,
)
from tests.support.runs import ROOT
from tests.support.setting_rows import ROWS
from tests.support.settings_said import installed, judged, make_files, read, said

FILLS = {
    **{"model.pretrained": "model", "model.config": "model", "data.train": "rows.jsonl"},
    **{"reference.pretrained": "org/other", "peft.adapter": "adapter", "data.eval": "a.json"},
    **{"reference.adapter": "adapter", "loss.beta_end": "0.05", "hydra.run.dir": "r"},
    **{"evaluation.judge_url": "http://localhost/v1", "evaluation.judge_model": "m"},
    **{"evaluation.judge": "org/m"},
}
"""Files and numbers of the reader, for what a message leaves open."""

IN_WORDS = (
    *("name a f", "name the f", "name a checkpoint", "a hub id has the form", "no such f"),
    *("rows are read from files that", "the folder has no ", "a template itself has", "raise it"),
    *("must be ", "needs a", "expected .jsonl", "name it once", "name layers of the decoder"),
    "pip install",
)
"""Words of messages that tell what to do without a setting to type."""


def case_of(refused: str, accepted: str) -> Case:
    [clause] = said(refused)
    in_words = not followed(clause, refused.split(), fills=FILLS)
    if in_words:
        assert any(words in clause for words in IN_WORDS), f"no remedy: {clause}"
    return Case(refused, said, accepted if in_words else "")


OTHER_CASES = [
    *(
        Case(line, judged)
        for line in (
            *("trainer.max_steps=-1", "trainer.max_epochs=-1", "trainer.devices=-1"),
            *("trainer.precision=fp16", "trainer.precision=bf16", "model.dtype=bf16"),
            *("data.truncation=keep_end", "optimizer.schedule=cosine_with_restarts"),
            *("loss.name=dpo", "loss.name=sigmod", "optimizer.name=adamw_torch"),
            *("strategy.name=deepspeed", "reference.kind=cache", "lr=0.001", "save_steps=10"),
            *("bf16=true", "loss.reference_free=true", "loss_type=dpo", "val_check_interval=5"),
        )
    ),
    *(
        Case(line, judged, right)
        for line, right in (
            ("beta=0", "beta=0.1"),
            ("trainer.max_time=10m", "trainer.max_time=00:00:10:00"),
            ("loss.beta=0.2", "beta=0.2"),
            ("padding_free=true", "beta=0.1"),
        )
    ),
    Case("data.train=one_bad.jsonl", read),
]

ROWS_OF_FILES = {
    "one_bad.jsonl": [
        *({"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(40)),
        {"prompt": "q", "chosen": "good", "rejected": 7},
    ],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path)
    for name, rows in ROWS_OF_FILES.items():
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setitem(sys.modules, "bitsandbytes", installed("bitsandbytes"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("row", [row for row in ROWS if not row.without], ids=lambda r: r.refused)
def test_a_remedy_for_settings_that_do_not_go_together(row) -> None:
    assert faults_of(case_of(row.refused, row.accepted), fills=FILLS) == []


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("case", OTHER_CASES, ids=lambda case: case.typed)
def test_a_remedy_of_another_message(case: Case) -> None:
    assert faults_of(case, fills=FILLS) == []


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("row", [row for row in ROWS if row.without], ids=lambda row: row.message)
def test_a_package_to_install_is_an_extra_that_brings_it(row, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, row.without, None)
        [clause] = said(row.refused)
    [name] = packages_in(clause)
    [package, extra] = re.findall(r"[\w-]+", name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert package == project["name"]
    assert any(line.startswith(row.without) for line in project["optional-dependencies"][extra])
    assert said(row.refused) == []


# The frame sees what it is about ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "typed", "lines"),
    [
        ("a.b=1: no; use beta=0.2", ["a.b=1"], [("a.b=1", "beta=0.2")]),
        ("beta=0: needs beta=1 or beta=2", ["beta=0"], [("beta=1",), ("beta=2",)]),
        ("beta=3: x; leave it out", ["beta=3", "seed=1"], [("seed=1",)]),
        (
            "model.config=a and model.pretrained=b: give one of the two",
            ["model.config=a", "model.pretrained=b"],
            [("model.pretrained=b",), ("model.config=a",)],
        ),
        (
            "peft.quantization=nf4: model.config=a is random; set model.pretrained= instead",
            ["peft.quantization=nf4", "model.config=a"],
            [("peft.quantization=nf4", "model.pretrained=model")],
        ),
        ("seed=x: use <something>", ["seed=x"], []),
    ],
)
def test_messages_are_followed_to_the_word(
    message: str, typed: list[str], lines: Sequence[tuple[str, ...]]
) -> None:
    assert followed(message, typed, fills=FILLS) == [*lines]


def test_advice_comes_after_the_fault() -> None:
    assert advice_of("peft=none trains all weights; add peft=lora") == "add peft=lora"
    assert settings_in("use data.train=<file> (or none=1) `beta=2`") == [
        "data.train=<file>",
        "beta=2",
    ]
    assert filled("loss.name=<a|b>", {}) == ["loss.name=a", "loss.name=b"]
    assert filled("hydra.run.dir=<folder>", FILLS) == ["hydra.run.dir=r"]


def test_a_remedy_that_does_not_work_is_found() -> None:
    def circle(line: str) -> list[str]:
        """Sends its reader to and fro."""
        return [f"{line}: no; use beta={2 if line == 'beta=1' else 1}"]

    [fault] = faults_of(Case("beta=1", circle), fills={})
    assert "is answered with the same" in fault
    assert faults_of(Case("beta=1", lambda line: [f"{line}: no"]), fills={}) == [
        "'beta=1' has no remedy: beta=1: no"
    ]
    assert (
        "is answered still"
        in faults_of(
            Case("beta=1", lambda line: [f"{line}: no; use beta={int(line[5:]) + 1}"]), fills={}
        )[0]
    )
    assert followed(unknown_key("lr", 0.1), ["lr=0.1"], fills={}) == [("optimizer.lr=0.1",)]
