"""The outcome of a round's drawing: a hash of who drew, metrics, and what is said of it."""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from dpo_lightning.data.marked import WHY_DROPPED, MarkedGroup, MarkedPrompt
from dpo_lightning.data.rounds import RoundPlan
from dpo_lightning.errors import UserError

log = logging.getLogger(__name__)


@torch.no_grad()
def trained_hash(policy: Any) -> str:
    """A hash of the weights that are trained: names, shapes, types and bytes; 32 hex digits.

    Args:
        policy: A transformers causal language model, with or without adapters.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in policy.named_parameters():
        if weight.requires_grad:
            data = weight.detach().cpu().contiguous()
            digest.update(f"{name}{tuple(data.shape)}{data.dtype}".encode())
            digest.update(data.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def round_metrics(
    round: int,
    marked: Sequence[MarkedPrompt],
    groups: Sequence[MarkedGroup],
    *,
    gives_marks: bool = True,
) -> dict[str, float]:
    """Metrics of a round: of the policy that drew its answers.

    Args:
        round: Its number, from 1.
        marked: Its prompts with their answers and marks.
        groups: Its groups.
        gives_marks: False of a judge that compares, whose verdicts have the same mean always.
    """
    marks = [mark for own in marked for mark in own.marks if mark is not None]
    lengths = [len(ids) for own in marked for ids in own.answers]
    found = {
        "rounds/round": float(round),
        "rounds/prompts": float(len(marked)),
        "rounds/groups": float(len(groups)),
        "rounds/length": statistics.fmean(lengths),
    }
    if marks and gives_marks:
        found["rounds/mark"] = statistics.fmean(marks)
        found["rounds/mark_spread"] = statistics.pstdev(marks)
    return found


def say_round(
    round: int,
    asked: Sequence[Any],
    groups: Sequence[MarkedGroup],
    dropped: dict[str, int],
    *,
    plan: RoundPlan,
) -> None:
    """Says what a round came to, and what its steps have of it.

    Raises:
        UserError: If nothing is left of the first one; what makes none later, as where all answers
            to a few prompts are as good, moves nothing.
    """
    lost = ", ".join(f"{count} {WHY_DROPPED[name]}" for name, count in dropped.items())
    if not groups and round > 1:
        log.warning(
            "round %d: the answers to %d prompts made no group (%s), so that its steps move "
            "nothing by them; a higher rounds.temperature or more rounds.prompts make some",
            *(round, len(asked), lost),
        )
        return
    if not groups:
        raise UserError(
            f"round {round}: the answers to {len(asked)} prompts made no group ({lost}); a higher "
            "rounds.temperature, more rounds.prompts or a lower rounds.min_margin make some"
        )
    text = f"{len(groups)} groups of the answers to {len(asked)} prompts"
    text += f"; dropped: {lost}" if lost else ""
    used = plan.used(round, drawn=len(groups), prompts=len(asked))
    if used < plan.wanted(round):
        room = plan.wanted(round) / plan.steps
        text += f"; a step has about {used / plan.steps:.3g} of them, and room for {room:.3g}"
    if used > len(groups):
        text += f"; each is seen about {used / len(groups):.3g} times"
    log.info("round %d: %s", round, text)
