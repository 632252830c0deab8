"""Stand-ins for the attention kernel for any lengths, which runs on CUDA alone.

The strict one has torch's signature and refuses what flash attention refuses. On ``meta`` it then
is torch's own, of which the shapes are known there; elsewhere it is plain attention.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import varlen

REAL = varlen.varlen_attn
HALF = (torch.float16, torch.bfloat16)


class FlashError(RuntimeError):
    """An error of flash attention about a call."""


def strict_varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """The kernel with flash's own checks."""
    check_call(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size)
    if query.device.type == "meta":
        output = REAL(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
            return_aux=return_aux, scale=scale, window_size=window_size, enable_gqa=enable_gqa,
            seqused_k=seqused_k, block_table=block_table, num_splits=num_splits,
        )  # fmt: skip
    else:
        options = {"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa}
        output = plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)
    return output


def check_call(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size) -> None:
    """Refuses what flash attention's ``varlen`` entry refuses.

    Raises:
        FlashError: With its reason.
    """
    inputs = {"query": query, "key": key, "value": value}
    if query.dtype not in HALF:
        raise FlashError(f"only fp16 and bf16 are supported, not {query.dtype}")
    for name, tensor in inputs.items():
        if tensor.ndim != 3:
            raise FlashError(f"{name} has {tensor.ndim} dimensions, not 3")
        if tensor.dtype != query.dtype:
            raise FlashError(f"query is {query.dtype} and {name} {tensor.dtype}")
        if tensor.device != query.device:
            raise FlashError(f"{name} is on {tensor.device}")
        if tensor.stride(-1) != 1:
            raise FlashError(f"{name} must have a contiguous last dimension")
    _, heads, size = query.shape
    if key.shape != value.shape or key.shape[-1] != size:
        raise FlashError(f"heads differ: {[tuple(t.shape) for t in inputs.values()]}")
    if size > 256:
        raise FlashError(f"heads of {size} entries: at most 256")
    if size % 8:
        raise FlashError(f"heads of {size} entries: a multiple of 8")
    if heads % key.shape[1]:
        raise FlashError(f"{heads} heads, {key.shape[1]} of keys")
    for name, ends in (("cu_seq_q", cu_seq_q), ("cu_seq_k", cu_seq_k)):
        if not isinstance(ends, Tensor) or ends.dtype != torch.int32 or ends.ndim != 1:
            raise FlashError(f"{name} must be one dimension of int32")
        if ends.device != query.device or not ends.is_contiguous():
            raise FlashError(f"{name} must be contiguous, and on {query.device}")
    if cu_seq_q.shape != cu_seq_k.shape or len(cu_seq_q) < 2:
        raise FlashError("cu_seq_q and cu_seq_k name other numbers of sequences")
    for name, most in (("max_q", max_q), ("max_k", max_k)):
        if type(most) is not int or most < 1:
            raise FlashError(f"{name} must be an int, not {most!r}")
    if len(window_size) != 2 or not all(type(side) is int for side in window_size):
        raise FlashError(f"window_size={window_size}")


def plain_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
):
    """Plain attention, sequence by sequence; causal from the last key backwards, as documented."""
    left, right = window_size
    assert right == 0
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]].transpose(0, 1)
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]].transpose(0, 1) for x in (key, value))
        assert q.shape[1] <= max_q
        assert k.shape[1] <= max_k
        # The last query stands at the last key.
        places = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        distance = places - torch.arange(k.shape[1])
        mask = (distance >= 0) & ((distance <= left) | (left < 0))
        outputs.append(
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=enable_gqa
            )[0].transpose(0, 1)
        )
    assert sum(len(output) for output in outputs) == len(query)
    assert cu_seq_k[-1] == len(key)
    return torch.cat(outputs)
