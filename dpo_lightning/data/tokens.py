"""Tokenization of a group's text: one prompt shared by all responses, EOS, truncation.

The prompt is the longest run of leading tokens that the prompt alone and the prompt with each of
its responses have in common: a tokenizer may merge characters across the boundary, and every
response has to follow the very same prompt ids. Nothing is padded here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dpo_lightning.data.conversations import Fault, FaultyRow
from dpo_lightning.data.lengths import Lengths, Ranked, shortened, usable
from dpo_lightning.data.records import PreferenceGroup, Text
from dpo_lightning.data.rendering import Renderer
from dpo_lightning.data.templates import TemplateOptions
from dpo_lightning.processes.phases import ShowPhase, unshown

Ids = npt.NDArray[np.int32]

DROP_REASONS = {
    "bad_row": "a row that could not be read, set aside in quarantine.jsonl",
    "too_long": "prompt and longest response exceed data.max_length",
    "nothing_to_compare": "no pair of different, ranked responses is left (after truncation)",
    "identical_responses": "chosen equals rejected",
    "empty_response": "an empty response",
    "not_rendered": "a row that the chat template refuses or leaves out a part of, set aside in "
    "quarantine.jsonl",
}


@dataclass(frozen=True, slots=True)
class Mismatched:
    """A response behind a prompt that is not its own.

    Attributes:
        ids: Its token ids, shape (R,), int32; cut where it does not fit behind the prompt.
        reference_logp: Its log-probability there under the reference, or None where that is not
            known beforehand.
    """

    ids: Ids
    reference_logp: float | None = None


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """A prompt and its responses as token ids: K >= 2, best first, or one with a label.

    Attributes:
        prompt: Ids of the shared prompt, shape (P,), int32, P >= 1.
        responses: Ids of each response, shapes (R_k,), int32, EOS included unless it was cut off.
        ranks: Rank of each response, without gaps; 1 is best, ties share a rank.
        weight: Weight of the group in the loss.
        source: Origin of the row, ``file:line``.
        prompt_key: Identifies the prompt's text; groups with one key stay on one side of a split.
        reference_logps: Log-probability of each response under the reference, (K,), float32, or
            None where that is not known beforehand.
        reference_token_logps: Log-probability of each token of each response under the reference,
            shapes (R_k,), float32, or None where only sums are known, or nothing.
        target_margin: Lead of the better responses that the row asks for, in units of reward.
        confidence: Probability that the ranking is right; below 1 each pair also counts the other
            way round, with what is left.
        label: None where responses are compared; True or False where the group has one response
            and no partner: it is desirable, or undesirable.
        mismatched: A response to another prompt, which a loss measures behind this one; None where
            no loss does.
    """

    prompt: Ids
    responses: tuple[Ids, ...]
    ranks: tuple[int, ...]
    weight: float
    source: str
    prompt_key: str
    reference_logps: npt.NDArray[np.float32] | None = None
    reference_token_logps: tuple[npt.NDArray[np.float32], ...] | None = None
    target_margin: float = 0.0
    confidence: float = 1.0
    label: bool | None = None
    mismatched: Mismatched | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the group laid out flat, the prompt once."""
        return len(self.prompt) + sum(len(response) for response in self.responses)

    @property
    def preferred(self) -> Ids | None:
        """The best response, or one that is desirable; None where there is none."""
        return None if self.label is False else self.responses[0]

    @property
    def pairs(self) -> int:
        """Strictly ranked pairs."""
        return sum(better < worse for better, worse in combinations(self.ranks, 2))

    @property
    def padded_tokens(self) -> int:
        """Tokens of the group if every response repeats the prompt."""
        return len(self.prompt) * len(self.responses) + sum(map(len, self.responses))


@dataclass(slots=True)
class TokenizedGroups:
    """Outcome of tokenizing a list of groups.

    Attributes:
        groups: The groups that are left, in their order.
        dropped: Groups that went, by reason (the keys of ``DROP_REASONS``).
        changed: Groups that stayed but lost something: ``truncated_prompt``,
            ``truncated_response`` or ``removed_response``.
        notes: Lines to say once.
        faults: Faults of the groups that the chat template did not take whole, by their number.
        kept_by: Groups that went for their length, by what would keep them: a ``data.truncation``,
            or ``max_length``, which keeps all.
        longest: Tokens of the longest group that went for its length; 0 where none did.
        leads: Groups by the text that the chat template writes before their responses.
    """

    groups: list[TokenGroup] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    faults: dict[int, Fault] = field(default_factory=dict)
    kept_by: Counter[str] = field(default_factory=Counter)
    longest: int = 0
    leads: Counter[str] = field(default_factory=Counter)


def tokenize_groups(
    groups: Sequence[PreferenceGroup],
    tokenizer: Any,
    *,
    max_length: int,
    truncation: str,
    options: TemplateOptions | None = None,
    chunk: int = 2048,
    show: ShowPhase = unshown,
) -> TokenizedGroups:
    """Turns groups of text into groups of token ids.

    Args:
        groups: The groups; prompts and responses are strings or messages.
        tokenizer: A transformers tokenizer with an EOS token (and a chat template for messages).
        max_length: Longest prompt + response, in tokens.
        truncation: ``drop`` (the group goes), ``prompt`` (the prompt loses its beginning, a
            leading BOS stays) or ``response`` (the responses lose their ends).
        options: Options of the chat template; None is a template without any.
        chunk: Groups handed to the tokenizer at once.
        show: Shows how far it is.

    Returns:
        The token groups that are left, with counts of what was dropped and changed.
    """
    result = TokenizedGroups()
    writer = _Writer(tokenizer, options or TemplateOptions(), result)
    limits = Lengths(max_length, truncation)
    assemble = _Assembly(tokenizer, limits, result)
    with show("tokenizing", total=len(groups), unit="rows") as say:
        for start in range(0, len(groups), chunk):
            part = groups[start : start + chunk]
            written = writer.write(part, first=start)
            pairs = zip(part, written, strict=True)
            numbered = [group for group, texts in pairs if texts is not None]
            texts = [texts for texts in written if texts is not None]
            for group, own, ids in zip(numbered, texts, _encode(texts, tokenizer), strict=True):
                assemble(group, own, *ids)
            say(start + len(part))
    if assemble.shrunk:
        result.notes.append(
            f"in {assemble.shrunk:,} of {len(groups):,} rows the tokenizer merged prompt and "
            "response; those tokens count as response"
        )
    result.notes += writer.notes()
    return result


class _Texts(NamedTuple):
    """A group as text.

    Attributes:
        texts: The prompt, and the prompt with each response.
        by_template: True if a chat template wrote them.
        empty: Numbers of the responses without text.
    """

    texts: list[str]
    by_template: bool
    empty: frozenset[int]


class _Writer:
    """Writes groups as text, and keeps account of what the chat template did with them."""

    def __init__(self, tokenizer: Any, options: TemplateOptions, result: TokenizedGroups) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._result = result
        self._renderer: Renderer | None = None
        self._left_out: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()

    def write(self, groups: Sequence[PreferenceGroup], *, first: int) -> list[_Texts | None]:
        """The texts of each group; None for one that has a fault, which is noted."""
        if all(isinstance(group.prompt, str) for group in groups):
            return [self._write(group, number) for number, group in enumerate(groups, start=first)]
        if self._renderer is None:
            self._renderer = Renderer(self._tokenizer, self._options)
        with self._renderer.bounds:
            return [self._write(group, number) for number, group in enumerate(groups, start=first)]

    def _write(self, group: PreferenceGroup, number: int) -> _Texts | None:
        prompt = group.prompt
        if isinstance(prompt, str):
            if fault := self._unused(group):
                self._refuse(number, fault)
                return None
            texts = [_as_string(response) for response in group.responses]
            empty = frozenset(i for i, text in enumerate(texts) if not text.strip())
            return _Texts([prompt, *(prompt + text for text in texts)], False, empty)
        assert self._renderer is not None
        try:
            rendered = self._renderer.render(group)
        except FaultyRow as error:
            self._refuse(number, error.fault)
            return None
        self._left_out.update(rendered.left_out)
        self._unread.update(rendered.unread)
        self._result.leads[rendered.lead] += 1
        return _Texts(rendered.texts, True, rendered.empty)

    def _refuse(self, number: int, fault: Fault) -> None:
        self._result.faults[number] = fault
        self._result.dropped["not_rendered"] += 1

    def _unused(self, group: PreferenceGroup) -> Fault | None:
        """The fault of a row of strings with what only a chat template could use."""
        given = {"tools": group.tools, "chat_template_kwargs": group.template_kwargs}
        for name, text in given.items():
            if text and json.loads(text) and name not in self._options.ignored:
                problem = f"{name} beside a plain prompt, which goes through no chat template"
                remedy = (
                    'write the prompt as messages: [{"role": "user", "content": "..."}], or leave '
                    f"it out with 'data.ignore_fields=[{name}]'"
                )
                return Fault(name, problem, problem, remedy)
        return None

    def notes(self) -> list[str]:
        """Lines to say once."""
        return [
            f"the chat template leaves {name} of earlier turns out, as it does when the model "
            f"answers ({_rows(count)})"
            for name, count in sorted(self._left_out.items())
        ] + [
            f"the chat template reads no variable {name}, which {_rows(count)} have in "
            "chat_template_kwargs"
            for name, count in sorted(self._unread.items())
        ]


def _rows(count: int) -> str:
    return f"{count} rows" if count != 1 else "1 row"


def _encode(groups: Sequence[_Texts], tokenizer: Any) -> Iterator[tuple[list[list[int]], int]]:
    """Yields, per group, the ids of prompt + response for each response, and the prompt's length.

    The prompt's length is that of the common token prefix.
    """
    texts = [text for group in groups for text in group.texts]
    special = [not group.by_template for group in groups for _ in group.texts]
    encoded: list[list[int]] = [[]] * len(texts)
    bos = tokenizer.bos_token_id
    for add_special_tokens in (True, False):
        where = [i for i, flag in enumerate(special) if flag is add_special_tokens]
        if where:
            ids = tokenizer(
                [texts[i] for i in where],
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
            for i, row in zip(where, ids, strict=True):
                # A text that was rendered elsewhere may bring the BOS that the tokenizer writes.
                doubled = bos is not None and row[:2] == [bos, bos]
                encoded[i] = row[1:] if doubled else row
    cursor = 0
    for group in groups:
        n = len(group.texts) - 1
        prompt, full = encoded[cursor], encoded[cursor + 1 : cursor + 1 + n]
        cursor += n + 1
        yield [prompt, *full], min(_common_prefix(prompt, ids) for ids in full)


def _as_string(response: Text) -> str:
    return (
        response if isinstance(response, str) else "".join(message.content for message in response)
    )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    for i in range(n):
        if a[i] != b[i]:
            return i
    return n


def _response_ids(ids: list[int], eos: int, special: frozenset[int], tokenizer: Any) -> list[int]:
    """Ends a response with its first EOS that no text follows; appends one where there is none.

    A template may write a line break behind EOS, and a text may bring the EOS that the tokenizer
    writes once more.
    """
    for end in [place for place, token in enumerate(ids, start=1) if token == eos]:
        rest = [token for token in ids[end:] if token not in special]
        if not rest or not tokenizer.decode(rest).strip():
            return ids[:end]
    return [*ids, eos]


class _Assembly:
    """Makes token groups out of token ids, within the limits; the result keeps the account.

    Attributes:
        shrunk: Groups of which a prompt token merged with a response.
    """

    def __init__(self, tokenizer: Any, limits: Lengths, result: TokenizedGroups) -> None:
        self.shrunk = 0
        self._tokenizer = tokenizer
        self._limits = limits
        self._result = result
        self._special = frozenset(tokenizer.all_special_ids)
        self._eos: int = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id

    def __call__(
        self, group: PreferenceGroup, texts: _Texts, encoded: list[list[int]], n_prompt: int
    ) -> None:
        """Adds a group, or counts the reason against it."""
        result = self._result
        prompt, full = encoded[0], encoded[1:]
        self._count_shrunk(prompt, n_prompt, by_template=texts.by_template)
        # Some state has to predict the first token: the text begins where the model begins.
        prompt_ids = prompt[:n_prompt] or [self._eos if self._bos is None else self._bos]
        kept, reason = self._different(group, texts, [ids[n_prompt:] for ids in full])
        alone = group.label is not None
        if not usable(kept, alone=alone):
            tied = not alone and len(set(group.ranks)) == 1
            result.dropped["nothing_to_compare" if tied else reason] += 1
            return
        short = shortened(prompt_ids, kept, self._bos, self._limits, alone=alone)
        if isinstance(short, str):
            result.dropped[short] += 1
            self._count_too_long(prompt_ids, kept, alone=alone)
            return
        prompt_ids, kept, changes = short
        if len(kept) < len(group.responses):
            changes.append("removed_response")
        result.groups.append(_token_group(group, prompt_ids, kept))
        result.changed.update(changes)

    def _count_shrunk(self, prompt: list[int], n_prompt: int, *, by_template: bool) -> None:
        # An EOS that the tokenizer itself puts behind the prompt is no token of the prompt.
        if n_prompt >= len(prompt) - (prompt[-1:] == [self._eos]):
            return
        # A space that a template writes before an answer is the answer's for most tokenizers.
        if not by_template or self._tokenizer.decode(prompt[n_prompt:]).strip():
            self.shrunk += 1

    def _count_too_long(self, prompt_ids: list[int], kept: Ranked, *, alone: bool) -> None:
        result, limit = self._result, self._limits.max_length
        longest = len(prompt_ids) + max(len(ids) for ids, _ in kept)
        result.longest = max(result.longest, longest)
        result.kept_by["max_length"] += 1
        for other in ("prompt", "response"):
            limits = Lengths(limit, other)
            short = shortened(prompt_ids, kept, self._bos, limits, alone=alone)
            if not isinstance(short, str):
                result.kept_by[other] += 1

    def _different(
        self, group: PreferenceGroup, texts: _Texts, responses: list[list[int]]
    ) -> tuple[Ranked, str]:
        """Responses that are there and no other's copy, with their ranks; why the last is not."""
        kept: Ranked = []
        reason = "nothing_to_compare"
        for number, (ids, rank) in enumerate(zip(responses, group.ranks, strict=True)):
            response_ids = _response_ids(ids, self._eos, self._special, self._tokenizer)
            if number in texts.empty or response_ids == [self._eos]:
                reason = "empty_response"
            elif any(response_ids == other for other, _ in kept):
                reason = "identical_responses"
            else:
                kept.append((response_ids, rank))
        return kept, reason


def _token_group(group: PreferenceGroup, prompt_ids: list[int], kept: Ranked) -> TokenGroup:
    # The ranks that are left may have a gap, or begin with 2.
    places = {rank: place for place, rank in enumerate(sorted({r for _, r in kept}), start=1)}
    return TokenGroup(
        prompt=np.asarray(prompt_ids, dtype=np.int32),
        responses=tuple(np.asarray(ids, dtype=np.int32) for ids, _ in kept),
        ranks=tuple(places[rank] for _, rank in kept),
        weight=group.weight,
        source=group.source,
        prompt_key=group.prompt_key,
        target_margin=group.target_margin or 0.0,
        label=group.label,
    )
