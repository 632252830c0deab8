"""Answers to keys of other programs, and what several tables of them say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Answer:
    """The settings in place of a foreign name, or a sentence why there are none.

    Attributes:
        use: Settings to type, such as ``optimizer.lr=<rate>``; empty where there are none.
        why: More to know about it.
        carries: True if the typed value means the same there, so that it stands for ``<...>``.
        values: Settings for certain typed values, in place of ``use``; an empty text is none.
    """

    use: str = ""
    why: str = ""
    carries: bool = False
    values: Mapping[str, str] = field(default_factory=dict)


def same(use: str, why: str = "") -> Answer:
    """A setting that takes the same values."""
    return Answer(use, why, carries=True)


def other(use: str, why: str = "", **values: str) -> Answer:
    """Settings that do it, in values of their own."""
    return Answer(use, why, values=values)


def none(why: str) -> Answer:
    """No setting."""
    return Answer(why=why)


# Of several tables.
HUB = none("a run uploads nothing; the command `push` uploads its model/")
HEAD = none("only response tokens meet the vocabulary here, in every run")
ONE_READER = none("rows are read by one process; their token ids are cached")
ATTENTION = none("attention is chosen by model and device; the log says which")
IN_4_BITS = other("peft=qlora", "in 4 bits; 8 bits are unsupported")
PARTS = other("trainer.max_steps=<steps>", "a step is a batch of data.batch_size groups")
ROW_ORDER = none("the order of the rows follows from the seed")
FROZEN = none("what has no adapter stays frozen; peft.target_modules")
LOGIN = none("`hf auth login` or HF_TOKEN in the environment gives it")
EVALUATIONS = other(
    "evaluation.every_n_steps=<steps>",
    "null evaluates ten times a run; data.eval_fraction=0 holds no rows out",
    epoch="evaluation.every_n_steps=<steps of a pass>",
    no="data.eval_fraction=0",
)
