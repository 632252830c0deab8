"""Responses behind prompts that are not theirs: what KTO measures its reference point on.

Each group of a data set gets one response of another group, always the same: groups are put in the
order of a hash of their content, and each takes a response of the next one that has another prompt.
So the pairing depends on the rows alone, and what the reference gives it is kept like all else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dpo_lightning.data.splits import PreparedData
from dpo_lightning.data.tokens import Mismatched, TokenGroup

ONE_PROMPT = (
    "all rows have one prompt, so there is no response to another one: KTO's reference point z0 "
    "stays 0"
)

ONE_GROUP = (
    "data.batch_size=1: KTO's reference point z0 rests on one response a step; take 8 or more"
)


def add_mismatched(data: PreparedData, *, max_length: int, batch_size: int) -> None:
    """Gives every group of a run a mismatched response; held-out sets each by themselves.

    Args:
        data: The groups; changed, with a note where there is no such response.
        max_length: Longest prompt with a response, in tokens; what is beyond is cut off.
        batch_size: Groups of a step.
    """
    data.train = pair_up(data.train, max_length=max_length)
    found: list[TokenGroup] = []
    for size in [*data.sets.values()] or [len(data.eval)]:
        own = data.eval[len(found) : len(found) + size]
        found += pair_up(own, max_length=max_length)
    data.eval = found
    if data.train and all(group.mismatched is None for group in data.train):
        data.notes.append(ONE_PROMPT)
    elif batch_size == 1:
        data.notes.append(ONE_GROUP)


def pair_up(groups: Sequence[TokenGroup], *, max_length: int) -> list[TokenGroup]:
    """The groups in their order, each with a response of another one.

    Args:
        groups: The groups.
        max_length: Longest prompt with a response, in tokens.

    Returns:
        The groups; without a response of another prompt where all have the same.
    """
    digests = [_digest(group) for group in groups]
    order = sorted(range(len(groups)), key=digests.__getitem__)
    following = _next_prompt([groups[i].prompt.tobytes() for i in order])
    found = [*groups]
    for place, i in enumerate(order):
        other = following[place]
        if other is None:
            continue
        donor, digest = groups[order[other]], digests[order[other]]
        # Of several responses the hash takes one: the chosen and the rejected as often.
        response = donor.responses[digest[0] % len(donor.responses)]
        room = max(1, max_length - len(groups[i].prompt))
        found[i] = replace(groups[i], mismatched=Mismatched(response[:room]))
    return found


def _next_prompt(prompts: Sequence[bytes]) -> list[int | None]:
    """The next place in a circle that has another prompt than each place; None: there is none."""
    count = len(prompts)
    found: list[int | None] = [None] * count
    if len({*prompts}) < 2:
        return found
    # Backwards twice around: what the next place knows is known.
    for step in range(2 * count - 1, -1, -1):
        place, after = step % count, (step + 1) % count
        found[place] = after if prompts[after] != prompts[place] else found[after]
    return found


def _digest(group: TokenGroup) -> bytes:
    """A hash of what a group is made of."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in (group.prompt, *group.responses):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(ids, dtype="<i4").tobytes())
    digest.update(repr((group.ranks, group.label)).encode())
    return digest.digest()


def mismatched_group(group: TokenGroup) -> TokenGroup:
    """A group's prompt with its mismatched response alone, of which nothing is compared.

    Args:
        group: One that has such a response.
    """
    assert group.mismatched is not None
    logp = group.mismatched.reference_logp
    return TokenGroup(
        prompt=group.prompt,
        responses=(group.mismatched.ids,),
        ranks=(1,),
        weight=group.weight,
        source=group.source,
        prompt_key=group.prompt_key,
        reference_logps=None if logp is None else np.array([logp], dtype=np.float32),
    )


@dataclass(frozen=True, slots=True)
class LaidOut:
    """Groups for a reference pass: mismatched responses are groups of their own, before the others.

    So the others are computed and kept as they are for a loss that measures no such responses.

    Attributes:
        parts: Lists of groups: those of mismatched responses, then the given ones.
        wanted: True for the groups that are used, part after part.
        rows: Numbers of the given groups that have a mismatched response.
    """

    parts: Sequence[Sequence[TokenGroup]]
    wanted: npt.NDArray[np.bool_]
    rows: Sequence[int]

    @classmethod
    def of(
        cls, parts: Sequence[Sequence[TokenGroup]], needed: npt.NDArray[np.bool_] | None
    ) -> LaidOut:
        """Lays groups out.

        Args:
            parts: Lists of groups.
            needed: True for the groups that are used, part after part; None: all are.
        """
        groups = [group for part in parts for group in part]
        wanted = np.ones(len(groups), dtype=bool) if needed is None else needed
        rows = [i for i, group in enumerate(groups) if group.mismatched is not None]
        apart = [[mismatched_group(g) for g in part if g.mismatched is not None] for part in parts]
        chosen = np.concatenate([wanted[np.array(rows, dtype=np.int64)], wanted])
        return cls([*(apart if rows else []), *parts], chosen, rows)

    @property
    def groups(self) -> list[TokenGroup]:
        """All groups, part after part."""
        return [group for part in self.parts for group in part]

    @property
    def first(self) -> int:
        """Number of the first of the given groups."""
        return len(self.rows)

    def put_together(self, filled: Sequence[TokenGroup]) -> list[list[TokenGroup]]:
        """The given parts, whose groups have what was found of their mismatched responses too.

        Args:
            filled: All groups with what the reference gives them.
        """
        own = [*filled[self.first :]]
        for number, row in enumerate(self.rows):
            mismatched, found = own[row].mismatched, filled[number].reference_logps
            assert mismatched is not None
            logp = None if found is None else float(found[0])
            own[row] = replace(own[row], mismatched=replace(mismatched, reference_logp=logp))
        given = self.parts[len(self.parts) // 2 :] if self.rows else self.parts
        rest = iter(own)
        return [[next(rest) for _ in part] for part in given]
