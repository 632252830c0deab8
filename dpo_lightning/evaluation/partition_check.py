"""A cheap check of any trained run: the policy's own partition function is 1.

For the implicit reward r = beta * log(pi / pi_ref) the partition function of every prompt is
Z(x) = E_ref[exp(r / beta)] = sum_y pi(y|x) = 1, whatever was trained. So is that of the first m
tokens of the responses. An estimate far from it, from a sample that can tell, means that the
log-probabilities that were trained on are not those of the models.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.data.packing import collate_groups
from dpo_lightning.data.tokens import Ids, TokenGroup
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.objectives.partition import estimate_log_partition

log = logging.getLogger(__name__)

LONGEST = 16
"""Tokens of an answer that are looked at: weights of whole long answers are all but one 0."""

# The longest beginning is taken of which such a share of the sample counts, and where there is
# none the first token. Below the second share an estimate says nothing.
_HEALTHY = 0.5
_LEAST = 0.1
# Standard errors, and nats that rounding explains, beyond which something is wrong.
_ERRORS = 5.0
_ROUNDING = 0.05


@torch.no_grad()
def check_partition(
    policy: Any,
    reference: Any,
    scorer: Scorer,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    *,
    precision: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> dict[str, float]:
    """Estimates log Z of the implicit reward, which is 0, the way the training scores responses.

    Z is averaged over the prompts. Of all beginnings of the answers the longest is taken of which
    half of the sample counts.

    Args:
        policy: The trained model, prepared by ``scorer``.
        reference: The model that drew the answers, prepared by ``scorer``.
        scorer: Scores both.
        prompts: Token ids of each prompt, shapes (P,).
        answers: The first tokens of an answer to each, drawn from the reference at temperature 1,
            with the token that ended it, if one did; shapes (R,), R >= 1.
        precision: The context to compute in.

    Returns:
        ``partition/self_check``, the estimate in nats, its standard error ``_stderr``, the share of
        the sample that counts ``_ess``, and the tokens that were looked at ``_tokens``.
    """
    longest = max(map(len, answers))
    logratios = torch.cat(
        [
            _logratios(policy, reference, scorer, prompt, answer, precision, longest)
            for prompt, answer in zip(_batches(prompts), _batches(answers), strict=True)
        ]
    )
    beginnings = logratios.double().cumsum(1)
    found = []
    for m in range(beginnings.shape[1]):
        estimate = estimate_log_partition(beginnings[:, m], 1.0)
        found.append((*(float(part) for part in estimate), m + 1))
    healthy = [entry for entry in found if entry[2] >= _HEALTHY * len(answers)]
    value, error, size, tokens = healthy[-1] if healthy else found[0]
    if size >= _LEAST * len(answers) and abs(value) > _ERRORS * error + _ROUNDING:
        log.warning(
            "the policy's probabilities over the reference's average exp(%.2f) and not 1 (standard "
            "error %.2f, the first %d tokens of %d answers): the log-probabilities that were "
            "trained on are not those of the models",
            value,
            error,
            tokens,
            len(answers),
        )
    return {
        "partition/self_check": value,
        "partition/self_check_stderr": error,
        "partition/self_check_ess": size / len(answers),
        "partition/self_check_tokens": float(tokens),
    }


_BATCH = 256


def _batches(sequences: Sequence[Ids]) -> list[Sequence[Ids]]:
    return [sequences[i : i + _BATCH] for i in range(0, len(sequences), _BATCH)]


def _logratios(
    policy: Any,
    reference: Any,
    scorer: Scorer,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    precision: Callable[[], contextlib.AbstractContextManager[Any]],
    longest: int,
) -> Tensor:
    """Log-ratio of each token of each answer, 0 behind its end; (n, longest) on the CPU."""
    groups = [
        TokenGroup(prompt, (answer,), (1,), 1.0, "reference sample", "")
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    batch = collate_groups(groups, range(len(groups))).to(next(policy.parameters()).device)
    with precision():
        plan = scorer.plan(batch)
        ratios = scorer.token_logps(policy, batch, plan) - scorer.token_logps(
            reference, batch, plan
        )
    rows = torch.zeros(len(groups), longest)
    for row, part in enumerate(ratios.float().cpu().split(batch.lengths.tolist())):
        rows[row, : len(part)] = part
    return rows
