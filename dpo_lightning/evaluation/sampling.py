"""Answers drawn from a model, and how far the policy is from the reference on its own answers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from dpo_lightning.data.greedy import pack
from dpo_lightning.data.tokens import Ids
from dpo_lightning.errors import UserError
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import is_sharded, of_first_rank
from dpo_lightning.processes.phases import ShowPhase, unshown

Precision = Callable[[], contextlib.AbstractContextManager[Any]]

# Most vocabulary scores of one forward pass.
_PASS_SCORES = 1 << 27


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those the model was made with."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(ends)


@torch.no_grad()
def answer_prompts(
    model: Any,
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int | None,
    precision: Precision = contextlib.nullcontext,
    show: ShowPhase = unshown,
) -> list[Ids]:
    """Answers prompts, many at once.

    Args:
        model: A transformers causal language model.
        scorer: The scorer that prepared it.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt, shapes (P,).
        max_new_tokens: Longest answer, in tokens.
        batch_size: Prompts that are answered at once.
        seed: Of answers drawn from the model's own distribution, at temperature 1 and with nothing
            cut off; None decodes greedily.
        precision: The context to compute in.
        show: Shows how far it is.

    Returns:
        Token ids of each answer, shapes (R,), with the token that ended it, if one did.
    """
    ends = end_ids(model, tokenizer)
    # Behind the attention mask any id will do; a model without a pad token has this one.
    pad = tokenizer.eos_token_id
    settings = _generation(tokenizer, ends, max_new_tokens=max_new_tokens, drawn=seed is not None)
    answers: list[Ids] = [np.zeros(0, dtype=np.int32)] * len(prompts)
    # Prompts of like lengths together: little padding.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    devices = [model.device] if model.device.type == "cuda" else []
    shown = show("sampling", total=len(order), unit="answers")
    with scorer.plain(model), torch.random.fork_rng(devices=devices), precision(), shown as say:
        if seed is not None:
            torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            ids, mask = left_padded([prompts[i] for i in part], pad)
            output = _written(
                model,
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
                synced_gpus=is_sharded(model),
            )
            if is_sharded(model):
                # They asked the same of the same weights; what follows must be the same to the bit.
                output = of_first_rank(output)
            for i, row in zip(part, output[:, ids.shape[1] :].cpu().numpy(), strict=True):
                ended = np.isin(row, ends).nonzero()[0]
                length = ended[0] + 1 if len(ended) else len(row)
                answers[i] = row[:length].astype(np.int32)
            say(start + len(part))
    return answers


def _written(model: Any, **arguments: Any) -> Tensor:
    """The answers of ``generate``, which some families have no way to.

    Raises:
        UserError: If this one has none.
    """
    try:
        output: Tensor = model.generate(**arguments)
    except (ValueError, TypeError, AttributeError, NotImplementedError, LookupError) as error:
        text = " ".join(str(error).split())[:150]
        raise UserError(
            f"evaluation.samples: this {model.config.model_type} model cannot write answers "
            f"({type(error).__name__}: {text}); train without them, evaluation.samples=0 "
            "evaluation.partition_samples=0"
        ) from error
    return output


def _generation(
    tokenizer: Any, ends: list[int], *, max_new_tokens: int, drawn: bool
) -> GenerationConfig:
    """Everything is said: a hub model's own settings would sharpen or cut its distribution."""
    return GenerationConfig(
        do_sample=drawn,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if drawn else {}),
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def left_padded(sequences: Sequence[Ids], pad: int) -> tuple[Tensor, Tensor]:
    """Sequences that end together, and which of their places are used; (B, P) int64 each."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.as_tensor(sequence, dtype=torch.int64)
        mask[row, width - len(sequence) :] = 1
    return ids, mask


@torch.no_grad()
def sampled_divergences(
    policy: Any,
    reference: Any,
    scorer: Scorer,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    *,
    pad: int,
    precision: Precision = contextlib.nullcontext,
) -> list[float]:
    """An unbiased estimate of KL(policy || reference) from each answer that the policy drew.

    At every token of the answer the divergence of the two next-token distributions is taken
    exactly, over the whole vocabulary, and summed up. Its expectation over the policy's answers is
    the divergence of the distributions of answers (of at most so many tokens), and it varies less
    than log pi(y) - log pi_ref(y) (the Rao-Blackwellised estimator of Amini et al., 2504.10637).

    Args:
        policy: The model that drew the answers.
        reference: The model to compare with; same vocabulary.
        scorer: The scorer that prepared both.
        prompts: Token ids of each prompt, shapes (P,).
        answers: Token ids of each answer, shapes (R,), R >= 1.
        pad: Any token id, to stand where nothing is.
        precision: The context to compute in.

    Returns:
        Nats, one number for each answer, none below 0 but by rounding.
    """
    values = [0.0] * len(answers)
    vocabulary = policy.get_output_embeddings().weight.shape[0]
    with scorer.plain(policy), scorer.plain(reference), precision():
        for batch in answer_batches(prompts, answers, vocabulary=vocabulary, pad=pad):
            ids, mask = batch.ids.to(policy.device), batch.mask.to(policy.device)
            p = next_token_logps(policy, ids, mask, batch.longest)
            q = next_token_logps(reference, ids, mask, batch.longest)
            divergence = token_divergences(p, q) * batch.used.to(p.device)
            for i, value in zip(batch.numbers, divergence.sum(1).tolist(), strict=True):
                values[i] = value
    return values


def token_divergences(p: Tensor, q: Tensor) -> Tensor:
    """KL of next-token distributions, of their log-probabilities (..., V) -> (...)."""
    # A token that cannot come adds nothing, also where it cannot in the other one either.
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """Answers behind their prompts, whose ends of prompts stand in one column.

    Attributes:
        numbers: Place of each among all answers.
        ids: Token ids, (B, P + R) int64.
        mask: 1 where they are used, the same.
        targets: The answers alone, (B, R) int64.
        used: 1 where they have a token, the same.
    """

    numbers: list[int]
    ids: Tensor
    mask: Tensor
    targets: Tensor
    used: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return self.targets.shape[1]


def answer_batches(
    prompts: Sequence[Ids], answers: Sequence[Ids], *, vocabulary: int, pad: int
) -> Iterator[AnswerBatch]:
    """Yields all answers in batches of like lengths, as large as their vocabulary scores allow.

    Args:
        prompts: Token ids of each prompt, shapes (P,).
        answers: Token ids of each answer, shapes (R,), R >= 1.
        vocabulary: Scores of a place.
        pad: Any token id, to stand where nothing is.
    """
    order = sorted(range(len(answers)), key=lambda i: -(len(prompts[i]) + len(answers[i])))
    for part in _parts(order, prompts, answers, vocabulary):
        ids, mask = left_padded([prompts[i] for i in part], pad)
        longest = max(len(answers[i]) for i in part)
        tail = torch.full((len(part), longest), pad, dtype=torch.int64)
        used = torch.zeros_like(tail)
        for row, i in enumerate(part):
            tail[row, : len(answers[i])] = torch.as_tensor(answers[i], dtype=torch.int64)
            used[row, : len(answers[i])] = 1
        yield AnswerBatch(
            part, torch.cat([ids, tail], dim=1), torch.cat([mask, used], dim=1), tail, used
        )


def _parts(
    order: Sequence[int], prompts: Sequence[Ids], answers: Sequence[Ids], vocabulary: int
) -> list[list[int]]:
    """Batches of the longest first, as large as the memory for vocabulary scores allows."""

    def width(i: int) -> int:
        return len(prompts[i]) + len(answers[i])

    def join(load: tuple[int, int], i: int) -> tuple[int, int] | None:
        count, widest = load[0] + 1, max(load[1], width(i))
        return (count, widest) if count * widest * vocabulary <= _PASS_SCORES else None

    return pack(order, start=lambda i: (1, width(i)), join=join)


def next_token_logps(model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """Log-probabilities of every token at the last ``count`` places, (B, count, V), float32."""
    arguments: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = count + 1
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        **arguments,
    ).logits
    logps: Tensor = logits[:, -count - 1 : -1].float().log_softmax(-1)
    return logps
