"""Policies that may be compared: the same rows, template, limits; metrics that mean one thing.

Rows are told by their token ids, so whatever changes these is seen; what does not is no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.settings.conduct import scales_with_beta
from dpo_lightning.settings.messages import shown
from dpo_lightning.sweeps.compare.subjects import Subject
from dpo_lightning.sweeps.report.comparable import MOST_CUT_OFF
from dpo_lightning.sweeps.report.pooling import JUDGED, LABEL_GAIN, SAMPLED_KL

_TEMPLATE = ("data.chat_template", "data.chat_template_kwargs", "data.template_date")
_LIMITS = ("data.max_length", "data.truncation")
_OF_ANSWERS = ("evaluation.max_new_tokens",)
_ROWS = (
    *("data.train", "data.eval", "data.train_split", "data.eval_split", "data.subset"),
    *("data.revision", "data.format", "data.columns", "data.ignore_fields", "data.eval_fraction"),
    *("data.split_seed", "evaluation.max_prompts", "data.controlled.eval_groups"),
    "data.controlled.form",
    *("model.pretrained", "model.config", "model.tokenizer"),
)
_OF_REFERENCE = (
    SAMPLED_KL,
    "eval/logratios/",
    "eval/fitted_log_loss",
    "eval/loss",
    LABEL_GAIN,
)


def check_comparable(subjects: Sequence[Subject]) -> None:
    """Refuses policies whose numbers are of other rows, another template or other limits.

    Args:
        subjects: Two or more.

    Raises:
        UserError: With what differs.
    """
    for one, other in combinations(subjects, 2):
        keys = [*_TEMPLATE, *_LIMITS]
        if SAMPLED_KL in one.items and SAMPLED_KL in other.items:
            keys += _OF_ANSWERS
        differing = list(_differing(one, other, keys))
        if differing:
            raise UserError(
                f"{one.name} and {other.name} are not compared: {'; '.join(differing)}; type the "
                "same values here, beside data.eval=, to evaluate both alike"
            )
        if one.rows != other.rows:
            raise UserError(f"{one.name} and {other.name} are not compared: {_rows(one, other)}")


def _differing(one: Subject, other: Subject, keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        values = [own.settings.get(key) for own in (one, other)]
        if values[0] != values[1]:
            first, second = map(_shown, values)
            yield f"{key} is {first} in {one.label} and {second} in {other.label}"


def _shown(value: Any) -> str:
    return "null" if value is None else shown(value)


def _rows(one: Subject, other: Subject) -> str:
    """The difference of two sets of rows, and the settings that it comes from."""
    common = (one.rows & other.rows).total()
    totals = [own.rows.total() for own in (one, other)]
    said = (
        f"their held-out rows differ: {totals[0]:,} and {totals[1]:,}, of which {common:,} are the "
        "same"
    )
    differing = list(_differing(one, other, _ROWS))
    if differing:
        said += f" ({'; '.join(differing)})"
    return f"{said}; data.eval=<file or hub id> evaluates both on the same rows"


def metrics_to_compare(subjects: Sequence[Subject]) -> tuple[list[str], list[str]]:
    """Metrics that all have and that mean the same of all, and what is said of others.

    Args:
        subjects: Two or more that may be compared.

    Returns:
        The metrics, and notes, a sentence each.
    """
    common = [name for name in subjects[0].items if all(name in own.items for own in subjects)]
    left, notes = dict.fromkeys(common), []

    def leave_out(names: Sequence[str], why: str) -> None:
        gone = [name for name in names if name in left]
        if gone:
            for name in gone:
                del left[name]
            notes.append(f"Not compared: {', '.join(gone)}. {why}")

    betas = [own.beta for own in subjects]
    if len({*betas}) > 1 or None in betas:
        told = ", ".join("unknown" if beta is None else f"{beta:g}" for beta in betas)
        leave_out(
            [name for name in common if scales_with_beta(name)],
            f"They scale with β, which is {told}.",
        )
    elif len({str(_loss(own)) for own in subjects}) > 1:
        leave_out(["eval/loss"], "The losses differ.")
    if len({own.reference for own in subjects}) > 1:
        leave_out(
            [name for name in common if name.startswith(_OF_REFERENCE)],
            "They are measured against the reference, and the references differ.",
        )
        notes.append("Each accuracy is against the policy's own reference.")
    if len({str(_judge(own)) for own in subjects}) > 1:
        leave_out(JUDGED, "The judges differ.")
    cut = [own for own in subjects if (own.cut_off or 0.0) > MOST_CUT_OFF]
    if cut and any(name.startswith("samples/") for name in left):
        shares = ", ".join(f"{own.cut_off:.0%} of {own.label}'s" for own in cut)
        notes.append(
            f"Answers were cut off at the limit: {shares}; samples/* cover only their beginnings."
        )
    return list(left), notes


def _loss(subject: Subject) -> Any:
    return subject.settings.get("loss")


def _judge(subject: Subject) -> Any:
    of = subject.settings.get
    return of("evaluation.judge"), of("evaluation.scorer")
