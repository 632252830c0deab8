"""Gives every group its reference log-probabilities: out of the cache, else computed once."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dpo_lightning.data.greedy import pack_costs
from dpo_lightning.data.packing import collate_groups
from dpo_lightning.data.tokens import Ids, TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.reference.cache import Logps, ReferenceCache, pieces, response_key
from dpo_lightning.reference.kinds import CachedReference

log = logging.getLogger(__name__)

# Responses that share one prompt in a pass; more of them are another group.
_PASS_RESPONSES = 16
# Without gradients much more fits on a device at once.
_PASS_BUDGET = 4
# What a killed pass loses at most.
_PUBLISH_SECONDS = 60.0
# Ranks that share a model tell each other what they found every so many micro-batches.
_ROUNDS_APART = 16

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
) -> tuple[list[list[TokenGroup]], CachedReference]:
    """Gives every group its reference log-probabilities, from the cache as far as it has them.

    What is missing is computed under the cache's lock, so that of many processes that want the same
    rows one computes them and the others wait and read. A cache that cannot be written to is said
    once; the rows are then computed for this run alone.

    Args:
        parts: Lists of groups, such as the training and the evaluation groups.
        cache: The namespace of this reference.
        load: Makes the frozen model, prepared by ``scorer``; called when rows are missing.
        scorer: Scores micro-batches.
        device: Where to compute.
        precision: The context to compute in.
        micro_batch_tokens: What the device holds at once in training.
        per_token: True if the groups get the log-probability of every token beside the sums. Those
            are kept apart from the sums of other runs.
        ranks: Those that compute together, each a part; the first reads and writes the cache.

    Returns:
        The lists again, and the reference that reads what the groups now hold.

    Raises:
        UserError: If the reference gives a response no finite log-probability.
    """
    groups = [group for part in parts for group in part]
    computing = _Computing(
        load=load,
        scorer=scorer,
        device=device,
        precision=precision,
        budget=_PASS_BUDGET * micro_batch_tokens,
        per_token=per_token,
        ranks=ranks,
    )
    values, computed = _read_or_compute(
        groups, cache.of_tokens() if per_token else cache, computing
    )
    filled = iter(_with_values(groups, values, per_token=per_token))
    reference = CachedReference(rows=len(groups), computed=computed)
    return [[next(filled) for _ in part] for part in parts], reference


@dataclass(frozen=True, slots=True, kw_only=True)
class _Computing:
    """Settings of the computation of log-probabilities; see :func:`with_reference_logps`.

    Attributes:
        load: Makes the frozen model.
        scorer: Scores micro-batches.
        device: Where to compute.
        precision: The context to compute in.
        budget: Most tokens of a micro-batch.
        per_token: True if the tokens of a response have a value each.
        ranks: Those that compute together.
    """

    load: Callable[[], Any]
    scorer: Scorer
    device: torch.device
    precision: Callable[[], contextlib.AbstractContextManager[Any]]
    budget: int
    per_token: bool
    ranks: Team | None

    def ask(self, function: Callable[[], T]) -> T:
        """Returns the function's value here, or that of the first of several ranks."""
        return function() if self.ranks is None else self.ranks.from_first(function)


def _read_or_compute(
    groups: Sequence[TokenGroup], cache: ReferenceCache, computing: _Computing
) -> tuple[Logps, int]:
    """The values of all responses end to end, and how many groups were computed for it."""
    keys, lengths = _keys(groups)
    widths = cache.widths(lengths)
    starts = np.cumsum(widths, dtype=np.int64) - widths
    values = computing.ask(lambda: cache.read(keys, lengths))

    def fill(publish: Callable[..., None]) -> int:
        missing = np.isnan(values[starts])
        owner = np.repeat(np.arange(len(groups)), [len(group.responses) for group in groups])
        wanted = sorted(set(owner[missing].tolist()))
        found = _compute(
            [(groups[g], index) for g, index in _responses(groups, missing)],
            keys[missing],
            computing.load().to(computing.device),
            computing,
            publish=publish,
        )
        values[np.repeat(missing, widths)] = found
        return len(wanted)

    if not np.isnan(values).any():
        return values, 0
    with contextlib.ExitStack() as held:
        if not computing.ask(lambda: _lock(cache, held)):
            return values, fill(_keep_nothing)
        values = computing.ask(lambda: cache.read(keys, lengths))
        if not np.isnan(values).any():
            return values, 0
        log.info("computing reference log-probs (cached for later runs)")
        return values, fill(_Publisher(cache))


def _with_values(
    groups: Sequence[TokenGroup], values: Logps, *, per_token: bool
) -> Iterator[TokenGroup]:
    """The groups with their reference log-probabilities."""
    lengths = [len(response) for group in groups for response in group.responses]
    widths = np.asarray(lengths if per_token else [1] * len(lengths), dtype=np.int32)
    starts = np.cumsum(widths, dtype=np.int64) - widths
    counts = np.array([len(group.responses) for group in groups], dtype=np.int32)
    sums = np.add.reduceat(values, starts, dtype=np.float64).astype(np.float32)
    tokens = pieces(values, widths)
    for group, own in zip(groups, pieces(sums, counts), strict=True):
        of_tokens = tuple(itertools.islice(tokens, len(own))) if per_token else None
        yield replace(group, reference_logps=own, reference_token_logps=of_tokens)


def _lock(cache: ReferenceCache, held: contextlib.ExitStack) -> bool:
    """Takes the cache's lock until ``held`` is left; False, and said, where that cannot be."""
    try:
        held.enter_context(cache.lock(on_wait=_say_waiting))
    except OSError as error:
        log.warning(
            "the reference cache %s cannot be used (%s): its rows are computed for this run "
            "alone; reference.cache_dir= names another folder",
            cache.path,
            error.strerror or error,
        )
        return False
    return True


def _say_waiting() -> None:
    log.info("waiting for another process that is computing reference log-probs")


def _keep_nothing(keys: npt.NDArray[np.uint8], logps: Any, lengths: Any) -> None:
    """Publishes nowhere."""


class _Publisher:
    """Writes to the cache; when its disk is full, says so and goes on without."""

    def __init__(self, cache: ReferenceCache) -> None:
        self._cache = cache
        self._broken = False

    def __call__(self, keys: npt.NDArray[np.uint8], logps: Any, lengths: Any) -> None:
        if self._broken:
            return
        try:
            self._cache.publish(keys, logps, lengths)
        except OSError as error:
            self._broken = True
            log.warning(
                "the reference cache %s cannot be written (%s): what is missing in it is computed "
                "for this run alone",
                self._cache.path,
                error.strerror or error,
            )


def _keys(
    groups: Sequence[TokenGroup],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Key (n, 16) and length (n,) of every response, group after group."""
    keys = b"".join(response_key(g.prompt, response) for g in groups for response in g.responses)
    lengths = [len(response) for group in groups for response in group.responses]
    return (
        np.frombuffer(keys, dtype=np.uint8).reshape(-1, 16),
        np.asarray(lengths, dtype=np.int32),
    )


def _responses(
    groups: Sequence[TokenGroup], missing: npt.NDArray[np.bool_]
) -> list[tuple[int, int]]:
    """Group and number in it of each missing response, in the order of the keys."""
    places = ((g, k) for g, group in enumerate(groups) for k in range(len(group.responses)))
    return [place for place, absent in zip(places, missing.tolist(), strict=True) if absent]


@dataclass(frozen=True, slots=True)
class _Work:
    """Different responses in groups of one prompt, and micro-batches of these.

    Attributes:
        unique: A group and the number of one of its responses, each different response once.
        members: Those that each pass group has.
        passes: The pass groups.
        micro_batches: Numbers of pass groups.
    """

    unique: Sequence[tuple[TokenGroup, int]]
    members: Sequence[Sequence[int]]
    passes: Sequence[TokenGroup]
    micro_batches: Sequence[Sequence[int]]

    @classmethod
    def of(cls, unique: Sequence[tuple[TokenGroup, int]], *, shared: bool, budget: int) -> _Work:
        """Responses of one prompt together, whichever groups they came from."""
        prompts: dict[bytes, list[int]] = {}
        for number, (group, _) in enumerate(unique):
            prompts.setdefault(group.prompt.tobytes(), []).append(number)
        members: list[list[int]] = []
        for numbers in prompts.values():
            members += [
                numbers[i : i + _PASS_RESPONSES] for i in range(0, len(numbers), _PASS_RESPONSES)
            ]
        passes = [_pass_group(unique, numbers) for numbers in members]
        costs = [group.tokens if shared else group.padded_tokens for group in passes]
        return cls(unique, members, passes, _in_budget(costs, budget))

    def length(self, number: int) -> int:
        """Tokens of a response."""
        group, place = self.unique[number]
        return len(group.responses[place])


@torch.no_grad()
def _compute(
    responses: Sequence[tuple[TokenGroup, int]],
    keys: npt.NDArray[np.uint8],
    model: Any,
    computing: _Computing,
    *,
    publish: Callable[..., None],
) -> Logps:
    """Log-probabilities of responses, or of their tokens, each different response computed once.

    Args:
        responses: A group and the number of one of its responses.
        keys: Their keys, (n, 16).
        model: The frozen model, on the device.
        computing: How.
        publish: Takes keys, values and lengths as they become known; rank 0's is called.

    Returns:
        The values of all responses end to end.
    """
    _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    unique = [responses[i] for i in first.tolist()]
    work = _Work.of(unique, shared=computing.scorer.shared, budget=computing.budget)
    values = [np.zeros(0, dtype=np.float32)] * len(unique)
    unpublished: list[int] = []
    last = began = time.monotonic()
    for done, rounds, found in _rounds(work, model, computing):
        for number, own in found:
            _check_finite(own, unique[number][0])
            values[number] = own
            unpublished.append(number)
        now = time.monotonic()
        is_first = computing.ranks is None or computing.ranks.rank == 0
        if unpublished and is_first and (now - last > _PUBLISH_SECONDS or done == rounds):
            last = now
            unpublished = sorted({*unpublished})
            publish(
                keys[first[unpublished]],
                np.concatenate([values[n] for n in unpublished]),
                np.asarray([work.length(n) for n in unpublished], dtype=np.int32),
            )
            unpublished = []
            if done < rounds:
                left = (now - began) / done * (rounds - done)
                log.info("reference: %d of %d, %ds left", done, rounds, left)
    return np.concatenate([values[n] for n in which.reshape(-1).tolist()])


def _rounds(
    work: _Work, model: Any, computing: _Computing
) -> Iterator[tuple[int, int, list[tuple[int, Logps]]]]:
    """Number of each round, of all rounds, and what is known after it of responses, by number."""
    ranks = computing.ranks
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    rounds = -(-len(work.micro_batches) // size)
    fresh: dict[int, Logps] = {}
    for done in range(1, rounds + 1):
        # A rank that has none left computes another's once more: all make each forward pass.
        place = min((done - 1) * size + rank, len(work.micro_batches) - 1)
        fresh |= _score(work, work.micro_batches[place], model, computing)
        found: list[tuple[int, Logps]] = []
        if ranks is None or done % _ROUNDS_APART == 0 or done == rounds:
            for part in [fresh] if ranks is None else ranks.gather(fresh):
                found += part.items()
            fresh = {}
        yield done, rounds, found


def _score(
    work: _Work, micro: Sequence[int], model: Any, computing: _Computing
) -> dict[int, Logps]:
    """Values of the responses of a micro-batch, by their numbers."""
    scorer, per_token = computing.scorer, computing.per_token
    batch = collate_groups([work.passes[i] for i in micro], micro).to(computing.device)
    with computing.precision():
        if per_token:
            logps = scorer.token_logps(model, batch, scorer.plan(batch))
        else:
            logps = scorer.logps(model, batch)
    widths = batch.lengths if per_token else torch.ones_like(batch.lengths)
    numbers = [number for i in micro for number in work.members[i]]
    found = pieces(logps.float().cpu().numpy(), widths.cpu().numpy())
    return dict(zip(numbers, found, strict=True))


def _in_budget(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Neighbours in length together, the longest first; of many rows a step's plan would be slow.

    Args:
        costs: Tokens of each group.
        budget: Most tokens of a micro-batch, unless it is a single group.
    """
    return pack_costs(sorted(range(len(costs)), key=lambda i: -costs[i]), costs, budget)


def _check_finite(values: npt.NDArray[np.float32], group: TokenGroup) -> None:
    broken = values[~np.isfinite(values)]
    if len(broken):
        raise UserError(
            f"reference: its log-probability of a response of {group.source} is {broken[0]}; "
            "name a sound model with reference.pretrained=, or compute in float32 "
            "(trainer.precision=32-true model.dtype=float32)"
        )


def _pass_group(unique: Sequence[tuple[TokenGroup, int]], numbers: Sequence[int]) -> TokenGroup:
    """Responses of one prompt as a group of which nothing is compared."""
    first, _ = unique[numbers[0]]
    chosen: list[Ids] = [unique[n][0].responses[unique[n][1]] for n in numbers]
    return replace(
        first,
        responses=tuple(chosen),
        ranks=(1,) * len(chosen),
        reference_logps=None,
        reference_token_logps=None,
    )
