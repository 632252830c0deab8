"""CUDA's autocast on tensors that have no values, where torch's own does not act.

Autocast casts the inputs of an operation by its name: to the half type, to float32, or to the
widest of them. A mode sees each call of torch before autograd does, as autocast does, and casts
by the same lists. It is on where CUDA's autocast is.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class CastLists:
    """Names of what an autocast computes in half, in float32, in the widest of the inputs."""

    half: frozenset[str]
    float32: frozenset[str]
    widest: frozenset[str]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


CUDA = CastLists(
    half=_names(
        """_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d
        conv_transpose3d convolution cudnn_convolution cudnn_convolution_transpose prelu addmm
        addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul
        linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell
        rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention
        scaled_dot_product_attention"""
    ),
    float32=_names(
        """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow
        softplus layer_norm native_layer_norm group_norm rms_norm frobenius_norm nuclear_norm
        cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d
        hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss
        multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss
        binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp prod softmax log_softmax
        cumprod cumsum linalg_vector_norm linalg_matrix_norm sum norm"""
    ),
    widest=_names(
        """addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot
        scatter_add"""
    ),
)

# What Python calls an operation, or calls before it.
ALIASES = {
    "__matmul__": "matmul",
    "__rmatmul__": "matmul",
    "__pow__": "pow",
    "__rpow__": "pow",
    "__rdiv__": "reciprocal",
    "__rtruediv__": "reciprocal",
    "normalize": "norm",
    "cross_entropy": "cross_entropy_loss",
    "multi_dot": "linalg_multi_dot",
    "vecdot": "linalg_vecdot",
}


class EmulatedAutocast(TorchFunctionMode):
    """Casts as autocast does, while CUDA's is on.

    Args:
        lists: Names of operations.
        device: Kind of the tensors that are cast.
    """

    def __init__(self, lists: CastLists = CUDA, device: str = "meta") -> None:
        super().__init__()
        self._lists = lists
        self._device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cuda"):
            if func is F.cross_entropy and "cross_entropy_loss" not in self._lists.float32:
                # Two operations, each of which is cast for itself.
                with self:
                    return _cross_entropy(*args, **kwargs)
            args, kwargs = self._cast(func, args, kwargs)
        return func(*args, **kwargs)

    def _cast(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        name = ALIASES.get(name, name)
        if name in self._lists.half:
            to = torch.get_autocast_dtype("cuda")
        elif name in self._lists.float32:
            to = torch.float32
        elif name in self._lists.widest:
            own = [t.dtype for t in tree_leaves((args, kwargs)) if self._is_eligible(t)]
            to = torch.float32 if torch.float32 in own else torch.get_autocast_dtype("cuda")
        else:
            return args, kwargs
        return tree_map(lambda x: x.to(to) if self._is_eligible(x) else x, (args, kwargs))

    def _is_eligible(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.device.type == self._device
            and value.is_floating_point()
            and value.dtype != torch.float64
        )


def _cross_entropy(scores: Tensor, target: Tensor, **options: Any) -> Tensor:
    return F.nll_loss(F.log_softmax(scores, -1), target, reduction=options["reduction"])


@contextlib.contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """CUDA's autocast switched on, as a step on CUDA has it; it needs no CUDA."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def _maybe_autocast(device_type, dtype=None, enabled=True, cache_enabled=None):
    """Transformers' own, which does nothing on ``meta``: models switch autocast off by it."""
    kind = "cuda" if device_type == "meta" else device_type
    if torch.is_autocast_enabled(kind) and not enabled:
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def heeded_by_models() -> Iterator[None]:
    """Context in which models switch the emulated autocast off where they do on CUDA."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers.") and "maybe_autocast" in vars(module):
                stack.enter_context(mock.patch.object(module, "maybe_autocast", _maybe_autocast))
        yield
