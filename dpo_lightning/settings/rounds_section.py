"""Schema of the ``rounds`` section: answers that the policy draws to be trained on. No torch."""

from dataclasses import dataclass
from typing import Any

from dpo_lightning.settings.fields import setting


@dataclass
class RoundsConfig:
    """On-policy rounds: the policy draws answers, a judge marks them, and training goes on."""

    count: int = setting(
        0,
        "Rounds of the run: in each the policy draws answers as it is by then, the judge marks "
        "them, and they are trained on; 0: the given rows alone are.",
        unit="rounds",
        least=0,
    )
    prompts: int | None = setting(
        None,
        "Prompts of a round, those of training rows, other ones in each round; null: as many as "
        "the round's steps have groups for, at most all.",
        unit="prompts",
        least=1,
    )
    num_generations: int = setting(
        4, "Answers that the policy draws to each prompt.", unit="answers", least=2
    )
    steps: int | None = setting(
        None,
        "Optimizer steps of a round; 1 is online DPO. null: trainer.max_steps (or the steps of "
        "trainer.max_epochs) over rounds.count, rounded down.",
        unit="steps",
        least=1,
    )
    temperature: float = setting(
        1.0, "Temperature at which answers are drawn.", unit="number", above=0
    )
    max_new_tokens: int | None = setting(
        None, "Longest answer; null: evaluation.max_new_tokens.", unit="tokens", least=1
    )
    groups: str = setting(
        "pairs",
        "Groups made of a prompt's answers: random disjoint pairs, the best with the worst, one "
        "ranking of all, or every pair that rounds.min_margin leaves (margin).",
        choices=("pairs", "best_worst", "ranking", "margin"),
    )
    min_margin: float = setting(
        0.0,
        "Smallest difference of marks in a group, in a ranking from end to end; groups below it "
        "are dropped.",
        unit="of the mark",
        least=0,
    )
    noise: str | None = setting(
        None,
        "Labels: none takes the order of the marks, bradley_terry draws it by them (a ranking by "
        "Plackett-Luce); null: bradley_terry where the marks are the embedded task's true reward, "
        "else none.",
        choices=("none", "bradley_terry"),
    )
    reference: str = setting(
        "start",
        "Reference of a round: the start of the run, or the policy as the round before left it "
        "(previous). KL and frontier are to the start either way.",
        choices=("start", "previous"),
    )
    offline_fraction: float = setting(
        0.0,
        "Share of each step's groups that comes from the given rows.",
        unit="share",
        least=0,
        below=1,
    )


def own_rounds(section: dict[str, Any] | None) -> dict[str, Any]:
    """The entry of a section in a hash of settings; none without rounds, as runs of before.

    Args:
        section: The section as plain values.
    """
    return {} if section is None or not section["count"] else {"rounds": section}
