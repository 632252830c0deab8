"""Rows that repeat, contradict or hide each other, counted by the text alone. Imports no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

from dpo_lightning.data.groups import PreferenceGroup
from dpo_lightning.data.splits import shared_text
from dpo_lightning.data.texts import HUMAN, Text
from dpo_lightning.data.tokens import TokenGroup

SAID = {
    "identical_pairs": "pairs whose chosen equals the rejected response",
    "near_identical_pairs": "further pairs that differ in case, spaces and punctuation alone",
    "contradictions": "pairs of one prompt that rows order both ways",
    "contradictory_labels": "answers to one prompt that rows call desirable and undesirable",
    "duplicates": "rows that repeat an earlier row (prompt, responses and order or label)",
    "repeated_prompts": "rows whose prompt an earlier row has",
    "prefixes": "rows in which a response begins another",
    "empty_responses": "rows with an empty response",
    "several_turns": "rows with a response of several turns: they differ before the last turn",
    "long_conversations": "rows whose prompt has several turns of the user",
    "tied": "rows whose responses are all tied",
}
"""Kinds of oddities with what is counted, in the order in which they are shown."""

_PLACES = 5


@dataclass(slots=True)
class Oddity:
    """Rows or pairs of one kind.

    Attributes:
        count: How many there are.
        places: ``file:line`` of the first ones.
    """

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str, count: int = 1) -> None:
        """Counts one more row, or several pairs of it."""
        if not count:
            return
        self.count += count
        if len(self.places) < _PLACES and place not in self.places:
            self.places.append(place)

    def as_dict(self) -> dict[str, Any]:
        """The entry of the JSON object."""
        return {"count": self.count, "places": self.places}


@dataclass(frozen=True, slots=True)
class Told:
    """A row as far as rows are compared.

    Attributes:
        prompt: Identifies the prompt.
        responses: The responses, best first; equal ones are one text.
        ranks: Their ranks.
        texts: The responses as strings, for what is looked for inside of them.
        turns: The most turns that a response has.
        asked: Turns of the user in the prompt.
        place: ``file:line``.
        label: Of a single response, if it is desirable; None where responses are compared.
    """

    prompt: str
    responses: tuple[Hashable, ...]
    ranks: tuple[int, ...]
    texts: tuple[str, ...]
    turns: int
    asked: int
    place: str
    label: bool | None = None


def told_rows(groups: Iterable[PreferenceGroup]) -> Iterator[Told]:
    """Rows of text."""
    for group in groups:
        yield Told(
            prompt=group.prompt_key,
            responses=group.responses,
            ranks=group.ranks,
            texts=tuple(map(_words, group.responses)),
            turns=max(map(_turns, group.responses)),
            asked=_asked(group.prompt),
            place=group.source,
            label=group.label,
        )


def told_tokens(groups: Iterable[TokenGroup], eos: int) -> Iterator[Told]:
    """Rows that were never text: those of the embedded task.

    Args:
        groups: The groups.
        eos: Id of the token that ends a response, which is no part of its text.
    """
    for group in groups:
        # A character for each id, so that one response begins another where its ids do.
        texts = tuple("".join(chr(i) for i in ids if i != eos) for ids in group.responses)
        yield Told(group.prompt_key, texts, group.ranks, texts, 1, 1, group.source, group.label)


def count_oddities(rows: Iterable[Told]) -> dict[str, Oddity]:
    """Counts of each kind, by the names of ``SAID``."""
    found = {name: Oddity() for name in SAID}
    seen: set[Hashable] = set()
    prompts: Counter[str] = Counter()
    orders: dict[tuple[str, frozenset[Hashable]], set[Hashable]] = defaultdict(set)
    labels: dict[tuple[str, Hashable], set[bool]] = defaultdict(set)
    for row in rows:
        own = (row.prompt, frozenset(zip(row.responses, row.ranks, strict=True)), row.label)
        found["duplicates"].add(row.place, own in seen)
        seen.add(own)
        found["repeated_prompts"].add(row.place, row.prompt in prompts)
        prompts[row.prompt] += 1
        pairs = list(_ranked(row))
        found["tied"].add(row.place, not pairs and row.label is None)
        if row.label is not None:
            known_labels = labels[row.prompt, row.responses[0]]
            # Once for each answer, however often it is rated which way.
            found["contradictory_labels"].add(row.place, known_labels == {not row.label})
            known_labels.add(row.label)
        same = sum(one == other for one, other in pairs)
        found["identical_pairs"].add(row.place, same)
        found["near_identical_pairs"].add(row.place, _alike(row) - same)
        for better, worse in {*pairs}:
            if better != worse:
                known = orders[row.prompt, frozenset((better, worse))]
                # Once for each pair, however often it is ordered which way.
                found["contradictions"].add(row.place, bool(known) and known == {worse})
                known.add(better)
        found["prefixes"].add(row.place, _has_prefix(row.texts))
        found["empty_responses"].add(row.place, any(not text.strip() for text in row.texts))
        found["several_turns"].add(row.place, row.turns > 1)
        found["long_conversations"].add(row.place, row.asked > 1)
    return found


def leaks(train: Sequence[TokenGroup], evaluation: Sequence[TokenGroup]) -> Oddity:
    """Evaluation rows whose prompt is trained on, or with labels another turn of the conversation.

    Args:
        train: The groups to train on.
        evaluation: Those to evaluate on.
    """
    shared = shared_text([*train, *evaluation])
    known = {shared(group) for group in train}
    found = Oddity()
    for group in evaluation:
        found.add(group.source, shared(group) in known)
    return found


def _ranked(row: Told) -> Iterator[tuple[Hashable, Hashable]]:
    """Better and worse response of each strictly ranked pair."""
    for (one, rank), (other, next_rank) in combinations(
        zip(row.responses, row.ranks, strict=True), 2
    ):
        if rank != next_rank:
            yield (one, other) if rank < next_rank else (other, one)


def _alike(row: Told) -> int:
    """Strictly ranked pairs whose letters and digits are the same."""
    letters = ["".join(filter(str.isalnum, text)).casefold() for text in row.texts]
    # Signs alone, such as two answers in emoji, may differ in all that they say.
    names = [own or text for own, text in zip(letters, row.texts, strict=True)]
    return sum(
        one == other and rank != next_rank
        for (one, rank), (other, next_rank) in combinations(zip(names, row.ranks, strict=True), 2)
    )


def _has_prefix(texts: Sequence[str]) -> bool:
    """True if a text that is not empty begins another, longer one."""
    # In the order of texts each stands right before the first that it begins.
    ordered = sorted({text for text in texts if text.strip()})
    return any(other.startswith(one) for one, other in pairwise(ordered))


def _words(response: Text) -> str:
    if isinstance(response, str):
        return response
    return "\n".join(message.content + message.extra for message in response)


def _turns(response: Text) -> int:
    return 1 + response.count(HUMAN) if isinstance(response, str) else len(response)


def _asked(prompt: Text) -> int:
    if isinstance(prompt, str):
        return max(1, prompt.count(HUMAN))
    return sum(message.role == "user" for message in prompt)
