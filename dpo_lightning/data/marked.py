"""Groups made of answers that a judge marked: who is compared with whom, and who is better. Pure.

Labels are the order of the marks, or drawn from it: of two answers the first is better with
probability sigma(m_1 - m_2) (Bradley and Terry 1952), and a ranking is that of marks with Gumbel
noise (Plackett 1975, Luce 1959), of which two answers are the same case. Each draw is a hash of
seed, round, prompt, answers and their numbers: never of the order of the prompts.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, Literal

import numpy as np

from dpo_lightning.data.tokens import Ids, TokenGroup

How = Literal["pairs", "best_worst", "ranking", "margin"]
Noise = Literal["none", "bradley_terry"]

WHY_DROPPED = {
    "unmarked": "answers without a mark",
    "duplicate_answer": "answers that repeat another one to their prompt",
    "alone": "answers without another one to be compared with",
    "tie": "pairs or rankings whose marks are all equal",
    "below_margin": "pairs or rankings whose marks differ by less than rounds.min_margin",
}
"""What may be dropped on the way from answers to groups, by the name of its count."""

_END = 16


@dataclass(frozen=True, slots=True)
class MarkedPrompt:
    """A prompt with its answers and their marks.

    Attributes:
        prompt_key: Identifies the prompt's text.
        prompt: Its token ids, (P,), int32.
        answers: Token ids of the K answers, shapes (R_k,), int32, with the token that ended each.
        texts: The answers as a judge reads them.
        marks: Mark of each answer, more is better; None, or not finite: it has none.
        source: Origin of the prompt, ``file:line``.
    """

    prompt_key: str
    prompt: Ids
    answers: tuple[Ids, ...]
    texts: tuple[str, ...]
    marks: tuple[float | None, ...]
    source: str

    def __post_init__(self) -> None:
        if not len(self.answers) == len(self.texts) == len(self.marks):
            raise ValueError(
                f"{self.source}: {len(self.answers)} answers, {len(self.texts)} texts and "
                f"{len(self.marks)} marks"
            )


@dataclass(frozen=True, slots=True)
class MarkedGroup:
    """A group, and the marks and the prompt that it was made of.

    Attributes:
        group: The group, best response first.
        texts: Its responses as a judge reads them.
        marks: Their marks: with noise not always falling.
        numbers: Which of the prompt's answers they are, from 0.
        asked: Origin of the prompt, ``file:line``.
    """

    group: TokenGroup
    texts: tuple[str, ...]
    marks: tuple[float, ...]
    numbers: tuple[int, ...]
    asked: str


def make_groups(
    marked: Sequence[MarkedPrompt],
    *,
    how: How,
    min_margin: float,
    noise: Noise,
    seed: int,
    round: int,
) -> tuple[list[TokenGroup], dict[str, int]]:
    """The groups of :func:`mark_groups` alone, and the same counts."""
    found, dropped = mark_groups(
        marked, how=how, min_margin=min_margin, noise=noise, seed=seed, round=round
    )
    return [own.group for own in found], dropped


def mark_groups(
    marked: Sequence[MarkedPrompt],
    *,
    how: How,
    min_margin: float,
    noise: Noise,
    seed: int,
    round: int,
) -> tuple[list[MarkedGroup], dict[str, int]]:
    """Makes groups of marked answers; those of one prompt stand together, in the prompts' order.

    Args:
        marked: The prompts.
        how: ``pairs``: answers in disjoint pairs, drawn without a look at their marks;
            ``best_worst``: the best with the worst; ``margin``: every pair; ``ranking``: all.
        min_margin: Pairs, and rankings from end to end, whose marks differ by less are dropped.
        noise: ``none``: the marks are the order, and equal ones are ties, which are dropped as
            pairs and share a rank in a ranking; ``bradley_terry``: the order is drawn.
        seed: Of all draws.
        round: Number of the round, from 1; a draw of one says nothing of those of another.

    Returns:
        The groups, each with the line that it has in the round's file as its source, and what was
        dropped, by the names of ``WHY_DROPPED``.
    """
    found: list[MarkedGroup] = []
    dropped: Counter[str] = Counter()
    for prompt, dice in _with_dice(marked, seed, round):
        for numbers, ranks in _rankings(prompt, how, min_margin, noise, dice, dropped):
            found.append(_group(prompt, numbers, ranks, f"rounds/{round}.jsonl:{len(found) + 1}"))
    return found, {name: dropped[name] for name in WHY_DROPPED if dropped[name]}


def pair_numbers(
    marked: Sequence[MarkedPrompt], *, seed: int, round: int
) -> list[list[tuple[int, int]]]:
    """The disjoint pairs of each prompt's answers that ``how="pairs"`` compares.

    They do not depend on marks, so that a judge that compares can be asked for these alone.

    Args:
        marked: The prompts.
        seed: Of all draws.
        round: Number of the round, from 1.

    Returns:
        For each prompt pairs of numbers of its answers, the smaller one first.
    """
    return [
        _disjoint_pairs(_different(prompt), dice)
        for prompt, dice in _with_dice(marked, seed, round)
    ]


def text_behind(tokenizer: Any, prompt: Ids, answer: Ids) -> str:
    """An answer's text as it follows its prompt, with the space that may be between them.

    Some tokenizers write no space before the first word of a text. Special tokens are left out.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: Token ids, (P,).
        answer: Token ids, (R,).
    """
    # The end of a prompt is enough to see how words are joined, and quick to write out.
    end = prompt[-_END:].tolist()
    before: str = tokenizer.decode(end, skip_special_tokens=True)
    whole: str = tokenizer.decode([*end, *answer.tolist()], skip_special_tokens=True)
    if whole.startswith(before):
        return whole[len(before) :]
    alone: str = tokenizer.decode(answer.tolist(), skip_special_tokens=True)
    return alone


# Draws -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Dice:
    """Draws for one prompt.

    Attributes:
        seed: Of all draws.
        round: Number of the round.
        content: Hash of the prompt and its answers.
        turn: How many prompts of this content were there before.
    """

    seed: int
    round: int
    content: bytes
    turn: int

    def uniform(self, purpose: str, *numbers: int) -> float:
        """A number between 0 and 1, neither of them, for answers of these numbers."""
        text = f"{self.seed}:{self.round}:{self.turn}:{purpose}:{numbers}:".encode()
        digest = hashlib.blake2b(text + self.content, digest_size=8).digest()
        # 52 bits and a half: exact, and never rounded up to 1.
        return ((int.from_bytes(digest, "big") >> 12) + 0.5) * 2.0**-52

    def is_better(self, difference: float, first: int, second: int) -> bool:
        """True with probability sigma(difference): u < sigma(d) where logit(u) < d."""
        u = self.uniform("label", first, second)
        return math.log(u) - math.log1p(-u) < difference

    def gumbel(self, number: int) -> float:
        """A draw of the standard Gumbel distribution for one answer."""
        return -math.log(-math.log(self.uniform("gumbel", number)))


def _with_dice(
    marked: Sequence[MarkedPrompt], seed: int, round: int
) -> Iterator[tuple[MarkedPrompt, _Dice]]:
    """Yields each prompt with its draws."""
    met: Counter[bytes] = Counter()
    for prompt in marked:
        content = _content(prompt)
        # Of prompts that are alike in everything each draws for itself.
        yield prompt, _Dice(seed, round, content, met[content])
        met[content] += 1


def _content(prompt: MarkedPrompt) -> bytes:
    """A hash of a prompt and its answers: of all that tells it from another."""
    digest = hashlib.blake2b(digest_size=16)
    key = prompt.prompt_key.encode(errors="surrogatepass")
    for part in (key, *(_bytes(ids) for ids in (prompt.prompt, *prompt.answers))):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def _bytes(ids: Ids) -> bytes:
    return np.ascontiguousarray(ids, dtype="<i4").tobytes()


# Rankings ----------------------------------------------------------------------------------------

_Ranking = tuple[tuple[int, ...], tuple[int, ...]]
"""Numbers of answers, best first, and the rank of each."""


def _rankings(
    prompt: MarkedPrompt,
    how: How,
    min_margin: float,
    noise: Noise,
    dice: _Dice,
    dropped: Counter[str],
) -> list[_Ranking]:
    """The rankings of one prompt; what is dropped is counted."""
    known = {
        number: float(mark)
        for number, mark in enumerate(prompt.marks)
        if mark is not None and math.isfinite(mark)
    }
    different = _different(prompt)
    usable = [number for number in different if number in known]
    dropped["unmarked"] += len(prompt.marks) - len(known)
    dropped["duplicate_answer"] += len(known.keys() - {*different})
    chosen: Sequence[tuple[int, ...]]
    if how == "pairs":
        chosen = [pair for pair in _disjoint_pairs(different, dice) if known.keys() >= {*pair}]
        dropped["alone"] += len(usable) - 2 * len(chosen)
    elif len(usable) < 2:
        dropped["alone"] += len(usable)
        return []
    elif how == "ranking":
        chosen = [tuple(usable)]
    elif how == "margin":
        chosen = [*combinations(usable, 2)]
    else:
        # Of equal ones the first: answers have no order of their own.
        ends = (max(usable, key=known.__getitem__), min(usable, key=known.__getitem__))
        chosen = [tuple(sorted(ends)) if ends[0] != ends[1] else tuple(usable[:2])]
    found = []
    for numbers in chosen:
        marks = [known[number] for number in numbers]
        spread = max(marks) - min(marks)
        if noise == "none" and spread == 0:
            dropped["tie"] += 1
        elif spread < min_margin:
            dropped["below_margin"] += 1
        else:
            found.append(_ranked(numbers, marks, noise, dice))
    return found


def _different(prompt: MarkedPrompt) -> list[int]:
    """Numbers of the answers that repeat none before them."""
    met: set[bytes] = set()
    found = []
    for number, ids in enumerate(prompt.answers):
        content = _bytes(ids)
        if content not in met:
            met.add(content)
            found.append(number)
    return found


def _disjoint_pairs(numbers: Sequence[int], dice: _Dice) -> list[tuple[int, int]]:
    """Neighbours in a drawn order of the answers; of an odd number one is left over."""
    order = sorted(numbers, key=lambda number: (dice.uniform("place", number), number))
    return [(min(pair), max(pair)) for pair in zip(order[0::2], order[1::2], strict=False)]


def _ranked(
    numbers: tuple[int, ...], marks: Sequence[float], noise: Noise, dice: _Dice
) -> _Ranking:
    """The order of some answers by their marks, drawn where there is noise."""
    if noise == "none":
        order = sorted(range(len(numbers)), key=lambda place: -marks[place])
        ranks = [1]
        for one, other in pairwise(order):
            ranks.append(ranks[-1] + (marks[one] != marks[other]))
        return tuple(numbers[place] for place in order), tuple(ranks)
    if len(numbers) == 2:
        first, second = numbers
        if dice.is_better(marks[0] - marks[1], first, second):
            return (first, second), (1, 2)
        return (second, first), (1, 2)
    noisy = [mark + dice.gumbel(number) for number, mark in zip(numbers, marks, strict=True)]
    order = sorted(range(len(numbers)), key=lambda place: -noisy[place])
    return tuple(numbers[place] for place in order), tuple(range(1, len(numbers) + 1))


def _group(
    prompt: MarkedPrompt, numbers: tuple[int, ...], ranks: tuple[int, ...], source: str
) -> MarkedGroup:
    group = TokenGroup(
        prompt=prompt.prompt,
        responses=tuple(prompt.answers[number] for number in numbers),
        ranks=ranks,
        weight=1.0,
        source=source,
        prompt_key=prompt.prompt_key,
    )
    marks = [prompt.marks[number] for number in numbers]
    return MarkedGroup(
        group,
        tuple(prompt.texts[number] for number in numbers),
        tuple(float(mark) for mark in marks if mark is not None),
        numbers,
        prompt.source,
    )
