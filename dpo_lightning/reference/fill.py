"""Gives groups their reference log-probabilities: out of the cache, else computed once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dpo_lightning.data.mismatched import LaidOut
from dpo_lightning.data.packing import collate_groups
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.reference.blocks import BlockPlan, Responses, plan_blocks
from dpo_lightning.reference.cache import Lengths, Logps, ReferenceCache, pieces
from dpo_lightning.reference.desk import BlockDesk, Handed
from dpo_lightning.reference.kinds import CachedReference

log = logging.getLogger(__name__)

T = TypeVar("T")


class Team(Protocol):
    """The ranks that share a model's weights, and so make every forward pass together."""

    @property
    def rank(self) -> int:
        """This one's number."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def from_first(self, function: Callable[[], T]) -> T:
        """Returns rank 0's value of the function on every rank."""

    def gather(self, value: T) -> list[T]:
        """The value of each rank, on every rank."""


def _nothing() -> None:
    """Checks nothing."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Eyes on a pass.

    Attributes:
        check: Called between blocks; what it raises ends the pass.
        show: Shows how far the pass is.
    """

    check: Callable[[], None] = _nothing
    show: ShowPhase = unshown


_UNWATCHED = Watch()


def with_reference_logps(
    parts: Sequence[Sequence[TokenGroup]],
    cache: ReferenceCache,
    *,
    load: Callable[[], Any],
    scorer: Scorer,
    device: torch.device,
    precision: Callable[[], contextlib.AbstractContextManager[Any]],
    micro_batch_tokens: int,
    per_token: bool = False,
    ranks: Team | None = None,
    needed: npt.NDArray[np.bool_] | None = None,
    threads: int | None = None,
    watch: Watch = _UNWATCHED,
) -> tuple[list[list[TokenGroup]], CachedReference]:
    """Gives groups their reference log-probabilities, from the cache as far as it has them.

    What is missing is computed in the data set's fixed blocks, each claimed in the cache's folder,
    so that of many processes that want the same rows one computes a block and the others read it.
    What a cache lacks that cannot be written to, which is said, is computed for this process alone.

    Args:
        parts: Lists of groups, such as the training and the held-out groups: together the data
            set that decides the blocks, each of which is of one part.
        cache: The namespace of this reference.
        load: Makes the frozen model, prepared by ``scorer``; called when rows are missing.
        scorer: Scores micro-batches.
        device: Where to compute.
        precision: The context to compute in.
        micro_batch_tokens: What the device holds at once in training.
        per_token: True if the groups get the log-probability of every token beside the sums. Those
            are kept apart from the sums of other runs.
        ranks: Those that make every forward pass together, each with a block of its own; the first
            reads and writes the cache.
        needed: True for the groups that are used, part after part; None: all are. The others are
            given back as they came.
        threads: CPU threads of one operation, on which its last bits may depend; None: as they are.
        watch: Looks on.

    Returns:
        The lists again, and the reference that reads what the groups now hold.

    Raises:
        UserError: If the reference gives a response no finite log-probability.
    """
    laid = LaidOut.of(parts, needed)
    plan = plan_blocks(
        Responses.of(*laid.parts), shared=scorer.shared, micro_batch_tokens=micro_batch_tokens
    )
    own = cache.of_tokens() if per_token else cache
    computing = _Computing(plan, load, scorer, device, precision, per_token, ranks, watch)
    with _threads(threads):
        values, computed = _read_or_compute(plan, own, plan.needed(laid.wanted), computing)
    filled = [*_with_values(laid.groups, laid.wanted, plan, values, per_token=per_token)]
    reference = _reference(laid, plan, computed, own)
    if not computing.is_first:
        reference.computed = 0  # the first one counts for all
    return laid.put_together(filled), reference


def _reference(
    laid: LaidOut, plan: BlockPlan, computed: Sequence[int], cache: ReferenceCache
) -> CachedReference:
    """The reference of the wanted groups, of which some blocks were computed here.

    A row is counted where its first response was computed: over any number of processes once.
    """
    used = laid.first + np.flatnonzero(laid.wanted[laid.first :])
    is_here = np.zeros(len(plan.blocks), dtype=bool)
    is_here[computed] = True
    here = is_here[plan.block_of[plan.responses.which[plan.responses.first[used]]]]
    return CachedReference(
        rows=len(used),
        computed=int(here.sum()),
        read=(used[~here] - laid.first).tolist(),
        folder=cache.path,
    )


@dataclass(frozen=True, slots=True)
class _Computing:
    """Settings of the computation of log-probabilities; see :func:`with_reference_logps`.

    Attributes:
        plan: The blocks.
        load: Makes the frozen model.
        scorer: Scores micro-batches.
        device: Where to compute.
        precision: The context to compute in.
        per_token: True if the tokens of a response have a value each.
        ranks: Those that compute together.
        watch: Looks on.
    """

    plan: BlockPlan
    load: Callable[[], Any]
    scorer: Scorer
    device: torch.device
    precision: Callable[[], contextlib.AbstractContextManager[Any]]
    per_token: bool
    ranks: Team | None
    watch: Watch

    @property
    def size(self) -> int:
        """Blocks that are computed at a time."""
        return 1 if self.ranks is None else self.ranks.size

    @property
    def is_first(self) -> bool:
        """True in the process that reads and writes for all."""
        return self.ranks is None or self.ranks.rank == 0

    def ask(self, function: Callable[[], T]) -> T:
        """Returns the function's value here, or that of the first of several ranks."""
        return function() if self.ranks is None else self.ranks.from_first(function)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """A number of CPU threads of one operation, for a while."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_or_compute(
    plan: BlockPlan, cache: ReferenceCache, needed: Sequence[int], computing: _Computing
) -> tuple[dict[int, Logps], list[int]]:
    """The values of all needed blocks, and which were computed here, by any that computes along."""
    desk = BlockDesk(plan, cache, needed)
    values = computing.ask(desk.read_all)
    computed: list[int] = []
    if len(values) == len(needed):
        return values, computed
    for folder in cache.earlier_layouts():
        log.info("reference: %s is from an earlier version and not used; it may be deleted", folder)
    log.info("computing reference log-probs (cached for later runs)")
    model = computing.load().to(computing.device)
    done = plan.count(values)
    show = computing.watch.show("reference", total=plan.count(needed), unit="responses", done=done)
    with contextlib.closing(desk), show as say:
        while len(values) < len(needed):
            computing.watch.check()
            handed: Handed = computing.ask(lambda: desk.hand_out(computing.size))
            found = _score_blocks(handed.compute, model, computing)
            for number, logps in found.items():
                _check_finite(logps, number, plan, cache)
            values |= handed.read | found
            computed += found
            if computing.is_first:
                desk.publish(found)
            done += plan.count({*handed.read, *found})
            say(done)
    return values, computed


@torch.no_grad()
def _score_blocks(numbers: Sequence[int], model: Any, computing: _Computing) -> dict[int, Logps]:
    """Values of blocks; of several ranks each computes one of them, and all get all."""
    if not numbers:
        return {}
    blocks, ranks = computing.plan.blocks, computing.ranks
    rank = 0 if ranks is None else ranks.rank
    own = numbers[min(rank, len(numbers) - 1)]
    count = len(blocks[own].ends)
    found = []
    # All make as many forward passes: a rank that has none left makes its last once more.
    for step in range(max(len(blocks[number].ends) for number in numbers)):
        logps = _score(own, min(step, count - 1), model, computing)
        if step < count:
            found.append(logps)
    mine = {own: np.concatenate(found)} if rank < len(numbers) else {}
    parts = [mine] if ranks is None else ranks.gather(mine)
    return {number: logps for part in parts for number, logps in part.items()}


def _score(number: int, micro: int, model: Any, computing: _Computing) -> Logps:
    """Values of a micro-batch of a block, end to end."""
    scorer = computing.scorer
    passes = computing.plan.passes(number, micro)
    batch = collate_groups(passes, range(len(passes))).to(computing.device)
    with computing.precision():
        tokens = scorer.token_logps(model, batch, scorer.plan(batch))
    logps = tokens.float().cpu()
    if not computing.per_token:
        # As the scorer adds them up; but there a GPU takes another order each time.
        sums = torch.zeros(len(batch.lengths), dtype=torch.float32)
        logps = sums.index_add(0, batch.response.cpu(), logps)
    found: Logps = logps.numpy()
    return found


def _sums(values: Logps, lengths: npt.NDArray[Any]) -> Logps:
    """Sums of neighbours, shape (n,), float32."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    return np.add.reduceat(values, starts, dtype=np.float64).astype(np.float32)


def _with_values(
    groups: Sequence[TokenGroup],
    wanted: npt.NDArray[np.bool_],
    plan: BlockPlan,
    values: Mapping[int, Logps],
    *,
    per_token: bool,
) -> Iterator[TokenGroup]:
    """The groups, the wanted ones with their reference log-probabilities."""
    responses = plan.responses
    sums = np.full(len(responses), np.nan, dtype=np.float32)
    tokens: dict[int, Logps] = {}
    for number, own in values.items():
        members = plan.members(number)
        lengths: Lengths = responses.lengths[members]
        sums[members] = _sums(own, lengths) if per_token else own
        if per_token:
            tokens |= zip(members.tolist(), pieces(own, lengths), strict=True)
    for number, group in enumerate(groups):
        if not wanted[number]:
            yield group
            continue
        which = responses.of_group(number)
        of_tokens = tuple(tokens[i] for i in which.tolist()) if per_token else None
        yield replace(group, reference_logps=sums[which], reference_token_logps=of_tokens)


def _check_finite(values: Logps, number: int, plan: BlockPlan, cache: ReferenceCache) -> None:
    if np.isfinite(values).all():
        return
    members = plan.members(number)
    widths = cache.widths(plan.responses.lengths[members])
    for response, own in zip(members.tolist(), pieces(values, widths), strict=True):
        broken = own[~np.isfinite(own)]
        if len(broken):
            raise UserError(
                f"reference: its log-probability of a response of "
                f"{plan.responses.source(response)} is {broken[0]}; name a sound model with "
                "reference.pretrained=, or compute in float32 (trainer.precision=32-true "
                "model.dtype=float32)"
            )
