"""The page of a comparison, self-contained: differences, facts, answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_lightning.run.page.environment import page_environment
from dpo_lightning.run.page.text import LONGEST_TEXT, clean, cut, number_text, range_text
from dpo_lightning.sweeps.compare.subjects import Subject

MOST_PROMPTS = 40
"""Prompts whose answers are shown."""

_LONGEST_ANSWER = 4 * LONGEST_TEXT


@dataclass(frozen=True, slots=True)
class AnswersToPrompt:
    """Answers of all policies to one prompt.

    Attributes:
        prompt: The prompt.
        answers: Label and answer of each, the preferred answer of the data first.
    """

    prompt: str
    answers: tuple[tuple[str, str], ...]


def answers_side_by_side(subjects: Sequence[Subject]) -> list[AnswersToPrompt]:
    """Answers to the prompts that all policies answered.

    Args:
        subjects: The policies.
    """
    by_prompt = [{row["prompt"]: row for row in own.answers} for own in subjects]
    shared = [prompt for prompt in by_prompt[0] if all(prompt in own for own in by_prompt)]
    return [
        AnswersToPrompt(
            cut(prompt, keep_end=True),
            (
                ("preferred in the data", cut(by_prompt[0][prompt]["preferred"], _LONGEST_ANSWER)),
                *(
                    (own.label, cut(rows[prompt]["answer"], _LONGEST_ANSWER))
                    for own, rows in zip(subjects, by_prompt, strict=True)
                ),
            ),
        )
        for prompt in shared[:MOST_PROMPTS]
    ]


def comparison_page(found: Mapping[str, Any], subjects: Sequence[Subject]) -> str:
    """The page, as HTML that needs no other file.

    Args:
        found: The object that ``--json`` prints.
        subjects: The policies.
    """
    rows = [
        [
            own["metric"],
            own["a"],
            number_text(own["value_a"]),
            own["b"],
            number_text(own["value_b"]),
            number_text(own["difference"]),
            range_text(*own["interval"]) or number_text(own["interval"][0]),
            number_text(own["p"], 2),
            f"{own['items']:,}",
        ]
        for own in found["differences"]
    ]
    policies = [
        [own["label"], own["name"], number_text(own["beta"]), own["loss"] or "–"]
        for own in found["runs"]
    ]
    heads = (
        *("metric", "a", "value of a", "b", "value of b", "b − a"),
        *("95% interval", "p", "items"),
    )
    template = page_environment("sweeps/report/templates").get_template("compare.html")
    page: str = template.render(
        title=clean(" · ".join(own.label for own in subjects)),
        heads=heads,
        rows=rows,
        policies=policies,
        notes=found["notes"],
        prompts=answers_side_by_side(subjects),
    )
    return page
