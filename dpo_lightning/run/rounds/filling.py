"""Reference log-probabilities of a round's groups: of the run's start, or of the policy as it is.

Where a round's reference is the policy that draws its answers, no second model is held: what the
policy gives them as the round begins is kept in the run's folder, and read from there afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import CorruptArtifactError
from dpo_lightning.files import ROUNDS_FOLDER
from dpo_lightning.models.adapters import adapter_dropout_off
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.reference.cache import ReferenceCache
from dpo_lightning.reference.fill import Watch, with_reference_logps
from dpo_lightning.reference.kinds import CachedReference, Reference
from dpo_lightning.reference.spot_check import check_stored

Precision = Callable[[], contextlib.AbstractContextManager[Any]]

# Hidden from who reads the folder as rows.
OWN = ".reference"
"""Folder of values under the policy as it was, in that of the rounds."""


class ParkedModel:
    """The frozen start, loaded once and off its device between two rounds.

    Args:
        make: Makes it.
        parks: False where it is the policy's own model without its adapter.
    """

    def __init__(self, make: Callable[[], Any], *, parks: bool) -> None:
        self._make = make
        self._parks = parks
        self._model: Any = None

    def load(self) -> Any:
        """The model."""
        if self._model is None:
            self._model = self._make()
        return self._model

    def park(self) -> None:
        """Takes it off its device."""
        if self._parks and self._model is not None:
            self._model.to("cpu")


@dataclass(frozen=True, slots=True)
class Filling:
    """Settings of the reference rows of rounds.

    Attributes:
        reference: Where the loss gets the reference from; all but a cached one need no rows.
        previous: True if a round's reference is the policy that draws its answers.
        start: The run's start.
        cache: Stored values under a reference with these weights, below a folder; without a folder
            in the one that all runs share.
        policy: The policy.
        scorer: Scores groups.
        device: Where to compute.
        precision: The context to compute in.
        dtype: Type that is computed in.
        micro_batch_tokens: What the device holds at once in training.
        per_token: True if the loss needs a value for each token.
        threads: CPU threads of one operation; None: as they are.
    """

    reference: Reference
    previous: bool
    start: ParkedModel
    cache: Callable[[str | None, Path | None], ReferenceCache]
    policy: Any
    scorer: Scorer
    device: torch.device
    precision: Precision
    dtype: torch.dtype
    micro_batch_tokens: int
    per_token: bool
    threads: int | None


@dataclass(frozen=True, slots=True)
class Moment:
    """A round as its reference rows are filled.

    Attributes:
        round: Its number, from 1.
        policy: Hash of the policy that drew its answers.
        folder: Folder of the run that has what it left.
        moved: True if the policy has taken steps of the round by now.
    """

    round: int
    policy: str
    folder: Path
    moved: bool


def fill_round(
    filling: Filling,
    drawn: Sequence[TokenGroup],
    given: Sequence[TokenGroup],
    rows: Sequence[int],
    *,
    moment: Moment,
    watch: Watch,
) -> tuple[Sequence[TokenGroup], Sequence[TokenGroup]]:
    """A round's drawn groups and all given rows, with their reference log-probabilities.

    Args:
        filling: How.
        drawn: Groups of the policy's answers.
        given: All given rows; with the start as the reference they have their values.
        rows: Numbers of those that the round's steps have.
        moment: Which round it is, and what is left of its policy.
        watch: Looks on.

    Raises:
        CorruptArtifactError: If values of the policy as it was are gone.
    """
    wanted = drawn or (filling.previous and rows)
    if not wanted or not isinstance(filling.reference, CachedReference):
        return drawn, given
    if not filling.previous:
        with_values, found = _filled(filling, [drawn], filling.cache(None, None), None, watch)
        filling.start.park()
        _count(filling.reference, found)
        return with_values[0], given
    own = [given[row] for row in rows]
    cache = filling.cache(moment.policy, moment.folder / ROUNDS_FOLDER / OWN)
    parts, found = _filled(filling, [drawn, own], cache, moment, watch)
    _count(filling.reference, found)
    filled = [*given]
    for row, group in zip(rows, parts[1], strict=True):
        filled[row] = group
    return parts[0], filled


def _filled(
    filling: Filling,
    parts: Sequence[Sequence[TokenGroup]],
    cache: ReferenceCache,
    moment: Moment | None,
    watch: Watch,
) -> tuple[list[list[TokenGroup]], CachedReference]:
    """The groups with values of the start, or of the policy at a moment."""
    load = filling.start.load if moment is None else lambda: _as_it_was(filling, moment)
    with contextlib.ExitStack() as stack:
        if moment is not None:
            stack.enter_context(adapter_dropout_off(filling.policy))
        filled, found = with_reference_logps(
            parts,
            cache,
            load=load,
            scorer=filling.scorer,
            device=filling.device,
            precision=filling.precision,
            micro_batch_tokens=filling.micro_batch_tokens,
            per_token=filling.per_token,
            watch=watch,
            threads=filling.threads,
        )
    if moment is None:
        groups = [group for part in filled for group in part]
        check_stored(
            [groups[number] for number in found.read],
            found.folder,
            load=load,
            scorer=filling.scorer,
            device=filling.device,
            precision=filling.precision,
            dtype=filling.dtype,
        )
    return filled, found


def _as_it_was(filling: Filling, moment: Moment) -> Any:
    """The policy as it drew a round's answers.

    Raises:
        CorruptArtifactError: If it has moved on.
    """
    if not moment.moved:
        return filling.policy
    if moment.round == 1:
        return filling.start.load()
    raise CorruptArtifactError(
        f"{moment.folder / ROUNDS_FOLDER / OWN}: log-probabilities of round {moment.round} under "
        "the policy that began it are not there, and the policy has moved on since; put them back, "
        "or resume from a checkpoint of an earlier round"
    )


def _count(reference: CachedReference, found: CachedReference) -> None:
    reference.rows += found.rows
    reference.computed += found.computed
