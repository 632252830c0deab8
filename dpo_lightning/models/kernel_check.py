"""A try of the kernel for any lengths on a device, against plain attention in float32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dpo_lightning.data.packing import collate_groups
from dpo_lightning.data.tokens import Ids, TokenGroup
from dpo_lightning.models.attention import AttentionPlan, group_attention
from dpo_lightning.models.kernel import HeadShape, Kernel

# Relative difference of values and gradients that half precision explains.
_TOLERANCE = 2e-2


def varlen_fault(device: torch.device, dtype: torch.dtype, shape: HeadShape) -> str | None:
    """Tries the kernel for any lengths against plain attention in float32.

    Args:
        device: Device that it will run on.
        dtype: Type of the queries.
        shape: Heads, as a layer of the model came with them.

    Returns:
        Why it cannot be used; None if values and gradients are right, with and without a window.
    """
    batch = collate_groups(
        [_probe_group(*lengths) for lengths in ((70, 9, 33), (5, 1, 2, 80))], [0, 1]
    )
    batch = batch.to(device)
    draw = torch.Generator().manual_seed(0)
    tokens = len(batch.input_ids)
    shapes = [(1, n, tokens, shape.size) for n in (shape.heads, *(shape.key_heads,) * 2)]
    inputs = [torch.randn(size, generator=draw).to(device, dtype) for size in shapes]
    weights = torch.randn(1, tokens, shape.heads, shape.size, generator=draw).to(device)
    kernel = Kernel({shape: None})
    try:
        for window in (None, 7):
            found = [
                _with_gradients(
                    inputs, weights, AttentionPlan(batch, kernel=kernel), window, dtype
                ),
                _with_gradients(inputs, weights, AttentionPlan(batch), window, torch.float32),
            ]
            for one, other in zip(*found, strict=True):
                difference = ((one.float() - other).norm() / other.norm()).item()
                if not difference <= _TOLERANCE:
                    return f"it differs from plain attention by {difference:.2g}"
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        return f"trying it failed ({' '.join(str(error).split())[:120]})"
    return None


def _with_gradients(
    inputs: list[Tensor],
    weights: Tensor,
    plan: AttentionPlan,
    window: int | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    own = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    query, key, value = own
    output, _ = group_attention(
        torch.nn.Identity(), query, key, value, None, sliding_window=window, group_plan=plan
    )
    return [output.detach(), *torch.autograd.grad((output.float() * weights).sum(), own)]


def _probe_group(prompt: int, *responses: int) -> TokenGroup:
    def ids(length: int) -> Ids:
        return np.zeros(length, dtype=np.int32)

    ranks = tuple(range(1, len(responses) + 1))
    return TokenGroup(ids(prompt), tuple(map(ids, responses)), ranks, 1.0, "probe", "probe")
