"""Split of read rows into training and evaluation groups, with an account of every row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_lightning.data.records import Rows
from dpo_lightning.data.token_cache import tokenize_once
from dpo_lightning.data.tokens import DROP_REASONS, TokenGroup, TokenizedGroups
from dpo_lightning.errors import UserError


@dataclass(slots=True)
class PreparedData:
    """The groups of a run.

    ``len(train) + len(eval) + sum(dropped.values())`` is the number of rows of the files.

    Attributes:
        train: Groups to train on.
        eval: Groups to evaluate on.
        dropped: Rows that went, by reason.
        changed: Groups that stayed but were cut, by what happened.
        notes: Lines to say once.
    """

    train: list[TokenGroup]
    eval: list[TokenGroup]
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, Any]:
        """The ``data`` entry of ``result.json``."""
        return {
            "train_groups": len(self.train),
            "eval_groups": len(self.eval),
            "train_pairs": sum(group.pairs for group in self.train),
            "dropped": dict(self.dropped),
            "changed": dict(self.changed),
        }


def prepare_rows(
    train: Rows,
    evaluation: Rows | None,
    tokenizer: Any,
    *,
    max_length: int,
    truncation: str,
    eval_fraction: float,
    split_seed: int,
    max_dropped: float,
    cache: Path | None = None,
) -> PreparedData:
    """Tokenizes rows, splits off the evaluation groups, and accounts for what was dropped.

    Args:
        train: The rows of ``data.train``.
        evaluation: The rows of ``data.eval``, or None to hold out a part of the training rows.
        tokenizer: A transformers tokenizer.
        max_length: Longest prompt + response, in tokens.
        truncation: The part that gives way above it: ``drop``, ``prompt`` or ``response``.
        eval_fraction: Share of the groups to hold out when ``evaluation`` is None.
        split_seed: Seed of that choice.
        max_dropped: Largest share of the rows that may be dropped.
        cache: Folder of the token ids; None keeps none.

    Raises:
        UserError: If more was dropped, or nothing is left of ``data.train`` or ``data.eval``.
    """
    limits: dict[str, Any] = {"max_length": max_length, "truncation": truncation}
    tokenized = tokenize_once(train.groups, tokenizer, **limits, folder=cache)
    prepared = PreparedData(train=tokenized.groups, eval=[], notes=[*train.notes])
    _account(prepared, train, tokenized)
    parts = [("data.train", train, tokenized)]
    if evaluation is None:
        prepared.train, prepared.eval = split_by_prompt(
            tokenized.groups, fraction=eval_fraction, seed=split_seed
        )
        if eval_fraction and prepared.train and not prepared.eval:
            prepared.notes.append("all rows have one prompt, so none are held out to evaluate on")
    else:
        held_out = tokenize_once(evaluation.groups, tokenizer, **limits, folder=cache)
        prepared.eval = held_out.groups
        prepared.notes += evaluation.notes
        # The same may have been said of the training rows, with other numbers.
        held_out.notes = [f"data.eval: {note}" for note in held_out.notes]
        _account(prepared, evaluation, held_out)
        parts.append(("data.eval", evaluation, held_out))
        common = {g.prompt_key for g in prepared.train} & {g.prompt_key for g in prepared.eval}
        if common:
            prepared.notes.append(f"{len(common)} prompts of data.eval are in data.train too")
    total = sum(rows.total for _, rows, _ in parts)
    _check_dropped(prepared, total, max_dropped=max_dropped, **limits)
    for key, rows, left in parts:
        _check_left(key, rows, left, max_length=max_length)
    return prepared


def split_by_prompt(
    groups: Sequence[TokenGroup], *, fraction: float, seed: int
) -> tuple[list[TokenGroup], list[TokenGroup]]:
    """Holds out about ``fraction`` of the groups; all groups of one prompt stay together.

    Prompts are ordered by a hash of seed and text, so the choice depends neither on the order of
    the file nor on anything but the prompts themselves.

    Returns:
        The training groups and the held-out groups, each in the order given.
    """
    if not fraction:
        return list(groups), []
    sizes = Counter(group.prompt_key for group in groups)
    target = max(1, round(fraction * len(groups)))

    def position(key: str) -> bytes:
        text = f"{seed}:{key}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, digest_size=8).digest()

    keys = sorted(sizes, key=lambda key: (position(key), key))
    held_out: set[str] = set()
    taken = 0
    for key in keys:
        if taken >= target or len(held_out) == len(sizes) - 1:
            break
        # One prompt with very many groups must not swallow the training set.
        if taken + sizes[key] <= 2 * target:
            held_out.add(key)
            taken += sizes[key]
    if not held_out and len(sizes) > 1:
        # Every prompt has that many: a larger share is held out than none.
        held_out.add(min(keys, key=sizes.__getitem__))
    train = [group for group in groups if group.prompt_key not in held_out]
    return train, [group for group in groups if group.prompt_key in held_out]


def data_hash(train: Sequence[TokenGroup], evaluation: Sequence[TokenGroup]) -> str:
    """A hash of all token ids, ranks, weights, margins and confidences in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (train, evaluation):
        digest.update(f"{len(part)};".encode())
        for group in part:
            shape = (len(group.prompt), *map(len, group.responses), group.ranks, group.weight)
            # Nothing is added where there is none: such rows had their hash before these.
            more: tuple[object, ...] = (group.target_margin,) if group.target_margin else ()
            more += ("confidence", group.confidence) if group.confidence < 1 else ()
            digest.update(repr(shape + more).encode())
            for ids in (group.prompt, *group.responses):
                digest.update(ids.tobytes())
    return digest.hexdigest()


def _account(prepared: PreparedData, rows: Rows, tokenized: TokenizedGroups) -> None:
    prepared.dropped.update(_dropped(rows, tokenized))
    prepared.changed.update(tokenized.changed)
    prepared.notes += tokenized.notes


def _dropped(rows: Rows, tokenized: TokenizedGroups) -> Counter[str]:
    """Counts of dropped rows by reason, those that could not be read included."""
    return tokenized.dropped + Counter({"bad_row": len(rows.bad)})


def _check_dropped(
    prepared: PreparedData, rows: int, *, max_dropped: float, max_length: int, truncation: str
) -> None:
    dropped = prepared.dropped.total()
    reasons = _reasons(prepared.dropped)
    # A quotient, as it is rounded like the literal: 0.29 * 100 is less than 29.
    if rows and dropped / rows > max_dropped:
        remedy = "allow more with data.max_dropped="
        if prepared.dropped["too_long"] and truncation != "response":
            remedy += ", or keep long rows with data.truncation=response"
        raise UserError(
            f"data.max_dropped={max_dropped:g}: {dropped} of {rows} rows were dropped ({reasons}) "
            f"with data.max_length={max_length} and data.truncation={truncation}; {remedy}"
        )


def _check_left(key: str, rows: Rows, tokenized: TokenizedGroups, *, max_length: int) -> None:
    if not tokenized.groups:
        reasons = _reasons(_dropped(rows, tokenized))
        raise UserError(
            f"{key}: no group is left out of {rows.total} rows ({reasons}) with "
            f"data.max_length={max_length}; name other rows with {key}= or raise data.max_length="
        )


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(
        f"{count} {reason}: {DROP_REASONS[reason]}" for reason, count in dropped.items() if count
    )
