"""Labels of single answers: desirable, undesirable, or not rated, which is neither."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dpo_lightning.data import orders
from dpo_lightning.data.texts import RowError, describe
from dpo_lightning.errors import UserError

_PAIRS = (
    *("true false", "yes no", "up down", "thumbsup thumbsdown", "thumbup thumbdown"),
    *("upvote downvote", "upvoted downvoted", "like dislike", "liked disliked", "good bad"),
    *("positive negative", "desirable undesirable", "chosen rejected", "👍 👎"),
)
_DESIRABLE, _UNDESIRABLE = (frozenset(pair.split()[side] for pair in _PAIRS) for side in (0, 1))
_AS_TEXT = {"1": 1, "+1": 1, "0": 0, "-1": -1}

_EXPECTED = "true or false, 1 or 0, 1 or -1, up or down; null is not rated"
_PLAIN_NUMBERS = (0.0, 1.0, -1.0)
_MOST_NUMBERS = 1000

MOST_TO_ONE = 4.0
"""Desirable answers for each undesirable one, or the other way round, that nothing is said of."""

_HIGHEST_SHARE = 4 / 3
"""Most desirable weight for each undesirable one by TRL's rule; the least is 1."""


class LabelReader:
    """Reads labels of one source, whose numbers have one meaning in all of its rows.

    Args:
        threshold: Least number that is desirable, ``data.threshold``; None where labels are 0 and
            1, or -1 and 1, if they are numbers.

    Attributes:
        by_threshold: Labels that were compared with the threshold.
    """

    def __init__(self, threshold: float | None) -> None:
        self.by_threshold = 0
        self._threshold = threshold
        self._places: dict[float, str] = {}

    def read(self, value: object, field: str, source: str) -> bool | None:
        """The label of an answer: True is desirable; None if it is not rated.

        Args:
            value: The value of the row.
            field: The name of its column, for errors.
            source: ``file:line`` of the row.

        Raises:
            RowError: If it is neither clearly one nor the other.
        """
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            word = _word(value)
            if not word:
                return None
            if word in _DESIRABLE or word in _UNDESIRABLE:
                return word in _DESIRABLE
            number = _AS_TEXT.get(word)
            if number is None:
                raise RowError(field, f"{describe(value)}, expected {_EXPECTED}")
            value = number
        if not isinstance(value, int | float):
            raise RowError(field, f"{describe(value)}, expected {_EXPECTED}")
        return self._number(orders.number(value, field), f"{source}: {field}")

    def _number(self, number: float, place: str) -> bool:
        if self._threshold is not None:
            self.by_threshold += 1
            return number >= self._threshold
        if len(self._places) < _MOST_NUMBERS:
            self._places.setdefault(number, place)
        # Other numbers stop the source as a whole, when all of them are known.
        return number > 0

    def check(self) -> None:
        """Looks at the numbers of all rows together.

        Raises:
            UserError: If they do not say by themselves which of them is desirable.
        """
        found = self._places
        other = [number for number in found if number not in _PLAIN_NUMBERS]
        if other:
            low, high = min(found), max(found)
            raise UserError(
                f"{found[other[0]]}: the number {other[0]:g}; ratings from {low:g} to {high:g} do "
                "not say which of them is desirable: name the least one that is, such as "
                f"data.threshold={_likely(low, high):g}"
            )
        if 0 in found and -1 in found:
            raise UserError(
                f"{found[0]}: the number 0, and -1 in {found[-1]}: beside -1 a 0 may be "
                "undesirable or not rated; write null for what is not rated, or make both "
                "undesirable with data.threshold=1"
            )


def _word(text: str) -> str:
    """A label in small letters, without what parts its words, and without shades of a hand."""
    text = re.sub("[\ufe0f\U0001f3fb-\U0001f3ff]", "", text.strip().casefold())
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", "", text)


def _likely(low: float, high: float) -> float:
    """A threshold that ratings between two numbers may have: 4 of 5 stars."""
    if low >= 1 and high <= 5:
        return 4
    likely = low + 0.7 * (high - low)
    return math.ceil(likely) if high - low > 2 else round(likely, 2)


# Both kinds together -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """Answers of a set by their label.

    Attributes:
        desirable: Those that are desirable.
        undesirable: Those that are not.
    """

    desirable: int = 0
    undesirable: int = 0

    @classmethod
    def of(cls, labels: Iterable[bool | None]) -> LabelCounts:
        """Counts labels; groups that compare answers have None, which is not counted."""
        known = [label for label in labels if label is not None]
        return cls(sum(known), len(known) - sum(known))

    @property
    def total(self) -> int:
        """All of them."""
        return self.desirable + self.undesirable

    def as_dict(self) -> dict[str, int]:
        """The entry of a JSON object."""
        return {"desirable": self.desirable, "undesirable": self.undesirable}

    def __str__(self) -> str:
        """Both numbers in words."""
        return f"{self.desirable:,} desirable, {self.undesirable:,} undesirable"


def imbalance(counts: LabelCounts, weights: Sequence[float] | None, *, pairs: int = 0) -> str:
    """A line about labels that are mostly of one kind; empty where there is nothing to say.

    Args:
        counts: Labels of the training rows.
        weights: ``loss.desirable_weight`` and ``loss.undesirable_weight``; None where the loss has
            none.
        pairs: Pairs beside them, each of which has an answer of either kind.
    """
    if not counts.total:
        return ""
    sides = {"desirable": counts.desirable + pairs, "undesirable": counts.undesirable + pairs}
    few, many = sorted(sides, key=sides.__getitem__)
    if not sides[few]:
        return (
            f"data.train: all {sides[many]:,} labelled answers are {many}: nothing shows the "
            f"policy what is {few}"
        )
    own = dict(zip(("desirable", "undesirable"), weights or (1.0, 1.0), strict=True))
    mass = {side: own[side] * sides[side] for side in sides}
    if not min(mass.values()) or max(mass.values()) <= MOST_TO_ONE * min(mass.values()):
        return ""
    ratio = max(mass.values()) / min(mass.values())
    weighted = " by their weights" if mass != sides else ""
    said = (
        f"data.train: {sides['desirable']:,} desirable and {sides['undesirable']:,} undesirable "
        f"answers, {ratio:.0f} to 1{weighted}"
    )
    if weights is None:
        return said
    equal = mass[many] / sides[few]
    end = equal * _HIGHEST_SHARE if few == "desirable" else equal / _HIGHEST_SHARE
    low, high = sorted((equal, end))
    return (
        f"{said}: weigh them so that desirable to undesirable is from 1:1 to 4:3, with "
        f"loss.{few}_weight={low:.3g} to {high:.3g}"
    )
