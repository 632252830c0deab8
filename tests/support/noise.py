"""The noise of draws, written out with Python's whole numbers, one at a time."""

import math

_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15


def _mixed(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def wait(key: int, counter: int, place: int) -> float:
    """A waiting time of a key."""
    own = _mixed((key + (counter + 1) * _STEP) & _MASK)
    bits = _mixed((own + (place + 1) * _STEP) & _MASK) >> 12
    return -math.log((bits + 0.5) / 2**52)


def race(scores: list[float], key: int, step: int, temperature: float) -> int:
    """The token that wins: first among blocks, then inside the one that won."""
    top = max(scores)
    weights = [math.exp((score - top) / temperature) for score in scores]
    # The power of 2 whose square is the least that has room for all tokens, or for half of them.
    width = 2 ** math.ceil(math.ceil(math.log2(len(scores))) / 2) if len(scores) > 1 else 1
    blocks = [weights[start : start + width] for start in range(0, len(weights), width)]
    block = _first([sum(own) for own in blocks], key, 2 * step)
    return block * width + _first(blocks[block], key, 2 * step + 1)


def _first(rates: list[float], key: int, counter: int) -> int:
    times = [
        wait(key, counter, place) / rate if rate else math.inf for place, rate in enumerate(rates)
    ]
    return times.index(min(times))
