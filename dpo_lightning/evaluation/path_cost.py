"""Cost of a scaled LoRA adapter in the place of the path between reference and policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.data.tokens import Ids
from dpo_lightning.evaluation.interpolated import Pair, mixed_logps
from dpo_lightning.evaluation.sampling import (
    Precision,
    answer_batches,
    next_token_logps,
    token_divergences,
)

# Names of the matrices that a LoRA update is linear in.
_LINEAR = ("lora_B", "lora_embedding_B")


@dataclass(frozen=True, slots=True)
class PathDivergences:
    """Divergences of a place on the path, from answers that it drew itself.

    Attributes:
        scaled: (n,), float64. KL from the place to the scaled adapter, in nats of an answer.
        reference: (n,), float64. KL from the place to the reference, the same.
    """

    scaled: Tensor
    reference: Tensor


def is_linear(name: str) -> bool:
    """True for a tensor of an adapter that its update is a multiple of."""
    return any(part in _LINEAR for part in name.split("."))


@contextlib.contextmanager
def scaled_update(model: Any, factor: float) -> Iterator[None]:
    """Context in which a model's LoRA update counts so many times.

    Args:
        model: A model with one LoRA adapter.
        factor: 0 is the base model, 1 the model as it is.
    """
    before = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if is_linear(name)
    }
    parameters = dict(model.named_parameters())
    try:
        with torch.no_grad():
            for name in before:
                parameters[name].mul_(factor)
        yield
    finally:
        with torch.no_grad():
            for name, own in before.items():
                parameters[name].copy_(own)


@torch.no_grad()
def path_divergences(
    pair: Pair,
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    *,
    lam: float,
    pad: int,
    precision: Precision = contextlib.nullcontext,
    scaled: Callable[[Any, float], contextlib.AbstractContextManager[None]] = scaled_update,
) -> PathDivergences:
    """KL from a place on the path to the scaled adapter, and to the reference.

    At each token of an answer the divergence of the next-token distributions is taken exactly; the
    sum is an unbiased estimate of the KL of whole answers, as the answers are the place's own.

    Args:
        pair: The policy with its adapter, and its base model as the reference.
        prompts: Token ids of each prompt, shapes (P,).
        answers: Token ids of the answer of the place to each, shapes (R,), R >= 1.
        lam: The place.
        pad: Any token id, to stand where nothing is.
        precision: The context to compute in.
        scaled: Context in which the policy's update counts so many times.
    """
    found = torch.zeros(2, len(answers), dtype=torch.float64)
    vocabulary = pair.policy.get_output_embeddings().weight.shape[0]
    with pair.plain(), precision():
        for batch in answer_batches(prompts, answers, vocabulary=vocabulary, pad=pad):
            device = pair.policy.device
            ids, mask, used = (x.to(device) for x in (batch.ids, batch.mask, batch.used))
            policy = next_token_logps(pair.policy, ids, mask, batch.longest)
            reference = next_token_logps(pair.reference, ids, mask, batch.longest)
            with scaled(pair.policy, lam):
                other = next_token_logps(pair.policy, ids, mask, batch.longest)
            place = mixed_logps(reference, policy, lam)
            for row, against in enumerate((other, reference)):
                apart = token_divergences(place, against).double() * used
                found[row, torch.tensor(batch.numbers)] = apart.sum(1).cpu()
    return PathDivergences(found[0], found[1])
