"""From the text of a group to its token ids: one prompt shared by all responses, EOS, truncation.

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

from dpo_lightning.data.records import Message, PreferenceGroup, Text
from dpo_lightning.errors import UserError

Ids = npt.NDArray[np.int32]

DROP_REASONS = {
    "bad_row": "a row that could not be read, set aside in quarantine.jsonl",
    "too_long": "prompt and longest response exceed data.max_length",
    "nothing_to_compare": "no strictly ranked, different pair is left (after truncation)",
    "identical_responses": "the responses are the same",
    "empty_response": "a response without text",
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
        ranks: Rank of each response; 1 is best, ties share a rank.
        weight: Weight of the group in the loss.
        source: Where the row came from, ``file:line``.
        prompt_key: Identifies the prompt's text; groups with one key stay on one side of a split.
    """

    prompt: Ids
    responses: tuple[Ids, ...]
    ranks: tuple[int, ...]
    weight: float
    source: str
    prompt_key: str

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
        """Tokens of the group when every response repeats the prompt."""
        return len(self.prompt) * len(self.responses) + sum(map(len, self.responses))


@dataclass(slots=True)
class TokenizedGroups:
    """What became of a list of groups.

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
    shrunk = 0
    for start in range(0, len(groups), chunk):
        part = groups[start : start + chunk]
        for group, (ids, n_prompt) in zip(part, _encode(part, tokenizer), strict=True):
            token_group, shrank, reason, changes = _assemble(
                group, ids, n_prompt, tokenizer, max_length=max_length, truncation=truncation
            )
            shrunk += shrank
            if token_group is None:
                result.dropped[reason] += 1
                continue
            result.groups.append(token_group)
            result.changed.update(changes)
    if shrunk:
        result.notes.append(
            f"the last prompt tokens of {shrunk} of {len(groups)} groups merge with a response and "
            "are scored with it"
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
                encoded[i] = row
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
    render = _renderer(tokenizer)
    # A prompt that ends in the assistant's own words is continued, not answered.
    open_turn = not (prompt and prompt[-1].role == "assistant")
    texts = [render(prompt, open_turn)]
    for response in group.responses:
        messages = response if not isinstance(response, str) else (Message("assistant", response),)
        texts.append(render((*prompt, *messages), False))
    return texts, True


def _renderer(tokenizer: Any) -> Callable[[tuple[Message, ...], bool], str]:
    def render(messages: tuple[Message, ...], add_generation_prompt: bool) -> str:
        if not messages:
            return ""
        try:
            text: str = tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # jinja2 raises whatever a template chooses to raise
            raise UserError(
                f"data.chat_template: the chat template refuses a conversation with the roles "
                f"{[m.role for m in messages]}: {' '.join(str(error).split())}; "
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
    """Ends a response with EOS: appends one, or drops what a template writes after the last one."""
    if eos in ids:
        last = len(ids) - 1 - ids[::-1].index(eos)
        tail = ids[last + 1 :]
        if not tail or not tokenizer.decode([t for t in tail if t not in special]).strip():
            return ids[: last + 1]
    return [*ids, eos]


def _assemble(
    group: PreferenceGroup,
    encoded: list[list[int]],
    n_prompt: int,
    tokenizer: Any,
    *,
    max_length: int,
    truncation: str,
) -> tuple[TokenGroup | None, bool, str, list[str]]:
    """One token group, whether its prompt shrank, why it was dropped, and what was changed."""
    eos: int = tokenizer.eos_token_id
    special = frozenset(tokenizer.all_special_ids)
    prompt, full = encoded[0], encoded[1:]
    # An EOS that the tokenizer itself puts behind the prompt is no token of the prompt.
    own_length = len(prompt) - (1 if len(prompt) > 1 and prompt[-1] == eos else 0)
    shrank = n_prompt < own_length
    prompt_ids = full[0][:n_prompt]
    if not prompt_ids:
        # Some state has to predict the first token: the text begins where the model begins.
        prompt_ids = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos]
    changes: list[str] = []

    kept: list[tuple[list[int], int]] = []
    reason = "nothing_to_compare"
    for response, ids, rank in zip(group.responses, full, group.ranks, strict=True):
        if _is_empty(response):
            reason = "empty_response"
            continue
        response_ids = _response_ids(ids[n_prompt:], eos, special, tokenizer)
        if any(response_ids == other for other, _ in kept):
            reason = "identical_responses"
            continue
        kept.append((response_ids, rank))
    if not _comparable(kept):
        return None, shrank, reason, changes
    if len(kept) < len(group.responses):
        changes.append("removed_response")

    longest = max(len(ids) for ids, _ in kept)
    excess = len(prompt_ids) + longest - max_length
    if excess > 0:
        if truncation == "drop":
            return None, shrank, "too_long", changes
        if truncation == "prompt":
            bos = 1 if prompt_ids[0] == tokenizer.bos_token_id and len(prompt_ids) > 1 else 0
            if len(prompt_ids) - excess < bos + 1:
                return None, shrank, "too_long", changes
            prompt_ids = prompt_ids[:bos] + prompt_ids[bos + excess :]
            changes.append("truncated_prompt")
        else:
            room = max_length - len(prompt_ids)
            cut: list[tuple[list[int], int]] = []
            for ids, rank in kept:
                ids = ids[: max(room, 0)]
                if ids and not any(ids == other for other, _ in cut):
                    cut.append((ids, rank))
            if not _comparable(cut):
                return None, shrank, "nothing_to_compare", changes
            kept = cut
            changes.append("truncated_response")
    token_group = TokenGroup(
        prompt=np.asarray(prompt_ids, dtype=np.int32),
        responses=tuple(np.asarray(ids, dtype=np.int32) for ids, _ in kept),
        ranks=tuple(rank for _, rank in kept),
        weight=group.weight,
        source=group.source,
        prompt_key=group.prompt_key,
    )
    return token_group, shrank, "", changes


def _comparable(responses: Sequence[tuple[list[int], int]]) -> bool:
    """Whether any two of the (different) responses are strictly ranked."""
    return len({rank for _, rank in responses}) > 1
