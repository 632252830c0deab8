"""Assignment of groups to steps, ranks and micro-batches, and a micro-batch's flat layout.

A group is laid out ``[P | y_1 | ... | y_K]``: the prompt once, then its responses, whose positions
all restart at |P|. Groups follow each other in one row of T tokens, and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_lightning.data.gathers import Bucket, Bucketed, Gathers, Sequences
from dpo_lightning.data.mismatched import mismatched_group
from dpo_lightning.data.step_plan import epoch_order, plan_step
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.data.transit import Movable

__all__ = [
    "Bucket",
    "GroupBatch",
    "StepBatch",
    "collate_groups",
    "epoch_order",
    "make_step_batch",
    "plan_step",
]


@dataclass(frozen=True, slots=True)
class GroupBatch(Movable):
    """A micro-batch of G groups with N responses in T tokens, of which S are scored.

    Attributes:
        input_ids: Token ids, shape (T,), int64.
        position_ids: Position of each token in its own sequence, shape (T,), int64.
        bucketed: How attention gathers the tokens into calls; None where it is not to be brought
            along.
        sequences: What a kernel for any lengths takes; None the same.
        score_from: Token whose hidden state predicts each scored token, shape (S,), int64. The last
            token of a prompt stands here once for every response.
        targets: The scored token ids, shape (S,), int64.
        response: Which response each scored token belongs to, shape (S,), int64.
        lengths: Tokens of each response, shape (N,), int64.
        group: Group of each response, numbered 0..G-1 in order, shape (N,), int64.
        rank: Rank of each response in its group, 1 is best, shape (N,), int64.
        weight: Weight of each group, shape (G,), float32.
        target_margin: The margin that each group asks for, in units of reward, shape (G,), float32.
        chosen: Better response of each strictly ranked pair, shape (M,), int64.
        rejected: Worse response of each strictly ranked pair, shape (M,), int64.
        pair_share: Share of each pair in its group, shape (M,), float32; they add up to 1.
        best: Responses of rank 1, int64.
        reference_logps: Log-probability of each response under the reference, shape (N,), float32,
            where all groups bring theirs along, else None.
        reference_token_logps: Log-probability of each scored token under the reference, shape (S,),
            float32, in the order of ``targets``, where all groups bring theirs along, else None.
        places: Index of each group in its data set, shape (G,), int64.
        segments: (|P|, |y_1|, ..., |y_K|) of each group, on the host.
        rows: Index of each group in its data set, on the host.
        desirable: True for desirable responses, shape (N,), bool, where a group has a label: of
            those without one the best are; None where ranks alone say it.
    """

    input_ids: Tensor
    position_ids: Tensor
    bucketed: Bucketed | None
    sequences: Sequences | None
    score_from: Tensor
    targets: Tensor
    response: Tensor
    lengths: Tensor
    group: Tensor
    rank: Tensor
    weight: Tensor
    target_margin: Tensor
    chosen: Tensor
    rejected: Tensor
    pair_share: Tensor
    best: Tensor
    reference_logps: Tensor | None
    reference_token_logps: Tensor | None
    places: Tensor
    segments: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    desirable: Tensor | None = None

    def in_buckets(self) -> Bucketed:
        """The buckets that it brings, or new ones, which go to its device in one copy."""
        if self.bucketed is not None:
            return self.bucketed
        return Bucketed.of(self.segments).to(self.input_ids.device)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Gathers of the tokens, one for each call of attention."""
        return self.in_buckets().buckets

    @property
    def inverse(self) -> Tensor:
        """Place of each flat token among the buckets' queries, laid end to end, (T,), int64."""
        return self.in_buckets().inverse

    @property
    def largest_group(self) -> int:
        """Responses of the largest group."""
        return max((len(shape) - 1 for shape in self.segments), default=0)


@dataclass(frozen=True, slots=True)
class StepBatch(Movable):
    """One rank's part of one optimizer step; one Lightning batch.

    Attributes:
        micro_batches: At least one, unless the rank has no groups in this step; the last
            ``fillers`` of them hold a group that is not to count.
        total_weight: Sum of the weights of all the step's groups, over all ranks, and 1 for each
            place that is left empty: the number that its loss and gradient are divided by.
        pairs: Strictly ranked pairs of the step, over all ranks.
        tokens: Tokens that the step computes, over all ranks; none is padding.
        fillers: Micro-batches that are there for the other ranks, which have as many.
        examples: Responses of the step, over all ranks.
        example_weight: Sum of the weights of all these, each of which has its group's.
        mismatched: This rank's micro-batches of responses to other prompts, where a loss measures
            them; the last ``mismatched_fillers`` are there for the other ranks.
        mismatched_fillers: Number of those.
        mismatched_count: Mismatched responses of the step, over all ranks.
    """

    micro_batches: tuple[GroupBatch, ...]
    total_weight: float
    pairs: int
    tokens: int
    fillers: int = 0
    examples: int = 0
    example_weight: float = 0.0
    mismatched: tuple[GroupBatch, ...] = ()
    mismatched_fillers: int = 0
    mismatched_count: int = 0

    @property
    def counted(self) -> tuple[GroupBatch, ...]:
        """The micro-batches whose groups count."""
        return self.micro_batches[: len(self.micro_batches) - self.fillers]

    @property
    def counted_mismatched(self) -> tuple[GroupBatch, ...]:
        """The micro-batches whose mismatched responses count."""
        return self.mismatched[: len(self.mismatched) - self.mismatched_fillers]


def make_step_batch(
    groups: Sequence[TokenGroup],
    rows: Sequence[int],
    *,
    rank: int,
    world_size: int,
    micro_batch_tokens: int,
    shared: bool,
    equal_counts: bool = False,
    gathers: Gathers = "buckets",
) -> StepBatch:
    """Builds one rank's part of the step over ``groups[i] for i in rows``.

    Args:
        groups: The data set.
        rows: Indices of the step's groups.
        rank: This rank.
        world_size: Number of ranks.
        micro_batch_tokens: Most tokens of a micro-batch.
        shared: True if a prompt is computed once for its responses; decides what a group costs.
        equal_counts: True if all ranks are to have as many micro-batches; see :func:`plan_step`.
        gathers: What the micro-batches bring along for attention.
    """
    step = [groups[i] for i in rows]
    share = _Share(rank, world_size, micro_batch_tokens, shared, equal_counts, gathers)
    micro_batches, fillers, tokens = share.of(step, rows)
    apart = [
        (mismatched_group(g), i)
        for g, i in zip(step, rows, strict=True)
        if g.mismatched is not None
    ]
    mismatched, mismatched_fillers, more = share.of([g for g, _ in apart], [i for _, i in apart])
    return StepBatch(
        micro_batches=micro_batches,
        total_weight=float(sum(group.weight for group in step)),
        pairs=sum(group.pairs for group in step),
        tokens=tokens + more,
        fillers=fillers,
        examples=sum(len(group.responses) for group in step),
        example_weight=float(sum(group.weight * len(group.responses) for group in step)),
        mismatched=mismatched,
        mismatched_fillers=mismatched_fillers,
        mismatched_count=len(apart),
    )


@dataclass(frozen=True, slots=True)
class _Share:
    """A rank's part of groups, as the arguments of :func:`make_step_batch` say it."""

    rank: int
    world_size: int
    micro_batch_tokens: int
    shared: bool
    equal_counts: bool
    gathers: Gathers

    def of(
        self, step: Sequence[TokenGroup], rows: Sequence[int]
    ) -> tuple[tuple[GroupBatch, ...], int, int]:
        """The rank's micro-batches, how many of them are fillers, and the tokens of all ranks."""
        if not step:
            return (), 0, 0
        costs = [group.tokens if self.shared else group.padded_tokens for group in step]
        plan = plan_step(
            costs,
            world_size=self.world_size,
            micro_batch_tokens=self.micro_batch_tokens,
            equal_counts=self.equal_counts,
        )
        mine = [micro for micro in plan[self.rank] if micro]
        fillers = len(plan[self.rank]) - len(mine) if self.equal_counts else 0
        shortest = min(range(len(costs)), key=lambda i: costs[i])
        batches = tuple(
            collate_groups([step[i] for i in micro], [rows[i] for i in micro], gathers=self.gathers)
            for micro in [*mine, *[[shortest]] * fillers]
        )
        return batches, fillers, sum(costs)


def collate_groups(
    groups: Sequence[TokenGroup], rows: Sequence[int], *, gathers: Gathers = "buckets"
) -> GroupBatch:
    """Lays groups out flat.

    Args:
        groups: At least one group.
        rows: Index of each group in its data set.
        gathers: What is brought along for attention.

    Example:
        One group with the prompt (7, 8) and the responses (3, 0) and (4, 5, 0) becomes

        >>> from dpo_lightning.data.tokens import TokenGroup
        >>> ids = lambda *x: np.array(x, dtype=np.int32)
        >>> group = TokenGroup(ids(7, 8), (ids(3, 0), ids(4, 5, 0)), (1, 2), 1.0, "row", "key")
        >>> batch = collate_groups([group], [0])
        >>> batch.input_ids.tolist()
        [7, 8, 3, 0, 4, 5, 0]
        >>> batch.position_ids.tolist()
        [0, 1, 2, 3, 2, 3, 4]
        >>> batch.score_from.tolist()
        [1, 2, 1, 4, 5]
        >>> batch.targets.tolist()
        [3, 0, 4, 5, 0]
        >>> batch.response.tolist()
        [0, 0, 1, 1, 1]
    """
    flat = _flat(groups)
    pairs = _ranked_pairs(groups)
    ranks = [rank for group in groups for rank in group.ranks]
    segments = tuple((len(g.prompt), *map(len, g.responses)) for g in groups)
    return GroupBatch(
        input_ids=_tensor(np.concatenate(flat.ids)),
        position_ids=_tensor(np.concatenate(flat.positions)),
        bucketed=Bucketed.of(segments) if gathers in ("buckets", "both") else None,
        sequences=(Sequences.of_segments(segments) if gathers in ("sequences", "both") else None),
        score_from=_tensor(np.concatenate(flat.score_from)),
        targets=_tensor(np.concatenate([r for group in groups for r in group.responses])),
        response=_tensor(np.concatenate(flat.responses)),
        lengths=_integers([len(r) for group in groups for r in group.responses]),
        group=_integers([g for g, group in enumerate(groups) for _ in group.responses]),
        rank=_integers(ranks),
        weight=torch.tensor([group.weight for group in groups], dtype=torch.float32),
        target_margin=torch.tensor([group.target_margin for group in groups], dtype=torch.float32),
        chosen=_integers([better for better, _, _ in pairs]),
        rejected=_integers([worse for _, worse, _ in pairs]),
        pair_share=torch.tensor([share for _, _, share in pairs], dtype=torch.float32),
        best=_integers([k for k, rank in enumerate(ranks) if rank == 1]),
        reference_logps=_joined([group.reference_logps for group in groups]),
        reference_token_logps=_joined(
            [None if (t := g.reference_token_logps) is None else np.concatenate(t) for g in groups]
        ),
        places=_integers(rows),
        segments=segments,
        rows=tuple(rows),
        desirable=_desirable(groups),
    )


def _desirable(groups: Sequence[TokenGroup]) -> Tensor | None:
    """Desirable responses, (N,), bool; None where no group has a label."""
    if all(group.label is None for group in groups):
        return None
    found = [
        rank == 1 if group.label is None else group.label
        for group in groups
        for rank in group.ranks
    ]
    return torch.tensor(found, dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class _Flat:
    """Groups one behind the other, part by part.

    Attributes:
        ids: Token ids of each prompt and response.
        positions: Positions of each.
        score_from: Places that predict each response.
        responses: Number of the response, for each of its tokens.
    """

    ids: list[npt.NDArray[Any]] = field(default_factory=list)
    positions: list[npt.NDArray[Any]] = field(default_factory=list)
    score_from: list[npt.NDArray[Any]] = field(default_factory=list)
    responses: list[npt.NDArray[Any]] = field(default_factory=list)


def _flat(groups: Sequence[TokenGroup]) -> _Flat:
    flat = _Flat()
    start = 0
    for group in groups:
        p = len(group.prompt)
        flat.ids.append(group.prompt)
        flat.positions.append(np.arange(p))
        cursor = start + p
        for response in group.responses:
            r = len(response)
            flat.ids.append(response)
            flat.positions.append(np.arange(p, p + r))
            source = np.arange(cursor - 1, cursor + r - 1)
            source[0] = start + p - 1
            flat.score_from.append(source)
            flat.responses.append(np.full(r, len(flat.responses), dtype=np.int64))
            cursor += r
        start = cursor
    return flat


def _ranked_pairs(groups: Sequence[TokenGroup]) -> list[tuple[int, int, float]]:
    """Better and worse response of each strictly ranked pair, and its share of its group."""
    found: list[tuple[int, int, float]] = []
    n = 0
    for group in groups:
        ranked = [
            (n + i, n + j)
            for i, better in enumerate(group.ranks)
            for j, worse in enumerate(group.ranks)
            if better < worse
        ]
        # The other way round too, as far as the ranking may be wrong.
        orders = [(ranked, group.confidence)]
        if group.confidence < 1:
            orders.append(([(worse, better) for better, worse in ranked], 1 - group.confidence))
        for pairs, confidence in orders:
            found += [(better, worse, confidence / len(pairs)) for better, worse in pairs]
        n += len(group.responses)
    return found


def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _joined(parts: Sequence[npt.NDArray[np.float32] | None]) -> Tensor | None:
    """The values of all groups end to end, None where one has none."""
    known = [part for part in parts if part is not None]
    return torch.from_numpy(np.concatenate(known)) if len(known) == len(parts) else None


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64, copy=False))
