"""Fixed blocks of responses, by which the reference's log-probabilities are computed and kept.

What a forward pass gives one row depends, in the last bits, on the rows beside it. So rows are put
together by their content alone: a block is what has the same leading bits of a hash, as many of
them as make it fit. It is the same whatever the order of the rows, whatever is known already, and
whoever computes it; another row touches the block that it falls into, and no other.

A run of few steps sees few training rows, from all over the data, and computes their blocks whole:
so a block has no more than what a device needs to be busy, and never both training and held-out
rows. A sample of these is in few blocks, as both go by the lots of prompts.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_lightning.data.held_out import LOTS, lot_of
from dpo_lightning.data.tokens import Ids, TokenGroup
from dpo_lightning.reference.cache import KEY_BYTES, Keys, Lengths, response_key

_PASS_RESPONSES = 16
"""Responses that share one prompt in a pass; more of them are another group."""

# Without gradients much more fits on a device at once than a micro-batch of training has.
_PASS_BUDGET = 4
# Any device is busy with so many tokens; more are rows that a short run computes in vain.
_MOST_TOKENS = 1 << 14
# With fewer tokens a CPU computes each slower, and a block, which is a claim and a file, is not
# worth these.
_LEAST_BLOCK_TOKENS = 1 << 10

Places = npt.NDArray[np.int64]
Lots = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Responses:
    """The different responses of a data set, each once, in the order of their keys.

    Attributes:
        groups: The data set.
        group: Number of a group that has each, shape (n,).
        place: Its number in that group, shape (n,).
        keys: Shape (n, 16).
        lengths: Tokens of each, shape (n,).
        part: Number of the part of the data set that each counts to, shape (n,): of those that
            have it the last.
        lots: Lowest lot of the prompts of the groups that have each, shape (n,).
        which: Which of them each response of the groups is, group after group, shape (N,).
        first: Where a group's responses begin in ``which``, shape (groups + 1,).
    """

    groups: Sequence[TokenGroup]
    group: Places
    place: Places
    keys: Keys
    lengths: Lengths
    part: Places
    lots: Lots
    which: Places
    first: Places

    @classmethod
    def of(cls, *parts: Sequence[TokenGroup]) -> Responses:
        """The responses of groups, part after part."""
        groups = [group for part in parts for group in part]
        data = b"".join(response_key(g.prompt, own) for g in groups for own in g.responses)
        keys = np.frombuffer(data, dtype=np.uint8).reshape(-1, KEY_BYTES)
        counts = np.array([len(group.responses) for group in groups], dtype=np.int64)
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        unique, where, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        which = which.reshape(-1)
        part = np.zeros(len(unique), dtype=np.int64)
        numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        np.maximum.at(part, which, np.repeat(numbers, counts))
        lots = np.full(len(unique), LOTS - 1, dtype=np.uint64)
        of_groups = np.array([lot_of(group.prompt_key) for group in groups], dtype=np.uint64)
        np.minimum.at(lots, which, np.repeat(of_groups, counts))
        owner = np.repeat(np.arange(len(groups)), counts)[where]
        place = where - first[owner]
        lengths = [
            len(groups[g].responses[k]) for g, k in zip(owner.tolist(), place.tolist(), strict=True)
        ]
        return cls(
            groups,
            owner,
            place,
            unique,
            np.array(lengths, dtype=np.int32),
            part,
            lots,
            which,
            first,
        )

    def __len__(self) -> int:
        return len(self.keys)

    def of_group(self, number: int) -> Places:
        """The responses of a group, in its order, shape (K,)."""
        return self.which[self.first[number] : self.first[number + 1]]

    def prompt(self, number: int) -> Ids:
        """Ids of the prompt of a response."""
        return self.groups[int(self.group[number])].prompt

    def source(self, number: int) -> str:
        """Origin of a row that has a response."""
        return self.groups[int(self.group[number])].source


@dataclass(frozen=True, slots=True)
class Block:
    """Responses that are computed and kept together.

    Attributes:
        name: Hash of their keys, and of where a micro-batch ends.
        start: Place of the first of them in the plan's order.
        ends: Place behind each micro-batch.
    """

    name: str
    start: int
    ends: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Place behind the last of them."""
        return self.ends[-1]


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The blocks of a data set; every response is in one of them.

    Attributes:
        responses: The different responses.
        order: Numbers of these, block after block, shape (n,).
        blocks: The blocks.
        block_of: Number of the block of each response, shape (n,).
    """

    responses: Responses
    order: Places
    blocks: Sequence[Block]
    block_of: Places

    def members(self, number: int) -> Places:
        """Numbers of a block's responses, in their order."""
        block = self.blocks[number]
        return self.order[block.start : block.stop]

    def count(self, numbers: Iterable[int]) -> int:
        """Responses of some blocks."""
        return sum(self.blocks[n].stop - self.blocks[n].start for n in numbers)

    def passes(self, number: int, micro: int) -> list[TokenGroup]:
        """A micro-batch of a block as groups, of one prompt each, in which nothing is compared."""
        block = self.blocks[number]
        start = block.start if micro == 0 else block.ends[micro - 1]
        found = []
        for numbers in _of_one_prompt(self.responses, self.order[start : block.ends[micro]]):
            for i in range(0, len(numbers), _PASS_RESPONSES):
                found.append(_pass_group(self.responses, numbers[i : i + _PASS_RESPONSES]))
        return found

    def needed(self, wanted: npt.NDArray[np.bool_]) -> list[int]:
        """Numbers of the blocks that have a response of a wanted group.

        Args:
            wanted: True for these groups, shape (groups,).
        """
        counts = np.diff(self.responses.first)
        found: list[int] = np.unique(
            self.block_of[self.responses.which[np.repeat(wanted, counts)]]
        ).tolist()
        return found


def pass_tokens(micro_batch_tokens: int) -> int:
    """Most tokens of a forward pass without gradients.

    As many as a micro-batch of training has, which is what the device likes, or more where these
    are very few. Powers of two, so that devices and settings that differ a little have the same
    blocks.

    Args:
        micro_batch_tokens: What the device holds at once in training.
    """
    liked = max(micro_batch_tokens, _LEAST_BLOCK_TOKENS)
    most = min(_MOST_TOKENS, _PASS_BUDGET * micro_batch_tokens, liked)
    return 1 << (max(1, most).bit_length() - 1)


def plan_blocks(responses: Responses, *, shared: bool, micro_batch_tokens: int) -> BlockPlan:
    """Puts responses into blocks; the result depends on the arguments' content alone.

    Args:
        responses: All of a data set, also those that nobody asks for.
        shared: True if a prompt is computed once for all its responses.
        micro_batch_tokens: What the device holds at once in training.

    Returns:
        Blocks of at most :func:`pass_tokens`, or 1,024 tokens if that is more, cut into
        micro-batches of at most the first; a single response may have more. Each is of one part.
    """
    tree = _Tree(responses, shared=shared)
    budget = pass_tokens(micro_batch_tokens)
    blocks: list[Block] = []
    block_of = np.zeros(len(responses), dtype=np.int64)
    for first, last in tree.parts():
        for start, stop in tree.leaves(first, last, max(budget, _LEAST_BLOCK_TOKENS)):
            ends = tuple(end for _, end in tree.leaves(start, stop, budget))
            block_of[tree.order[start:stop]] = len(blocks)
            blocks.append(Block(_name(responses, tree.order, start, ends), start, ends))
    return BlockPlan(responses, tree.order, blocks, block_of)


def _name(responses: Responses, order: Places, start: int, ends: Sequence[int]) -> str:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for end in ends:
        digest.update((end - start).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(responses.keys[order[start:end]]).tobytes())
        start = end
    return digest.hexdigest()


class _Tree:
    """Responses in the order of their addresses, whose leading bits decide who is together.

    An address is the part of the data set; the length of a prompt's longest sequence, to about a
    half; the prompt's lot; a hash of the prompt; the key of the response. So like lengths are
    together, then the lowest lots, then the responses of one prompt.

    Args:
        responses: The responses.
        shared: True if a prompt is computed once for all its responses.

    Attributes:
        order: Numbers of the responses by address.
    """

    def __init__(self, responses: Responses, *, shared: bool) -> None:
        prompts, prompt_of = _different_prompts(responses)
        parts = np.zeros(len(prompts), dtype=np.int64)
        parts[prompt_of] = responses.part
        lots = np.full(len(prompts), LOTS - 1, dtype=np.uint64)
        np.minimum.at(lots, prompt_of, responses.lots)
        widths = np.zeros(len(prompts), dtype=np.int64)
        sizes = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        np.maximum.at(widths, prompt_of, sizes[prompt_of] + responses.lengths)
        heads = [
            (((part << 8 | _length_class(width)) * LOTS + lot) << 8 * KEY_BYTES) | _hash(prompt)
            for part, width, lot, prompt in zip(
                parts.tolist(), widths.tolist(), lots.tolist(), prompts, strict=True
            )
        ]
        keys = (int.from_bytes(key.tobytes(), "big") for key in responses.keys)
        addresses = [
            (heads[prompt] << 8 * KEY_BYTES) | key
            for prompt, key in zip(prompt_of.tolist(), keys, strict=True)
        ]
        order = sorted(range(len(addresses)), key=addresses.__getitem__)
        self.order: Places = np.array(order, dtype=np.int64)
        self._addresses = [addresses[i] for i in order]
        self._parts = responses.part[self.order]
        self._prompts = prompt_of[self.order]
        self._sizes = sizes
        self._shared = shared
        lengths = responses.lengths[self.order].astype(np.int64)
        self._responses = _running(lengths)
        own = sizes[self._prompts]
        if shared:
            own = np.where(self._numbers_in_prompt() % _PASS_RESPONSES == 0, own, 0)
        self._whole = _running(lengths + own)

    def _numbers_in_prompt(self) -> Places:
        """Number of each among the responses of its prompt, which stand together."""
        starts = np.flatnonzero(np.diff(self._prompts, prepend=-1))
        counts = np.diff(np.append(starts, len(self._prompts)))
        return np.arange(len(self._prompts)) - np.repeat(starts, counts)

    def parts(self) -> list[tuple[int, int]]:
        """The first place of each part, and the one behind its last."""
        ends = [0, *(np.flatnonzero(np.diff(self._parts)) + 1).tolist(), len(self._parts)]
        return [*pairwise(ends)]

    def leaves(self, start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
        """Cuts places into parts of at most so many tokens, or of one response.

        Args:
            start: The first place,
            stop: and the one behind the last.
            most: Tokens.
        """
        left = [(start, stop)] if stop > start else []
        while left:
            low, high = left.pop()
            if high - low == 1 or self._tokens(low, high) <= most:
                yield low, high
                continue
            first, last = self._addresses[low], self._addresses[high - 1]
            bit = (first ^ last).bit_length() - 1
            middle = bisect.bisect_left(self._addresses, (last >> bit) << bit, low, high)
            left += [(middle, high), (low, middle)]

    def _tokens(self, low: int, high: int) -> int:
        """Tokens of neighbours: of whole prompts, or of some responses of one."""
        prompt = self._prompts[low]
        if self._shared and prompt == self._prompts[high - 1]:
            passes = -(-(high - low) // _PASS_RESPONSES)
            own = self._responses[high] - self._responses[low]
            return int(own + passes * self._sizes[prompt])
        return int(self._whole[high] - self._whole[low])


def _running(values: Places) -> Places:
    """Sums of the first 0, 1, … n values, shape (n + 1,)."""
    return np.concatenate([[0], np.cumsum(values)]).astype(np.int64)


def _different_prompts(responses: Responses) -> tuple[list[Ids], Places]:
    """The different prompts of each part, and which each response has, shape (n,)."""
    numbers: dict[tuple[int, bytes], int] = {}
    prompts: list[Ids] = []
    which = np.zeros(len(responses), dtype=np.int64)
    for i, part in enumerate(responses.part.tolist()):
        prompt = responses.prompt(i)
        number = numbers.setdefault((part, prompt.tobytes()), len(prompts))
        if number == len(prompts):
            prompts.append(prompt)
        which[i] = number
    return prompts, which


def _hash(prompt: Ids) -> int:
    data = np.ascontiguousarray(prompt, dtype="<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=KEY_BYTES).digest(), "big")


def _length_class(width: int) -> int:
    """A number that lengths have in common up to a half: 4–5, 6–7, 8–11, 12–15, 16–23."""
    bits = width.bit_length()
    return 2 * bits + (width >> max(0, bits - 2) & 1)


def _of_one_prompt(responses: Responses, numbers: Places) -> Iterator[list[int]]:
    """Neighbours that have one prompt, together."""
    together: list[int] = []
    before: Any = None
    for number in numbers.tolist():
        prompt = responses.prompt(number).tobytes()
        if together and prompt != before:
            yield together
            together = []
        together.append(number)
        before = prompt
    if together:
        yield together


def _pass_group(responses: Responses, numbers: Sequence[int]) -> TokenGroup:
    """Responses of one prompt as a group of which nothing is compared."""
    chosen = [
        responses.groups[int(responses.group[n])].responses[int(responses.place[n])]
        for n in numbers
    ]
    return replace(
        responses.groups[int(responses.group[numbers[0]])],
        responses=tuple(chosen),
        ranks=(1,) * len(chosen),
        reference_logps=None,
        reference_token_logps=None,
    )
