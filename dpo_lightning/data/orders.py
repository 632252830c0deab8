"""Orders of a row's responses: by ranks, by scores, or by the name of the better one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from dpo_lightning.data.texts import RowError, describe, show

_TIES = frozenset({"tie", "tied", "equal", "both", "none", "same"})


def number(value: object, label: str) -> float:
    """A finite number.

    Raises:
        RowError: If it is none.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if math.isfinite(found):
            return found
    hint = " (without quotes)" if isinstance(value, str) else ""
    raise RowError(label, f"{describe(value)}, expected a finite number{hint}")


def list_of(value: object, label: str, size: int) -> list[object]:
    """A list with one number for each of ``size`` responses, its numbers not yet looked at."""
    if not isinstance(value, list):
        raise RowError(label, f"{describe(value)}, expected a list of {size} numbers")
    if len(value) != size:
        raise RowError(label, f"{describe(value)}, expected {size}, one for each response")
    return value


def ranks(values: Sequence[object], labels: Sequence[str]) -> list[int]:
    """Ranks as whole numbers from 1, 1 the best."""
    found = []
    for value, label in zip(values, labels, strict=True):
        whole = value
        # A table with a missing rank, and JavaScript, write whole numbers like this.
        if isinstance(value, float) and value.is_integer():
            whole = int(value)
        if isinstance(whole, bool) or not isinstance(whole, int) or whole < 1:
            raise RowError(label, f"{describe(value)}, expected a whole number, 1 or more")
        found.append(whole)
    return found


def scores(values: Sequence[object], labels: Sequence[str]) -> list[float]:
    """Sort keys, lowest is best, out of scores, of which the highest is best."""
    return [-number(value, label) for value, label in zip(values, labels, strict=True)]


def better(value: object, label: str, responses: Sequence[str]) -> list[int]:
    """Ranks out of the value that says which response is better.

    It is the name of a response's column; or the ending that tells the columns apart (``b`` of
    ``answer_b``, 1 of ``response_1``); or the place in a list of responses, from 0.

    Args:
        value: The value.
        label: The name of its column.
        responses: Names of the responses' columns, or labels of the items of one list.

    Raises:
        RowError: If it names no response.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().lower() if isinstance(value, str | int) else ""
    if isinstance(value, str) and (text in _TIES or text.startswith("tie ")):
        return [1] * len(responses)
    endings = _endings(responses)
    if text and not isinstance(value, bool):
        names = [name.lower() for name in responses]
        # "model_a" and "A" name "conversation_a" alike.
        ending = re.split(r"[^0-9a-z]", text)[-1]
        for known, wanted in ((names, text), (endings, text), (endings, ending)):
            if wanted and known.count(wanted) == 1:
                best = known.index(wanted)
                return [1 if at == best else 2 for at in range(len(responses))]
    expected = ", ".join(endings) if all(endings) else ", ".join(map(show, responses))
    raise RowError(label, f"{describe(value)}, expected the better response: {expected}, or tie")


def _endings(names: Sequence[str]) -> list[str]:
    """Endings that tell names apart, a number or a letter; empty where there are none.

    A number never stands for a place among columns without numbers: in some data 1 is the first of
    two, and in others the second.
    """
    found = [re.search(r"(\d+|(?<![A-Za-z])[A-Za-z]|(?<=[a-z])[A-Z])\]?$", name) for name in names]
    endings = [match.group(1).lower() if match else "" for match in found]
    return endings if len(set(endings)) == len(names) else [""] * len(names)
