"""A model whose weights are shared out over ranks (FSDP2, https://arxiv.org/abs/2304.11277).

Each layer is gathered while it computes and given up again; what stands outside of the layers,
embeddings and head among it, is gathered once per step. Every forward pass is a meeting of all
ranks, so all have to make the same ones, in the same order.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from dpo_lightning.models.loading import meta_model
from dpo_lightning.models.master_weights import stays_wide

T = TypeVar("T")

# What rank 0 has on its device of a tensor that it hands out.
_PIECE_BYTES = 1 << 28


def is_sharded(model: Any) -> bool:
    """True if a model's weights are shared out, so that all ranks must use it together.

    Args:
        model: A model, or a view of one, which names it as ``viewed``.
    """
    return isinstance(getattr(model, "viewed", model), FSDPModule)


def shard_model(
    model: Any, mesh: DeviceMesh, device: torch.device, *, compute_dtype: torch.dtype | None
) -> Any:
    """Shares a model out; a meeting of all ranks.

    Args:
        model: On rank 0 the whole model, on the CPU; on the others a :func:`meta_model` of it. It
            is consumed: its weights become shards.
        mesh: One dimension, over all ranks.
        device: Device for this rank's shards.
        compute_dtype: Type of the gathered weights; gradients are then reduced in float32. None
            keeps the weights' own type.

    Returns:
        The model.
    """
    whole = _take_weights(model) if mesh.get_rank() == 0 else {}
    model.tie_weights()
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=None if compute_dtype is None else torch.float32
    )
    wide = {
        name
        for name, module in model.named_modules()
        if any(
            stays_wide(model, f"{name}.{own}") for own, _ in module.named_parameters(recurse=False)
        )
    }
    for name, module in model.named_modules():
        if name in wide:
            fully_shard(module, mesh=mesh)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Not given up between forward and backward: the layers around it are in use throughout.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    model.to_empty(device=device)
    # Each of the last two moves gave a shared weight's places tensors of their own.
    model.tie_weights()
    for name, tensor in _own_tensors(model):
        source = whole.pop(name, None)
        _receive(tensor, source, mesh)
    model.compute_dtype = compute_dtype
    model.run_whole = types.MethodType(_run, model)
    register_fsdp_forward_method(model, "run_whole")
    return model


def in_shards(model: Any) -> None:
    """Frees the weights that a forward pass without a backward pass left gathered."""
    if is_sharded(model):
        model.reshard()


def run_whole(model: Any, function: Callable[..., T], *args: Any) -> T:
    """Calls ``function(model, *args)`` with the weights outside of the layers gathered.

    Args:
        model: A model, sharded or not.
        function: Gives a tensor, or a tuple of them.
        *args: Its further arguments.
    """
    result: T = model.run_whole(function, *args) if is_sharded(model) else function(model, *args)
    return result


def set_gradient_sync(model: Any, *, last: bool, every: bool) -> None:
    """Says before a backward pass whether it is the last one of a step.

    Args:
        model: A sharded model.
        last: True if it is: gradients are reduced, and the weights outside of the layers given up.
        every: Reduce gradients in every backward pass: more traffic, and no whole gradients in
            memory.
    """
    model.set_requires_gradient_sync(last or every)
    model.set_reshard_after_backward(last, recurse=False)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor, whole on every rank; a meeting of all where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered_dtype(model: Any) -> torch.dtype:
    """The type that a model's weights compute in."""
    own: torch.dtype = next(model.parameters()).dtype
    return getattr(model, "compute_dtype", None) or own


def whole_tensor(tensor: Tensor, *, keep: bool) -> Tensor | None:
    """A tensor gathered from all ranks; a meeting of all where it is sharded.

    Args:
        tensor: A tensor or a shard.
        keep: True if this rank wants it; then it is on the CPU if it was sharded.
    """
    if not isinstance(tensor, DTensor):
        return tensor if keep else None
    whole = tensor.full_tensor()
    return whole.cpu() if keep else None


def like_shard(whole: Tensor, shard: Tensor) -> Tensor:
    """This rank's shard of a whole tensor that every rank has; nothing is sent.

    Of the whole only this rank's rows are read: of one that is mapped from a file no others come
    into memory.

    Args:
        whole: The whole tensor, on any device.
        shard: The tensor to be filled in; no DTensor gives the whole.
    """
    if not isinstance(shard, DTensor):
        return whole
    height, place = _share_rows(shard), shard.device_mesh.get_local_rank()
    own = whole[place * height : (place + 1) * height]
    return DTensor.from_local(
        own.to(shard.device, copy=True),
        shard.device_mesh,
        shard.placements,
        run_check=False,
        shape=whole.shape,
        stride=torch.empty(whole.shape, device="meta").stride(),
    )


def whole_model(model: Any, *, keep: bool) -> Any:
    """An ordinary copy of a sharded model on the CPU; a meeting of all ranks.

    Args:
        model: The model; one that is not sharded is given back as it is.
        keep: True if this rank wants it; the others get None.
    """
    if not is_sharded(model):
        return model if keep else None
    in_shards(model)
    state = {name: whole_tensor(t.detach(), keep=keep) for name, t in _own_tensors(model)}
    if not keep:
        return None
    copy = meta_model(model.config, dtype=next(model.parameters()).dtype)
    copy.generation_config = model.generation_config
    for name, tensor in state.items():
        assert tensor is not None
        put_tensor(copy, name, tensor.cpu())
    copy.tie_weights()
    return copy.eval()


def of_first_rank(value: T) -> T:
    """Rank 0's value on every rank; a meeting of all."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def decoder_layers(model: Any) -> Iterator[nn.Module]:
    """Modules that a transformers model declares indivisible."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in names:
            yield module


def _run(model: Any, function: Callable[..., T], *args: Any) -> T:
    return function(model, *args)


def _own_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name, a shared one once; in the same order on all ranks."""
    return [*model.named_parameters(), *model.named_buffers()]


def _take_weights(model: Any) -> dict[str, Tensor]:
    """Takes the tensors of a whole model, which becomes a meta model like the others'."""
    taken = {name: tensor.detach() for name, tensor in _own_tensors(model)}
    model.to("meta")
    return taken


def _share_rows(tensor: DTensor) -> int:
    """Rows of the first rank's share; the last ranks may have fewer, or none (``torch.chunk``)."""
    assert all(place.is_shard(0) for place in tensor.placements), tensor.placements
    return -(-len(tensor) // tensor.device_mesh.size())


def _receive(tensor: Tensor, source: Tensor | None, mesh: DeviceMesh) -> None:
    """Fills a tensor, or this rank's shard of it, from rank 0.

    Each rank is sent its own rows and no others, some at a time: no device holds a whole tensor.

    Args:
        tensor: The tensor, on this rank's device.
        source: The whole one, on rank 0; None on the others.
        mesh: All ranks.
    """
    with torch.no_grad():
        if not isinstance(tensor, DTensor):
            if source is not None:
                tensor.copy_(source)
            torch.distributed.broadcast(tensor, src=0)
            return
        own, height = tensor.to_local(), _share_rows(tensor)
        row_bytes = tensor.numel() // max(1, len(tensor)) * tensor.element_size()
        rows = max(1, _PIECE_BYTES // max(1, mesh.size() * row_bytes))
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            piece = own.new_zeros((stop - start, *tensor.shape[1:]))
            parts = None
            if source is not None:
                parts = [
                    _rows_of_share(source, rank * height, start, stop, height).to(piece)
                    for rank in range(mesh.size())
                ]
            torch.distributed.scatter(piece, parts, src=0)
            here = own[start:stop]
            here.copy_(piece[: len(here)])


def _rows_of_share(source: Tensor, begin: int, start: int, stop: int, height: int) -> Tensor:
    """Rows ``start`` to ``stop`` of the share that begins at a row; zeros where there are none."""
    rows = source[begin : begin + height][start:stop]
    missing = stop - start - len(rows)
    if not missing:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros((missing, *source.shape[1:]))])


def put_tensor(model: Any, name: str, tensor: Tensor) -> None:
    """Puts a real tensor in the place of a meta one."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._parameters:
        module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[own] = tensor
