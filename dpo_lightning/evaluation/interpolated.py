"""Answers of policies between a reference and a trained policy, drawn token by token.

At each token the two models' logits are mixed: reference + lam (policy - reference). That is the
interpolated policy of each next token; of whole answers it is close to it, but not the same, as
each token is normalised by itself. What such an answer's probability is, is known exactly.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_lightning.data.tokens import Ids
from dpo_lightning.evaluation.sampling import (
    Precision,
    answer_batches,
    end_ids,
    left_padded,
    next_token_logps,
    token_divergences,
)
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.processes.phases import ShowPhase, unshown


def mixed_logps(reference: Tensor, policy: Tensor, lam: float) -> Tensor:
    """Next-token log-probabilities of the mixed logits, (..., V).

    Args:
        reference: (..., V), floating. The reference's; a token that it never says is not said.
        policy: (..., V). The policy's.
        lam: At least 0. 0 is the reference, 1 the policy.
    """
    if lam == 0:  # 0 times -inf would be nan
        return reference
    mixed = torch.where(reference == -torch.inf, reference, reference + lam * (policy - reference))
    return mixed.log_softmax(-1)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two models that are mixed.

    Attributes:
        policy: A transformers causal language model.
        reference: Another one of the same vocabulary, or a view of the policy without its adapter.
        scorer: The scorer that prepared them.
    """

    policy: Any
    reference: Any
    scorer: Scorer

    @contextlib.contextmanager
    def plain(self) -> Any:
        """Both as transformers made them, in eval mode."""
        with self.scorer.plain(self.policy), self.scorer.plain(self.reference):
            yield

    def mixed(self, lam: float) -> Any:
        """A model of mixed logits, for `ControlledTask.outcome_logps`, inside of `plain`."""
        return _Mixed(self, lam)


class _Mixed:
    """A model that gives mixed logits.

    Args:
        pair: The two models.
        lam: How they are mixed.
    """

    def __init__(self, pair: Pair, lam: float) -> None:
        self._pair = pair
        self._lam = lam

    def parameters(self) -> Any:
        """Those of the policy, which say where it computes."""
        return self._pair.policy.parameters()

    def __call__(self, *, input_ids: Tensor) -> SimpleNamespace:
        """A forward pass of both."""
        p, q = (
            model(input_ids=input_ids).logits.double().log_softmax(-1)
            for model in (self._pair.policy, self._pair.reference)
        )
        return SimpleNamespace(logits=mixed_logps(q, p, self._lam))


class Stream:
    """A model that is given a batch's tokens as they come.

    Args:
        model: A transformers causal language model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        parameters = inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._past: Any = None

    def next_logps(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities of the next token, (B, V), float32.

        Args:
            ids: All tokens so far, (B, T).
            mask: Which of them are used.
        """
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if self._past is not None:  # what came before is known
            ids, positions = ids[:, -1:], positions[:, -1:]
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._past,
            use_cache=True,
            **self._last,
        )
        # A family without one is given everything anew.
        self._past = getattr(output, "past_key_values", None)
        logps: Tensor = output.logits[:, -1].float().log_softmax(-1)
        return logps


@torch.no_grad()
def draw_mixed(
    pair: Pair,
    tokenizer: Any,
    prompts: Sequence[Ids],
    lam: float,
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    precision: Precision = contextlib.nullcontext,
    show: ShowPhase = unshown,
) -> list[Ids]:
    """Draws an answer to each prompt from the mixed logits, at temperature 1, nothing cut off.

    Args:
        pair: The two models.
        tokenizer: Their tokenizer.
        prompts: Token ids of each prompt, shapes (P,).
        lam: How they are mixed.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts that are answered at once.
        seed: Of all draws.
        precision: The context to compute in.
        show: Shows how far it is.

    Returns:
        Token ids of each answer, shapes (R,), with the token that ended it, if one did.
    """
    device = pair.policy.device
    ends = torch.tensor(end_ids(pair.policy, tokenizer), device=device)
    generator = torch.Generator(device).manual_seed(seed)
    answers: list[Ids] = [np.zeros(0, dtype=np.int32)] * len(prompts)
    # Prompts of like lengths together: little padding.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    shown = show("sampling", total=len(order), unit="answers")
    with pair.plain(), precision(), shown as say:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            ids, mask = left_padded([prompts[i] for i in part], tokenizer.eos_token_id)
            begun = ids.shape[1]
            ids, mask = ids.to(device), mask.to(device)
            policy, reference = Stream(pair.policy), Stream(pair.reference)
            ended = torch.zeros(len(part), dtype=torch.bool, device=device)
            for _ in range(max_new_tokens):
                p, q = (stream.next_logps(ids, mask) for stream in (policy, reference))
                drawn = torch.multinomial(mixed_logps(q, p, lam).exp(), 1, generator=generator)
                ids = torch.cat([ids, drawn], dim=1)
                mask = torch.cat([mask, torch.ones_like(drawn)], dim=1)
                ended |= torch.isin(drawn.squeeze(1), ends)
                if ended.all():
                    break
            for i, row in zip(part, ids[:, begun:].cpu().numpy(), strict=True):
                at = np.isin(row, ends.cpu().numpy()).nonzero()[0]
                answers[i] = row[: at[0] + 1 if len(at) else len(row)].astype(np.int32)
            say(start + len(part))
    return answers


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """Scores of answers under every mixture.

    Attributes:
        logps: (n, mixtures), float64. Log-probability of each answer.
        kl: (n,), float64. An unbiased estimate of the KL of each answer's own mixture from the
            reference: at each token the divergence is taken exactly, as `sampled_divergences` does.
    """

    logps: Tensor
    kl: Tensor


@torch.no_grad()
def score_mixed(
    pair: Pair,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    *,
    own: Sequence[int],
    lambdas: Sequence[float],
    pad: int,
    precision: Precision = contextlib.nullcontext,
) -> AnswerScores:
    """Log-probability of each answer under each mixture.

    Args:
        pair: The two models.
        prompts: Token ids of each prompt, shapes (P,).
        answers: Token ids of each answer, shapes (R,), R >= 1.
        own: The mixture that drew each.
        lambdas: The mixtures.
        pad: Any token id, to stand where nothing is.
        precision: The context to compute in.
    """
    logps = torch.zeros(len(answers), len(lambdas), dtype=torch.float64)
    kl = torch.zeros(len(answers), dtype=torch.float64)
    drew = torch.tensor(own)
    vocabulary = pair.policy.get_output_embeddings().weight.shape[0]
    with pair.plain(), precision():
        for batch in answer_batches(prompts, answers, vocabulary=vocabulary, pad=pad):
            device = pair.policy.device
            ids, mask, used = (x.to(device) for x in (batch.ids, batch.mask, batch.used))
            targets = batch.targets.to(device).unsqueeze(-1)
            p = next_token_logps(pair.policy, ids, mask, batch.longest)
            q = next_token_logps(pair.reference, ids, mask, batch.longest)
            numbers = torch.tensor(batch.numbers)
            for place, lam in enumerate(lambdas):
                mixed = mixed_logps(q, p, lam)
                tokens = mixed.gather(2, targets).squeeze(2).double() * used
                logps[numbers, place] = tokens.sum(1).cpu()
                mine = drew[numbers] == place
                if mine.any():
                    here = mine.to(device)
                    apart = token_divergences(mixed[here], q[here]).double() * used[here]
                    kl[numbers[mine]] = apart.sum(1).cpu()
    return AnswerScores(logps, kl)
