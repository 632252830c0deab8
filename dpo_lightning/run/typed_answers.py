"""Typed answers of the commands that look at trained policies, for those who call from Python.

Fields are the entries of what the commands print with ``--json``. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EvaluationSlice:
    """Metrics of some of the held-out rows.

    Attributes:
        by: The property that they share: ``prompt_tokens``, ``response_tokens`` or a column.
        value: Its value.
        groups: Number of rows.
        prompts: Number of different prompts.
        metrics: By their names as in ``metrics.jsonl``.
        intervals: Bounds of 95% by metric; None where there are too few rows.
    """

    by: str
    value: str
    groups: int
    prompts: int
    metrics: Mapping[str, float | None]
    intervals: Mapping[str, Sequence[float] | None]


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Measurements of a trained policy on held-out rows, as ``evaluate --json`` prints them.

    Attributes:
        run: The policy as it was named.
        metrics: By their names as in ``metrics.jsonl``; None for one that is not finite.
        intervals: Bounds of 95% by metric; None where there are too few rows.
        groups: Number of held-out rows.
        prompts: Number of different prompts.
        beta: Beta of the rewards; None where nobody knows it.
        device: Device and precision that it was computed in.
        kl: How the KL of drawn answers is to be read; None where none were drawn.
        notes: What a reader of the numbers needs to know, a sentence each.
        slices: Metrics by length, and by the columns that were asked for.
        samples: Answers that were drawn, a row each.
    """

    run: str
    metrics: Mapping[str, float | None]
    intervals: Mapping[str, Sequence[float] | None]
    groups: int
    prompts: int
    beta: float | None
    device: str
    kl: Mapping[str, Any] | None
    notes: Sequence[str]
    slices: Sequence[EvaluationSlice]
    samples: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> EvaluationResult:
        """The result of the object that the command prints."""
        return cls(**{**found, "slices": tuple(EvaluationSlice(**own) for own in found["slices"])})


@dataclass(frozen=True, slots=True)
class MetricDifference:
    """A metric of two policies on the same held-out rows.

    Attributes:
        metric: Its name as in ``metrics.jsonl``.
        a: Label of the first policy.
        b: Label of the second.
        value_a: Mean of the first.
        value_b: Mean of the second.
        difference: ``value_b`` less ``value_a``.
        interval: Bounds of 95%, from a bootstrap over prompts.
        p: Two-sided, by sign flips; with more than two policies corrected for that (Holm).
        p_alone: The same before the correction.
        items: Rows, or answers, that both have.
        prompts: Different prompts of these.
        better: ``higher``, ``lower``, or None where neither is.
    """

    metric: str
    a: str
    b: str
    value_a: float
    value_b: float
    difference: float
    interval: Sequence[float]
    p: float
    p_alone: float
    items: int
    prompts: int
    better: str | None


@dataclass(frozen=True, slots=True)
class ComparedPolicy:
    """A policy that was compared.

    Attributes:
        label: Its short name in the differences.
        name: Its name as it was given.
        beta: Beta that it was trained at; None where nobody knows it.
        loss: Loss that it was trained with; None where nobody knows it.
        rows: Held-out rows that it was measured on.
    """

    label: str
    name: str
    beta: float | None
    loss: str | None
    rows: int


@dataclass(frozen=True, slots=True)
class ComparisonResult:
    """Tests of trained policies against each other, as ``compare --json`` prints them.

    Attributes:
        differences: One for each metric and pair of policies.
        runs: The policies.
        notes: What a reader of the numbers needs to know, a sentence each.
    """

    differences: Sequence[MetricDifference]
    runs: Sequence[ComparedPolicy]
    notes: Sequence[str]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> ComparisonResult:
        """The result of the object that the command prints."""
        made = {
            "differences": tuple(MetricDifference(**own) for own in found["differences"]),
            "runs": tuple(ComparedPolicy(**own) for own in found["runs"]),
        }
        return cls(**{**found, **made})


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """A point on the frontier of one policy.

    Attributes:
        lam: Its place, ``lambda`` in JSON: 0 is the reference, 1 the policy.
        method: ``weights``, or ``decoded`` where answers were drawn at this very place.
        beta: Beta that it stands for; None at the reference, and where a loss has none.
        reward: Mean reward of answers, or mark of the judge; None without one, or where the
            estimate is not to be relied upon.
        reward_interval: Bounds of 95%, of prompts like these.
        reward_interval_within: The same, of these prompts alone.
        kl: Mean KL to the reference, in nats an answer.
        kl_interval: As that of the reward.
        kl_interval_within: As that of the reward.
        ess: Answers to a prompt that the estimate is worth.
        pareto_k: Shape of the tail of the weights; None where there are none.
        gain_ratio: Exact gain over that of the closed form at the same KL; on the embedded task.
        samples: Some of the answers, ``prompt`` and ``response``.
        why: Reason why it is not shown; None for points that are.
    """

    lam: float
    method: str
    beta: float | None = None
    reward: float | None = None
    reward_interval: Sequence[float | None] | None = None
    reward_interval_within: Sequence[float | None] | None = None
    kl: float | None = None
    kl_interval: Sequence[float | None] | None = None
    kl_interval_within: Sequence[float | None] | None = None
    ess: float | None = None
    pareto_k: float | None = None
    gain_ratio: float | None = None
    samples: Sequence[Mapping[str, str]] = ()
    why: str | None = None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> FrontierPoint:
        """The point of an entry of ``points``, whose ``lambda`` is a word of Python's."""
        return cls(lam=found["lambda"], **{k: v for k, v in found.items() if k != "lambda"})


@dataclass(frozen=True, slots=True)
class InterpolationResult:
    """The frontier of one policy, as ``interpolate --json`` prints it.

    Attributes:
        axis: ``beta``, or ``lambda`` for a loss whose optimum has no beta.
        loss: Loss that the policy was trained with.
        beta: Beta that it was trained at; None where nobody knows it.
        points: In the order of their places.
        not_shown: Points whose estimate is not to be relied upon, each with the reason.
        notes: What a reader of the numbers needs to know, a sentence each.
        drawn: Facts about the answers that were drawn.
    """

    axis: str
    loss: str
    beta: float | None
    points: Sequence[FrontierPoint]
    not_shown: Sequence[FrontierPoint]
    notes: Sequence[str]
    drawn: Mapping[str, Any]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> InterpolationResult:
        """The result of the object that the command prints."""
        made = {key: tuple(map(FrontierPoint.of, found[key])) for key in ("points", "not_shown")}
        return cls(**{**found, **made})
