"""Lengths of a data set's groups, as far as the memory of a step depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_lightning.data.tokens import TokenGroup

Shape = tuple[int, ...]
"""(|P|, |y_1|, ..., |y_K|) of a group."""

# Of a prompt, and of both responses together, where nothing is known of the data.
_ASSUMED = 512


@dataclass(frozen=True, slots=True)
class GroupLengths:
    """Groups that micro-batches are made of.

    Attributes:
        usual: Shape of the groups that fill a micro-batch.
        longest: That of the longest group, which may be a micro-batch of its own.
        shared: True if a prompt is computed once for its responses.
    """

    usual: Shape
    longest: Shape
    shared: bool = True

    @classmethod
    def assumed(cls, longest: int) -> GroupLengths:
        """Lengths where nothing is known of the data: a prompt, and two responses half as long.

        Args:
            longest: Most tokens of a prompt with a response.
        """
        prompt = max(2, min(_ASSUMED, longest * 2 // 3))
        shape = (prompt, prompt // 2, prompt // 2)
        return cls(shape, shape)

    @classmethod
    def of(cls, groups: Sequence[TokenGroup], *, shared: bool) -> GroupLengths:
        """Lengths of a data set.

        A token of a usual group meets as many others as one of the data does in the mean: lengths
        are means in which each group counts by its length.

        Args:
            groups: All that is computed.
            shared: True if a prompt is computed once for its responses.
        """
        shapes = [(len(g.prompt), *map(len, g.responses)) for g in groups]
        prompt = _own_mean([shape[0] for shape in shapes])
        response = _own_mean([length for shape in shapes for length in shape[1:]])
        count = round(sum(len(shape) - 1 for shape in shapes) / len(shapes))
        longest = max(shapes, key=lambda shape: _cost(shape, shared=shared))
        return cls((prompt, *[response] * max(2, count)), longest, shared)

    @property
    def most(self) -> int:
        """Tokens of the longest group."""
        return _cost(self.longest, shared=self.shared)

    def fill(self, tokens: int) -> tuple[Shape, ...]:
        """Groups of that many tokens in all; the longest by itself where it has just so many."""
        if tokens == self.most:
            return (self.longest,)
        one = _cost(self.usual, shared=self.shared)
        count = max(1, round(tokens / one))
        # As many tokens as were asked for, in groups of nearly one shape.
        left, found = tokens, []
        for number in range(count, 0, -1):
            share = round(left / number)
            found.append(_scaled(self.usual, share / one))
            left -= _cost(found[-1], shared=self.shared)
        return tuple(found)


def _cost(shape: Sequence[int], *, shared: bool) -> int:
    prompt, *responses = shape
    return sum(shape) if shared else sum(prompt + length for length in responses)


def _own_mean(lengths: Sequence[int]) -> int:
    """Mean length of that in which a token stands."""
    return max(1, round(sum(n * n for n in lengths) / max(1, sum(lengths))))


def _scaled(shape: Shape, factor: float) -> Shape:
    """A group with all its parts longer or shorter; what rounding leaves is the prompt's."""
    rest = [max(1, round(factor * length)) for length in shape[1:]]
    return (max(1, round(factor * sum(shape)) - sum(rest)), *rest)
