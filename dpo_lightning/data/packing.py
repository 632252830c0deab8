"""Assignment of groups to steps, ranks and micro-batches, and a micro-batch's flat layout.

A group is laid out ``[P | y_1 | ... | y_K]``: the prompt once, then its responses, whose positions
all restart at |P|. Groups follow each other in one row of T tokens, and nothing is padded.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_lightning.data.gathers import Bucket, Bucketed, Gathers, Sequences
from dpo_lightning.data.greedy import pack_costs
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
        total_weight: Sum of the weights of all the step's groups, over all ranks.
        pairs: Strictly ranked pairs of the step, over all ranks.
        tokens: Tokens that the step computes, over all ranks; none is padding.
        fillers: Micro-batches that are there for the other ranks, which have as many.
    """

    micro_batches: tuple[GroupBatch, ...]
    total_weight: float
    pairs: int
    tokens: int
    fillers: int = 0

    @property
    def counted(self) -> tuple[GroupBatch, ...]:
        """The micro-batches whose groups count."""
        return self.micro_batches[: len(self.micro_batches) - self.fillers]


def plan_step(
    costs: Sequence[int], *, world_size: int, micro_batch_tokens: int, equal_counts: bool = False
) -> list[list[list[int]]]:
    """Shares the groups of one step out over ranks and micro-batches.

    The longest group goes first, to the rank with the fewest tokens so far, so that no two ranks
    differ by more than the longest group. Within a rank they are packed into few micro-batches and
    then shared out evenly over as many, as far as the budget allows. A group over the budget gets a
    micro-batch of its own. The result depends on the arguments alone.

    Args:
        costs: Tokens of each group of the step.
        world_size: Number of ranks.
        micro_batch_tokens: Most tokens of a micro-batch.
        equal_counts: True if all ranks are to have as many micro-batches, for strategies whose
            ranks meet in every forward pass: some are split, and a rank with too few groups gets
            empty ones.

    Returns:
        For each rank a list of micro-batches, each a list of indices into ``costs`` in ascending
        order. A rank without groups has no micro-batches, or empty ones with ``equal_counts``.

    Example:
        >>> plan_step([5, 9, 4, 2], world_size=2, micro_batch_tokens=9)
        [[[1], [3]], [[0, 2]]]
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    shares = _share_out(order, costs, world_size)
    plan = [_micro_batches(share, costs, micro_batch_tokens) for share in shares]
    if equal_counts:
        count = max(map(len, plan))
        plan = [_split_up(micro_batches, costs, count) for micro_batches in plan]
    return [[sorted(micro) for micro in micro_batches] for micro_batches in plan]


def _share_out(order: Sequence[int], costs: Sequence[int], parts: int) -> list[list[int]]:
    """Each in turn to the part with the least so far."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for i in order:
        load, part = heapq.heappop(loads)
        shares[part].append(i)
        heapq.heappush(loads, (load + costs[i], part))
    return shares


def _micro_batches(share: Sequence[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """Few micro-batches, as even as the budget allows: never more than first-fit needs."""
    packed = pack_costs(share, costs, budget, first_fit=True)
    for count in range(max(1, -(-sum(costs[i] for i in share) // budget)), len(packed) + 1):
        even = _share_out(share, costs, count)
        if all(len(micro) == 1 or sum(costs[i] for i in micro) <= budget for micro in even):
            return even
    return packed


def _split_up(micro_batches: list[list[int]], costs: Sequence[int], count: int) -> list[list[int]]:
    """The same groups in ``count`` micro-batches: the largest are split, then empty ones follow."""
    found = [*micro_batches]
    while len(found) < count:
        splittable = [micro for micro in found if len(micro) > 1]
        if not splittable:
            found.append([])
            continue
        largest = max(splittable, key=lambda micro: sum(costs[i] for i in micro))
        found.remove(largest)
        found += _share_out(largest, costs, 2)
    return found


def epoch_order(n: int, *, seed: int, epoch: int) -> list[int]:
    """The order of ``n`` groups in an epoch: a function of the seed and the epoch alone."""
    return [int(i) for i in np.random.default_rng([seed, epoch]).permutation(n)]


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
    costs = [group.tokens if shared else group.padded_tokens for group in step]
    plan = plan_step(
        costs,
        world_size=world_size,
        micro_batch_tokens=micro_batch_tokens,
        equal_counts=equal_counts,
    )
    mine = [micro for micro in plan[rank] if micro]
    fillers = len(plan[rank]) - len(mine) if equal_counts else 0
    shortest = min(range(len(costs)), key=lambda i: costs[i])
    return StepBatch(
        micro_batches=tuple(
            collate_groups([step[i] for i in micro], [rows[i] for i in micro], gathers=gathers)
            for micro in [*mine, *[[shortest]] * fillers]
        ),
        total_weight=float(sum(group.weight for group in step)),
        pairs=sum(group.pairs for group in step),
        tokens=sum(costs),
        fillers=fillers,
    )


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
    )


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
