"""Tokenization of a group's text: one prompt shared by all responses, EOS, truncation.

The prompt is the longest run of leading tokens that the prompt alone and the prompt with each of
its responses have in common: a tokenizer may merge characters across the boundary, and every
response has to follow the very same prompt ids. Nothing is padded here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_lightning.data.limits import OutOfBounds, bounded
from dpo_lightning.data.records import Message, PreferenceGroup, Text
from dpo_lightning.errors import UserError

Ids = npt.NDArray[np.int32]

Ranked = list[tuple[list[int], int]]
"""Token ids of responses with their ranks."""

DROP_REASONS = {
    "bad_row": "a row that could not be read, set aside in quarantine.jsonl",
    "too_long": "prompt and longest response exceed data.max_length",
    "nothing_to_compare": "no strictly ranked, different pair is left (after truncation)",
    "identical_responses": "the responses are identical",
    "empty_response": "an empty response",
}

# Named and exported with the tokenizer when a model brings no chat template of its own.
PLAIN_CHAT_TEMPLATE = (
    "{%- if bos_token is defined and bos_token %}{{ bos_token }}{% endif -%}"
    "{%- for message in messages -%}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif -%}"
    "{{ '\\n\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif -%}"
)


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """A prompt and its K responses as token ids, best response first.

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

    @property
    def tokens(self) -> int:
        """Tokens of the group laid out flat, the prompt once."""
        return len(self.prompt) + sum(len(response) for response in self.responses)

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
    """

    groups: list[TokenGroup] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def tokenize_groups(
    groups: Sequence[PreferenceGroup],
    tokenizer: Any,
    *,
    max_length: int,
    truncation: str,
    chunk: int = 2048,
) -> TokenizedGroups:
    """Turns groups of text into groups of token ids.

    Args:
        groups: The groups; prompts and responses are strings or messages.
        tokenizer: A transformers tokenizer with an EOS token (and a chat template for messages).
        max_length: Longest prompt + response, in tokens.
        truncation: ``drop`` (the group goes), ``prompt`` (the prompt loses its beginning, a
            leading BOS stays) or ``response`` (the responses lose their ends).
        chunk: Groups handed to the tokenizer at once.

    Returns:
        The token groups that are left, with counts of what was dropped and changed.
    """
    result = TokenizedGroups()
    special = frozenset(tokenizer.all_special_ids)
    shrunk = 0
    for start in range(0, len(groups), chunk):
        part = groups[start : start + chunk]
        for group, (ids, n_prompt) in zip(part, _encode(part, tokenizer), strict=True):
            token_group, shrank, reason, changes = _assemble(
                group,
                ids,
                n_prompt,
                tokenizer,
                special=special,
                max_length=max_length,
                truncation=truncation,
            )
            shrunk += shrank
            if token_group is None:
                result.dropped[reason] += 1
                continue
            result.groups.append(token_group)
            result.changed.update(changes)
    if shrunk:
        result.notes.append(
            f"in {shrunk:,} of {len(groups):,} rows the tokenizer merged prompt and response; "
            "those tokens count as response"
        )
    return result


def _encode(
    groups: Sequence[PreferenceGroup], tokenizer: Any
) -> Iterable[tuple[list[list[int]], int]]:
    """Yields, per group, the ids of prompt + response for each response, and the prompt's length.

    The prompt's length is that of the common token prefix.
    """
    texts: list[str] = []
    special: list[bool] = []
    for group in groups:
        rendered, is_messages = _render(group, tokenizer)
        texts.extend(rendered)
        special.extend([not is_messages] * len(rendered))
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
        n = len(group.responses)
        prompt, full = encoded[cursor], encoded[cursor + 1 : cursor + 1 + n]
        cursor += n + 1
        yield [prompt, *full], min(_common_prefix(prompt, ids) for ids in full)


def _render(group: PreferenceGroup, tokenizer: Any) -> tuple[list[str], bool]:
    """The texts of the prompt and of prompt + response, and whether a chat template made them."""
    prompt = group.prompt
    if isinstance(prompt, str):
        return [prompt, *(prompt + _as_string(response) for response in group.responses)], False
    render = _renderer(tokenizer, group.source)
    # What a template writes before an answer belongs to the prompt, so it is not scored.
    texts = [render(prompt, True)]
    for response in group.responses:
        messages = response if not isinstance(response, str) else (Message("assistant", response),)
        texts.append(render((*prompt, *messages), False))
    return texts, True


def _renderer(tokenizer: Any, source: str) -> Callable[[tuple[Message, ...], bool], str]:
    def render(messages: tuple[Message, ...], add_generation_prompt: bool) -> str:
        if not messages:
            return ""
        try:
            with bounded():
                text: str = tokenizer.apply_chat_template(
                    [{"role": m.role, "content": m.content} for m in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
        except OutOfBounds as error:
            raise UserError(
                f"{source}: the chat template took {error} for a conversation of "
                f"{len(messages)} messages, so it was stopped; name another template with "
                "data.chat_template="
            ) from error
        except Exception as error:  # jinja2 raises whatever a template chooses to raise
            raise UserError(
                f"{source}: the chat template refuses a conversation with the roles "
                f"{', '.join(m.role for m in messages)}: {' '.join(str(error).split())}; "
                "name another template with data.chat_template="
            ) from error
        return text

    return render


def _as_string(response: Text) -> str:
    return (
        response if isinstance(response, str) else "".join(message.content for message in response)
    )


def _is_empty(response: Text) -> bool:
    return not _as_string(response).strip()


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


def _assemble(
    group: PreferenceGroup,
    encoded: list[list[int]],
    n_prompt: int,
    tokenizer: Any,
    *,
    special: frozenset[int],
    max_length: int,
    truncation: str,
) -> tuple[TokenGroup | None, bool, str, list[str]]:
    """A token group, True if its prompt shrank, why it was dropped, and what was changed."""
    eos: int = tokenizer.eos_token_id
    bos: int | None = tokenizer.bos_token_id
    prompt, full = encoded[0], encoded[1:]
    # An EOS that the tokenizer itself puts behind the prompt is no token of the prompt.
    shrank = n_prompt < len(prompt) - (prompt[-1:] == [eos])
    # Some state has to predict the first token: the text begins where the model begins.
    prompt_ids = prompt[:n_prompt] or [eos if bos is None else bos]

    kept, reason = _different(group, [ids[n_prompt:] for ids in full], special, tokenizer)
    if not _comparable(kept):
        tied = len(set(group.ranks)) == 1
        return None, shrank, "nothing_to_compare" if tied else reason, []
    short = _shortened(prompt_ids, kept, bos, max_length=max_length, truncation=truncation)
    if isinstance(short, str):
        return None, shrank, short, []
    prompt_ids, kept, changes = short
    if len(kept) < len(group.responses):
        changes.append("removed_response")
    # The ranks that are left may have a gap, or begin with 2.
    places = {rank: place for place, rank in enumerate(sorted({r for _, r in kept}), start=1)}
    token_group = TokenGroup(
        prompt=np.asarray(prompt_ids, dtype=np.int32),
        responses=tuple(np.asarray(ids, dtype=np.int32) for ids, _ in kept),
        ranks=tuple(places[rank] for _, rank in kept),
        weight=group.weight,
        source=group.source,
        prompt_key=group.prompt_key,
        target_margin=group.target_margin or 0.0,
    )
    return token_group, shrank, "", changes


def _different(
    group: PreferenceGroup, texts: list[list[int]], special: frozenset[int], tokenizer: Any
) -> tuple[Ranked, str]:
    """Responses that are there and no other's copy, with their ranks; why the last one is not."""
    eos: int = tokenizer.eos_token_id
    kept: Ranked = []
    reason = "nothing_to_compare"
    for response, ids, rank in zip(group.responses, texts, group.ranks, strict=True):
        response_ids = _response_ids(ids, eos, special, tokenizer)
        if _is_empty(response) or response_ids == [eos]:
            reason = "empty_response"
        elif any(response_ids == other for other, _ in kept):
            reason = "identical_responses"
        else:
            kept.append((response_ids, rank))
    return kept, reason


def _shortened(
    prompt_ids: list[int], kept: Ranked, bos: int | None, *, max_length: int, truncation: str
) -> tuple[list[int], Ranked, list[str]] | str:
    """Prompt and responses within the limit and what was changed, or why the group is dropped."""
    excess = len(prompt_ids) + max(len(ids) for ids, _ in kept) - max_length
    if excess <= 0:
        return prompt_ids, kept, []
    if truncation == "drop":
        return "too_long"
    if truncation == "prompt":
        first = 1 if prompt_ids[0] == bos and len(prompt_ids) > 1 else 0
        if len(prompt_ids) - excess <= first:
            return "too_long"
        prompt_ids = prompt_ids[:first] + prompt_ids[first + excess :]
        return prompt_ids, kept, ["truncated_prompt"]
    cut = _cut(kept, max(0, max_length - len(prompt_ids)))
    if not _comparable(cut):
        return "nothing_to_compare"
    whole = all(response in kept for response in cut)
    return prompt_ids, cut, [] if whole else ["truncated_response"]


def _cut(responses: Sequence[tuple[list[int], int]], length: int) -> list[tuple[list[int], int]]:
    """Cuts responses to ``length`` and keeps the best of those that became the same."""
    cut: list[tuple[list[int], int]] = []
    for ids, rank in responses:
        short = ids[:length]
        if short and not any(short == other for other, _ in cut):
            cut.append((short, rank))
    return cut


def _comparable(responses: Sequence[tuple[list[int], int]]) -> bool:
    """True if any two of the (different) responses are strictly ranked."""
    return len({rank for _, rank in responses}) > 1
