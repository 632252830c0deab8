"""Rotary embeddings whose factors depend on the length of a sequence, not on its neighbours.

LongRoPE has other factors for a sequence that is longer than the model was first trained on, and
dynamic NTK scaling other ones for each length past that. transformers takes the longest sequence of
a batch for the length of all. Here each token has the factors of its own sequence, so that a row
has the same numbers beside short rows, beside long ones, and alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_lightning.data.packing import GroupBatch, collate_groups
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.models.devices import on_device

Part = tuple[int, Tensor | None]
"""A length of sequences, and which tokens are of those of like factors; None: all are."""

Factors = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RopeLengths:
    """Lengths at which the factors of rotary embeddings change.

    Attributes:
        steps: Lengths behind which there is one other set of factors.
        slopes: Lengths behind which each length has its own.
    """

    steps: tuple[int, ...] = ()
    slopes: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Any, *, max_length: int) -> RopeLengths:
        """Reads them from a config.

        Args:
            config: A transformers config.
            max_length: Longest prompt + response; what changes behind it does not matter.
        """
        config = config.get_text_config()
        steps, slopes = [], []
        for rope in _ropes(getattr(config, "rope_parameters", None)):
            kind = str(rope.get("rope_type"))
            if kind == "longrope":
                steps.append(rope.get("original_max_position_embeddings"))
            elif "dynamic" in kind:
                slopes.append(getattr(config, "max_position_embeddings", None))
        return cls(
            tuple(sorted({n for n in steps if n is not None and n < max_length})),
            tuple(sorted({n for n in slopes if n is not None and n < max_length})),
        )

    def __bool__(self) -> bool:
        return bool(self.steps or self.slopes)

    def __or__(self, other: RopeLengths) -> RopeLengths:
        """The lengths of two models."""
        return RopeLengths(
            tuple(sorted({*self.steps, *other.steps})),
            tuple(sorted({*self.slopes, *other.slopes})),
        )

    def factors(self, length: int) -> Factors:
        """A name of the factors of a length: the same name, the same factors."""
        above = [int(length > step) for step in self.steps]
        return (*above, *(max(length, slope) for slope in self.slopes))

    def lay_out(self, batch: GroupBatch) -> tuple[GroupBatch, Tensor | None]:
        """A micro-batch in which the responses of a group have the same factors.

        A group whose responses differ in them becomes several, each with the prompt.

        Returns:
            The micro-batch; the place of each scored token in it, in the order of the old one,
            or None where nothing has changed.
        """
        names = [[self.factors(p + r) for r in rest] for p, *rest in batch.segments]
        if all(len({*own}) == 1 for own in names):
            return batch, None
        ids = batch.input_ids.cpu().numpy().astype(np.int32)
        groups, places = [], []
        start = scored = 0
        for (prompt, *lengths), own in zip(batch.segments, names, strict=True):
            ends = np.cumsum([start + prompt, *lengths])
            first = scored + np.cumsum([0, *lengths])
            for name in dict.fromkeys(own):
                kept = [k for k, other in enumerate(own) if other == name]
                responses = tuple(ids[ends[k] : ends[k + 1]] for k in kept)
                groups.append(_group(ids[start : start + prompt], responses))
                places += [np.arange(first[k], first[k] + lengths[k]) for k in kept]
            start, scored = int(ends[-1]), int(first[-1])
        device = batch.input_ids.device
        laid = collate_groups(groups, [0] * len(groups)).to(device)
        return laid, on_device(torch.from_numpy(np.concatenate(places).argsort()), device)

    def parts(self, widths: Sequence[tuple[int, int]], device: torch.device) -> tuple[Part, ...]:
        """Tokens in parts of like factors.

        Args:
            widths: Tokens that stand together, and the length of their sequence.
            device: Device of the masks, each of shape (sum of the tokens,).
        """
        names = [self.factors(length) for _, length in widths]
        different = dict.fromkeys(names)
        parts: list[Part] = []
        for name in different:
            length = max(n for (_, n), own in zip(widths, names, strict=True) if own == name)
            if len(different) == 1:
                return ((length, None),)
            mine = np.repeat([own == name for own in names], [count for count, _ in widths])
            parts.append((length, on_device(torch.from_numpy(mine), device)))
        return tuple(parts)


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """The rotary settings of a config: one for all layers, or one for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return
    if "rope_type" in parameters:
        yield parameters
        return
    for value in parameters.values():
        yield from _ropes(value)


def _group(prompt: Any, responses: tuple[Any, ...]) -> TokenGroup:
    return TokenGroup(prompt, responses, (1,) * len(responses), 1.0, "", "")


_parts: ContextVar[Sequence[Part]] = ContextVar("parts", default=())


@contextlib.contextmanager
def lengths_known(parts: Sequence[Part]) -> Iterator[None]:
    """Context in which a forward pass knows which tokens share factors; none: as it comes."""
    token = _parts.set(parts)
    try:
        yield
    finally:
        _parts.reset(token)


def heed_lengths(model: Any) -> None:
    """Makes a model's rotary embeddings ask for :func:`lengths_known`; once."""
    for module in model.modules():
        if hasattr(module, "rope_type") and "forward" not in vars(module):
            module.forward = functools.partial(_forward, module, module.forward)


def _forward(
    module: Any, own: Callable[..., Any], x: Tensor, position_ids: Tensor, *rest: Any, **named: Any
) -> Any:
    """The module's embeddings, each token's with the factors of its sequence."""
    parts = _parts.get()
    if not parts:
        return own(x, position_ids, *rest, **named)
    joined: Any = None
    for length, mask in parts:
        _forget(module)
        if mask is None:
            joined = own(x, position_ids, *rest, **named)
            continue
        mask = mask.view(position_ids.shape[-2:])
        # The module goes by the largest position that it is shown.
        found = own(x, position_ids.where(mask, length - 1), *rest, **named)
        joined = found if joined is None else _where(mask[..., None], found, joined)
    _forget(module)
    return joined


def _where(mask: Tensor, found: Any, other: Any) -> Any:
    if isinstance(found, Tensor):
        return torch.where(mask, found, other)
    return tuple(torch.where(mask, a, b) for a, b in zip(found, other, strict=True))


def _forget(module: Any) -> None:
    """Takes a dynamic module back to its first factors: it keeps those of the longest sequence."""
    for name in list(vars(module)):
        if name.endswith("max_seq_len_cached"):
            setattr(module, name, module.original_max_seq_len)
    for name, value in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            getattr(module, name.replace("original_", "")).data = value.clone()
