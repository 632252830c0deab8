"""A reference that follows the policy: TR-DPO's soft and hard updates.

Gorbatovski et al., "Learn Your Reference Model for Real Good Alignment"
(https://arxiv.org/abs/2404.09656): every few optimizer steps the reference becomes
``alpha * policy + (1 - alpha) * reference``. ``alpha`` is the policy's share; 1 is a hard update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo_lightning.data.packing import GroupBatch
from dpo_lightning.errors import UserError
from dpo_lightning.models.adapters import Adapters
from dpo_lightning.models.attention import AttentionPlan
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import in_shards, like_shard, whole_tensor
from dpo_lightning.reference.kinds import LiveReference

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Movement:
    """Updates of a reference.

    Attributes:
        every: Optimizer steps between two.
        alpha: The policy's share in the reference after one, above 0 and at most 1.
    """

    every: int
    alpha: float

    def describe(self) -> str:
        """The updates in a few words."""
        steps = "step" if self.every == 1 else f"{self.every:,} steps"
        if self.alpha == 1:
            return f"becomes the policy every {steps}"
        return f"every {steps} {self.alpha:g} policy + {1 - self.alpha:g} reference"


@dataclass(frozen=True, slots=True)
class Followed:
    """The weights that move, by the policy's names of those that they follow.

    Attributes:
        names: Names of the policy's trained weights, in the policy's order.
        find: Gives the reference's weights in that order. FSDP puts others in their places while
            they are gathered, so they are looked up each time.
    """

    names: tuple[str, ...]
    find: Callable[[], list[Tensor]]


def followed(policy: Any, reference: Any, adapters: Adapters | None) -> Followed:
    """The weights of a live reference that follow the trained ones of a policy.

    Args:
        policy: The policy, before its weights are rounded for the first time.
        reference: The model of the reference: another one of the same shape, or beside adapters a
            view of the policy.
        adapters: What is trained, where the policy's own weights are frozen.

    Raises:
        UserError: If the reference has other weights.
    """
    trained = tuple(name for name, p in policy.named_parameters() if p.requires_grad)
    if adapters is not None:
        copies = [adapters.name_of_copy(name) for name in trained]
        return Followed(trained, lambda: [policy.get_parameter(name) for name in copies])
    shapes, others = (
        {name: p.shape for name, p in model.named_parameters()} for model in (policy, reference)
    )
    for name in (*shapes, *others):
        if shapes.get(name) != others.get(name):
            raise UserError(
                f"reference.sync_every: {name} is {_size(shapes.get(name))} in the policy and "
                f"{_size(others.get(name))} in the reference, and only a reference of the policy's "
                "shape can move; leave reference.pretrained= out, or name a model of that shape"
            )
    return Followed(trained, lambda: [reference.get_parameter(name) for name in trained])


def _size(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


class MovingReference:
    """A live reference that takes over a share of the policy's weights every few steps.

    Its values are kept in float32: those of 16 bits would lose small updates. Weights that are held
    in 16 bits are a rounding of them, made after each update. An adapter moves matrix by matrix,
    so that below ``alpha`` 1 it has the means of both pairs of matrices, not that of their
    products.

    Groups that bring log-probabilities along are compared with those. Held-out groups have the
    start's, so that what they measure at different steps, and of different runs, is of one scale.

    Args:
        model: A frozen model, prepared by ``scorer``, or a view of an adapted one.
        scorer: Scores it, as it does the policy.
        weights: Those that move.
        start: Their first values in the same order, float32; where a weight is float32 itself, it
            is its own value.
        movement: How they move.

    Attributes:
        model: The model.
        rows: Groups whose log-probabilities were asked for.
        computed: Those of them that were computed, and not read.
    """

    def __init__(
        self,
        model: Any,
        scorer: Scorer,
        weights: Followed,
        *,
        start: Sequence[Tensor],
        movement: Movement,
    ) -> None:
        self._live = LiveReference(model, scorer)
        self.model = self._live.model
        self._weights = weights
        self._movement = movement
        self._wide = [
            None if weight.dtype == torch.float32 else value
            for weight, value in zip(weights.find(), start, strict=True)
        ]
        self.rows = 0
        self.computed = 0

    def to(self, device: torch.device) -> None:
        """Moves the model and the float32 values behind it to a device."""
        self._live.to(device)
        self._wide = [None if value is None else value.to(device) for value in self._wide]

    def logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> Tensor:
        """Log-probability of each response, shape (N,), float32, without a graph."""
        self._count(batch, computed=batch.reference_logps is None)
        if batch.reference_logps is not None:
            return batch.reference_logps
        return self._live.logps(batch, plan)

    def token_logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> Tensor:
        """Log-probability of each scored token, shape (S,), float32, without a graph."""
        self._count(batch, computed=batch.reference_token_logps is None)
        if batch.reference_token_logps is not None:
            return batch.reference_token_logps
        return self._live.token_logps(batch, plan)

    def _count(self, batch: GroupBatch, *, computed: bool) -> None:
        self.rows += len(batch.rows)
        self.computed += len(batch.rows) * computed

    @torch.no_grad()
    def follow(self, trained: Sequence[Tensor], *, step: int) -> None:
        """Moves after a step, where an update is due.

        Every rank does the same to what it holds; nothing is sent.

        Args:
            trained: What the optimizer trains, in the policy's order: weights, or the float32
                masters behind them.
            step: Optimizer steps completed.
        """
        if step % self._movement.every:
            return
        in_shards(self.model)
        for weight, value, own in zip(self._weights.find(), self._values(), trained, strict=True):
            local = _local(value)
            local.lerp_(_local(own).to(local), self._movement.alpha)
            if value is not weight:
                _local(weight).copy_(local)

    def state(self, *, keep: bool) -> dict[str, Tensor]:
        """The float32 values by the policy's names; a meeting of all ranks where they are shards.

        Args:
            keep: True if this rank wants them; the others get none.
        """
        in_shards(self.model)
        whole = [whole_tensor(value.detach(), keep=keep) for value in self._values()]
        return {
            name: value
            for name, value in zip(self._weights.names, whole, strict=True)
            if value is not None
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor] | None) -> None:
        """Takes the values of a checkpoint.

        Args:
            state: From :meth:`state`; None, of a run whose reference stayed as it was: this one
                begins at the start.

        Raises:
            UserError: If they are of other weights.
        """
        if state is None:
            log.info("resume: the checkpoint's reference did not move; it begins as the start")
            return
        in_shards(self.model)
        values = dict(zip(self._weights.names, self._values(), strict=True))
        other = [
            name
            for name in {**values, **state}
            if name not in values or name not in state or values[name].shape != state[name].shape
        ]
        if other:
            raise UserError(
                f"resume: the checkpoint's moved reference has other weights ({other[0]} first of "
                f"{len(other)}); resume with the same model= and peft= settings"
            )
        for name, value in values.items():
            value.copy_(like_shard(state[name], value))
        for weight, value in zip(self._weights.find(), values.values(), strict=True):
            if value is not weight:
                _local(weight).copy_(_local(value))

    def _values(self) -> list[Tensor]:
        """The float32 values: the weights themselves, or what is behind them."""
        return [
            weight if wide is None else wide
            for weight, wide in zip(self._weights.find(), self._wide, strict=True)
        ]


def make_moving(
    model: Any,
    scorer: Scorer,
    *,
    policy: Any,
    adapters: Adapters | None,
    movement: Movement,
    cast: Callable[[Any], Any],
) -> MovingReference:
    """A reference that moves, in the type that is computed in.

    Args:
        model: A live reference as it was loaded, or the adapters' copy.
        scorer: Scores it.
        policy: The policy before its first step.
        adapters: What is trained, where the policy's own weights are frozen.
        movement: How it moves.
        cast: Casts a frozen model in place.

    Raises:
        UserError: If the reference has other weights than the policy.
    """
    weights = followed(policy, model, adapters)
    if adapters is None:
        start = [weight.detach().float() for weight in weights.find()]
    else:
        # The copy was rounded with the policy; it starts as the adapter that is trained.
        own = map(policy.get_parameter, weights.names)
        start = [weight.detach().float().clone() for weight in own]
    cast(model.requires_grad_(False))
    return MovingReference(model, scorer, weights, start=start, movement=movement)


def say_if_still(movement: Movement | None, *, total_steps: int) -> None:
    """Warns of a reference whose first update comes too late for any step.

    Args:
        movement: Its updates; None where there are none.
        total_steps: Steps of the run.
    """
    if movement is not None and movement.every >= total_steps:
        log.warning(
            "reference.sync_every=%d: the run has %d steps, so the reference never moves before "
            "one of them; a smaller one does",
            *(movement.every, total_steps),
        )


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard, or the tensor where it is whole."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()
