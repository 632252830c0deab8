"""The ``rounds`` section as plain values, and what is wrong with it. No torch.

A round draws, marks, makes groups and trains; one schedule and one optimizer go over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, cast

from dpo_lightning.settings.judging import gives_marks, judge_named, longest_answer
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.rounds_section import RoundsConfig
from dpo_lightning.settings.schema import Config

How = Literal["pairs", "best_worst", "ranking", "margin"]
Noise = Literal["none", "bradley_terry"]


@dataclass(frozen=True, slots=True)
class RoundSettings:
    """Rounds as plain values, with what was open decided but for the steps.

    Attributes:
        count: Rounds of the run, at least 1.
        prompts: Prompts of a round; None: as many as its steps have groups for.
        num_generations: Answers to each.
        steps: Optimizer steps of a round; None: a share of the run's.
        temperature: Of the draws.
        max_new_tokens: Longest answer, before model and task bound it.
        groups: The groups that answers make.
        min_margin: Smallest difference of marks in a group.
        noise: The way to labels.
        previous: True if a round's reference is the policy that draws its answers.
        offline_fraction: Share of a step's groups that are given rows.
        exact: True if the marks are the embedded task's true reward.
    """

    count: int
    prompts: int | None
    num_generations: int
    steps: int | None
    temperature: float
    max_new_tokens: int
    groups: How
    min_margin: float
    noise: Noise
    previous: bool
    offline_fraction: float
    exact: bool

    @property
    def groups_per_prompt(self) -> int:
        """Groups that the answers to a prompt make, where none is dropped."""
        k = self.num_generations
        return {"pairs": k // 2, "margin": k * (k - 1) // 2}.get(self.groups, 1)


def round_settings(config: Config) -> RoundSettings | None:
    """The section as plain values; None where there are no rounds.

    Args:
        config: The checked settings.
    """
    rounds = config.rounds
    if not rounds.count:
        return None
    exact = config.data.train is None and judge_named(config.evaluation) is None
    return RoundSettings(
        count=rounds.count,
        prompts=rounds.prompts,
        num_generations=rounds.num_generations,
        steps=rounds.steps,
        temperature=rounds.temperature,
        max_new_tokens=rounds.max_new_tokens or longest_answer(config),
        groups=cast(How, rounds.groups),
        min_margin=rounds.min_margin,
        noise=cast(Noise, rounds.noise or ("bradley_terry" if exact else "none")),
        previous=rounds.reference == "previous",
        offline_fraction=rounds.offline_fraction,
        exact=exact,
    )


# What is wrong with them -------------------------------------------------------------------------


def rounds_problems(config: Config) -> Iterator[str]:
    """Yields the contradictions of the section, one clause each."""
    rounds, default = config.rounds, RoundsConfig()
    if not rounds.count:
        for name, value in asdict(rounds).items():
            if value != getattr(default, name):
                yield (
                    f"rounds.{name}={value}: rounds.count=0 draws nothing; add rounds.count=3, or "
                    "leave it out"
                )
        return
    yield from _marks(config)
    yield from _length(config)
    yield from _reference(config)
    yield from _others(config)


def _marks(config: Config) -> Iterator[str]:
    """Faults of who marks, and of the groups that marks make."""
    rounds, evaluation = config.rounds, config.evaluation
    key = f"rounds.count={rounds.count}"
    if config.data.train is not None and judge_named(evaluation) is None:
        yield (
            f"{key} needs a judge that marks the answers: set evaluation.judge=<a function of a "
            "plugin or a reward model>"
        )
    elif judge_named(evaluation) is not None and not gives_marks(evaluation):
        # What it says of two answers is a label already.
        drawn = rounds.noise == "bradley_terry"
        if rounds.groups != "pairs" or drawn or rounds.min_margin:
            yield (
                f"{key}: evaluation.judge_form=pairs compares two answers, which makes "
                "rounds.groups=pairs with rounds.noise=none and rounds.min_margin=0 alone; use "
                "evaluation.judge_form=marks, or these"
            )


def _length(config: Config) -> Iterator[str]:
    """Faults of the steps of a run and of its rounds."""
    rounds, trainer = config.rounds, config.trainer
    if rounds.steps is None:
        if trainer.max_steps is not None and trainer.max_steps < rounds.count:
            yield (
                f"rounds.count={rounds.count}: trainer.max_steps={trainer.max_steps} has no step "
                f"for each round; use rounds.count={trainer.max_steps}, or more steps"
            )
        return
    total = rounds.count * rounds.steps
    if trainer.max_steps not in (None, total):
        yield (
            f"trainer.max_steps={trainer.max_steps}: rounds.count={rounds.count} x "
            f"rounds.steps={rounds.steps} are {total} steps; leave trainer.max_steps out"
        )
    if trainer.max_epochs is not None:
        yield (
            f"trainer.max_epochs={trainer.max_epochs}: rounds.count={rounds.count} x "
            f"rounds.steps={rounds.steps} say how long the run is; leave trainer.max_epochs out"
        )


def _reference(config: Config) -> Iterator[str]:
    """Faults of a reference that changes with the rounds."""
    if config.rounds.reference != "previous":
        return
    if config.reference.kind == "live":
        yield (
            "rounds.reference=previous: its log-probabilities are computed by the policy itself as "
            "a round begins, and reference=live holds another copy; use reference=auto"
        )
    elif config.reference.kind == "none" or not objective_settings(config.loss).uses_reference:
        yield (
            f"rounds.reference=previous: loss={config.loss.name} with "
            f"reference={config.reference.kind} uses no reference; leave it out"
        )


def _others(config: Config) -> Iterator[str]:
    """Faults beside other sections."""
    key = f"rounds.count={config.rounds.count}"
    if config.strategy.name == "fsdp":
        yield (
            f"{key}: strategy=fsdp shares the weights out, and answers are drawn of whole ones; "
            "use strategy=ddp, with peft=lora where the model is large"
        )
    if "://" in config.generation.backend:
        yield (
            f"{key}: generation.backend={config.generation.backend} answers with weights that it "
            "has loaded; a round needs a backend that takes those of the training, hf or vllm"
        )
    if config.data.overfit_groups is not None:
        yield (
            f"{key}: data.overfit_groups={config.data.overfit_groups} trains on a few given rows "
            "over and over; leave one of the two out"
        )
    if config.data.controlled.population and config.data.train is None:
        yield (
            f"{key}: data.controlled.population=true weighs the given pairs, and drawn answers are "
            "labelled; leave one of the two out"
        )
    if config.reference.sync_every is not None:
        yield (
            f"{key}: reference.sync_every={config.reference.sync_every} moves the reference by "
            "steps, and rounds by rounds.reference=previous; leave one of the two out"
        )
    unpaired = objective_settings(config.loss).unpaired
    if unpaired:
        yield (
            f"{key}: loss={','.join(unpaired)} learns from labels of single responses, and rounds "
            "rank several; use loss=sigmoid"
        )
    if config.sweep.prune != "none":
        yield (
            f"{key}: sweep.prune={config.sweep.prune} compares trials on the way, which rounds "
            "have not been tried with; use sweep.prune=none"
        )
