"""A conversation with several models: each goes on with its own answers; lines in, lines out."""

import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from dpo_lightning.data.questions import Question
from dpo_lightning.errors import UserError
from dpo_lightning.run.answering.chat import Speaker, Talk, talk_on


class Parrot:
    """Answers with its place and the number of messages that it was given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def encode(self, questions: Sequence[Question]) -> list[Any]:
        prompts = [q.group.prompt for q in questions]
        if any("too long" in str(prompt) for prompt in prompts):
            raise UserError("chat:1: no room")
        self.given += prompts
        return [np.array([1 if isinstance(p, str) else len(p)]) for p in prompts]

    def answer(self, prompts, sampling, *, lam) -> list[Any]:
        return [SimpleNamespace(text=f"{lam:g} of {ids[0]}\nmore") for ids in prompts]


def talk(parrot: Parrot, *, keeps: bool) -> Talk:
    speakers = [Speaker("policy", 1.0), Speaker("reference", 0.0)]
    return Talk(parrot, speakers, SimpleNamespace(), keeps=keeps)  # type: ignore[arg-type]


def said(parrot: Parrot, lines: str, *, keeps: bool = True) -> list[str]:
    out = io.StringIO()
    talk_on(talk(parrot, keeps=keeps), io.StringIO(lines), out)
    return out.getvalue().splitlines()


def test_each_goes_on_with_its_own_answers():
    """The second line comes as the third message of each; what was refused is not remembered."""
    parrot = Parrot()
    found = said(parrot, "hi\nthis is too long\nand?\n")
    assert found == [
        *("policy: 1 of 1 more", "reference: 0 of 1 more"),
        *("policy: 1 of 3 more", "reference: 0 of 3 more"),
    ]
    own, other = ([(m.role, m.content) for m in prompt] for prompt in parrot.given[2:])
    assert own == [("user", "hi"), ("assistant", "1 of 1\nmore"), ("user", "and?")]
    assert other[1] == ("assistant", "0 of 1\nmore")


def test_a_reset_forgets_and_quit_ends():
    found = said(Parrot(), "hi\n/reset\n\nhi\n/quit\nhi\n")
    assert found == ["policy: 1 of 1 more", "reference: 0 of 1 more"] * 2


def test_without_a_conversation_each_line_is_a_prompt_as_it_is():
    parrot = Parrot()
    said(parrot, "hi\nand?\n", keeps=False)
    assert parrot.given == ["hi", "hi", "and?", "and?"]
