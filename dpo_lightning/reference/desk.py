"""Blocks that are to be computed or read, handed out to one of the processes that share them.

Whoever asks for the same blocks at the same time, a rank of this run or another run, meets the
others in the cache's folder alone: a block is claimed there, computed and published whole. What
another process has claimed is waited for, unless it is gone, or stays away for so long that the
block is computed here as well: it comes out the same.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from dpo_lightning.processes.work_claims import WorkClaim
from dpo_lightning.reference.blocks import BlockPlan
from dpo_lightning.reference.cache import Keys, Lengths, Logps, ReferenceCache

log = logging.getLogger(__name__)

# How often another process's block is looked for,
_POLL_SECONDS = 0.1
# and how long at a time: ranks that share a model wait meanwhile in a message of its.
_LOOK_SECONDS = 2.0
# Longest time in which no block may come before another's is computed here as well,
_PATIENCE_SECONDS = 600.0
# and in blocks of this process's own.
_PATIENCE_BLOCKS = 5


class Handed(NamedTuple):
    """Blocks that were handed out.

    Attributes:
        compute: Numbers of those to compute now.
        read: The values of those that were found, by number.
    """

    compute: list[int]
    read: dict[int, Logps]


class BlockDesk:
    """Hands out the blocks that a process needs, until all are there.

    Args:
        plan: All blocks.
        cache: Where they are kept.
        needed: Numbers of those that are needed.
    """

    def __init__(self, plan: BlockPlan, cache: ReferenceCache, needed: Sequence[int]) -> None:
        self._plan = plan
        self._cache = cache
        # Processes that start together begin at different places.
        start = os.getpid() * 7919 % max(1, len(needed))
        self._open = dict.fromkeys([*needed[start:], *needed[:start]])
        self._claims: dict[int, WorkClaim] = {}
        self._shares = True
        self._moved = self._handed = time.monotonic()
        self._slowest = 0.0
        self._waits = False

    def read_all(self) -> dict[int, Logps]:
        """The values of all blocks that are there, by number."""
        found = {}
        for number in [*self._open]:
            values = self._read(number)
            if values is not None:
                found[number] = values
                del self._open[number]
        return found

    def hand_out(self, count: int) -> Handed:
        """Hands out blocks to compute, or values that others have computed.

        Args:
            count: Most blocks to compute.

        Returns:
            What there is; nothing where others have all that is left and are still at it.
        """
        self._handed = time.monotonic()
        until = self._handed + _LOOK_SECONDS
        while True:
            handed = self._look(count)
            if handed.compute or handed.read or not self._open:
                self._moved = time.monotonic()
                return handed
            if time.monotonic() - self._moved > self._patience:
                return self._go_ahead()
            if time.monotonic() > until:
                return handed
            if not self._waits:
                self._waits = True
                log.info("waiting for another process that is computing reference log-probs")
            time.sleep(_POLL_SECONDS)

    def publish(self, values: dict[int, Logps]) -> None:
        """Keeps blocks that were handed out, and gives up their claims.

        A cache that cannot be written is said once, and does without what is computed here.

        Args:
            values: Of each block, by number.
        """
        self._slowest = max(self._slowest, time.monotonic() - self._handed)
        for number, logps in values.items():
            if self._shares:
                try:
                    self._cache.publish(*self._responses(number), logps)
                except OSError as error:
                    self._go_alone("written", error)
            self._let_go(number)

    def close(self) -> None:
        """Gives up what was handed out and not computed."""
        for number in [*self._claims]:
            self._let_go(number)

    @property
    def _patience(self) -> float:
        return max(_PATIENCE_SECONDS, _PATIENCE_BLOCKS * self._slowest)

    def _look(self, count: int) -> Handed:
        """One round over what is left."""
        handed = Handed([], {})
        for number in [*self._open]:
            if len(handed.compute) == count:
                break
            values = self._read(number)
            if values is None and self._take(number):
                # It may have been published between the look and the claim.
                values = self._read(number)
                if values is None:
                    handed.compute.append(number)
                    del self._open[number]
                    continue
                self._let_go(number)
            if values is not None:
                handed.read[number] = values
                del self._open[number]
        return handed

    def _take(self, number: int) -> bool:
        """True if this process is to compute a block: it has the claim, or there are none."""
        if not self._shares:
            return True
        try:
            claim = self._cache.claim(self._plan.blocks[number].name)
        except OSError as error:
            self._go_alone("used", error)
            return True
        if claim is None:
            return False
        self._claims[number] = claim
        return True

    def _go_ahead(self) -> Handed:
        """Hands out a block that another process has claimed and does not publish."""
        number = next(iter(self._open))
        del self._open[number]
        log.warning(
            "reference: %s has not finished a block for %d s: it is computed here as well",
            self._cache.claimant(self._plan.blocks[number].name),
            time.monotonic() - self._moved,
        )
        self._moved = time.monotonic()
        return Handed([number], {})

    def _go_alone(self, doing: str, error: OSError) -> None:
        self._shares = False
        log.warning(
            "the reference cache %s cannot be %s (%s): missing values are computed for this "
            "run alone; reference.cache_dir= names another folder",
            self._cache.path,
            doing,
            error.strerror or error,
        )

    def _let_go(self, number: int) -> None:
        claim = self._claims.pop(number, None)
        if claim is not None:
            claim.release()

    def _read(self, number: int) -> Logps | None:
        return self._cache.read(*self._responses(number))

    def _responses(self, number: int) -> tuple[str, Keys, Lengths]:
        """A block's name, and the keys and lengths of its responses."""
        responses, members = self._plan.responses, self._plan.members(number)
        name = self._plan.blocks[number].name
        return name, responses.keys[members], responses.lengths[members]
