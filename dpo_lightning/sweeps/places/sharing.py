"""Shares of GPUs: several trials on one, where the estimates of their memory say that they fit.

A trial decides as if it were alone, so its results are those that it would have alone; two are put
on one GPU only if what each would take there fits beside the other. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from dpo_lightning.memory.gpus import short_name
from dpo_lightning.settings.program import importing
from dpo_lightning.sweeps.trials import Plan

log = logging.getLogger(__name__)

# More processes on one GPU than this only wait for each other.
MOST_PER_GPU = 4
# Of a GPU's memory, what estimates may come to together; as for one run alone.
_ACCEPTED = Fraction(93, 100)
_PROGRAM = ("-m", "dpo_lightning.run.needs")
_SECONDS = 600.0

Shares = Mapping[str, Fraction]
"""Part of each device that a trial takes; of one that is not named it takes all."""

Estimate = Callable[[Sequence[tuple[int, Sequence[str]]]], Sequence[int]]
"""Bytes that runs take: of each the bytes of a GPU, and its arguments."""


def fixed_shares(plans: Sequence[Plan], devices: Sequence[str], count: int) -> dict[str, Shares]:
    """Equal parts for each trial of one device, by its hash.

    Args:
        plans: The trials on devices of that kind.
        devices: The devices.
        count: Trials on each at a time.
    """
    return {
        plan.settings_hash: dict.fromkeys(devices, Fraction(1, count))
        for plan in plans
        if plan.width == 1
    }


def estimated_shares(
    plans: Sequence[Plan], memory: Mapping[str, int], *, most: int, estimate: Estimate
) -> dict[str, Shares]:
    """Parts of GPUs that trials of one device take by their estimates, by the trial's hash.

    Args:
        plans: The trials on GPUs.
        memory: Bytes of each GPU that may be shared.
        most: Trials on one at a time at most.
        estimate: Estimates runs; it is called once, with one of each kind.
    """
    alone = [plan for plan in plans if plan.width == 1]
    if most < 2 or not alone or not memory:
        return {}
    kinds = {
        (plan.memory, size): (size, plan.arguments) for plan in alone for size in {*memory.values()}
    }
    try:
        found = estimate([*kinds.values()])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.warning(
            "the memory of the trials cannot be estimated, so each has a GPU of its own: %s", error
        )
        return {}
    needs = dict(zip(kinds, found, strict=True))

    def share(plan: Plan, size: int) -> Fraction:
        part = Fraction(needs[plan.memory, size]) / (_ACCEPTED * size)
        return min(Fraction(1), max(part, Fraction(1, most)))

    return {
        plan.settings_hash: {device: share(plan, size) for device, size in memory.items()}
        for plan in alone
    }


def most_at_once(device: str, shares: Mapping[str, Shares]) -> int:
    """Number of trials that a device takes at a time at most.

    Args:
        device: Its name.
        shares: Of each trial, by its hash.
    """
    return max((int(1 / part[device]) for part in shares.values() if device in part), default=1)


def say_shared(devices: Sequence[str], shares: Mapping[str, Shares]) -> None:
    """Says which devices take several trials at a time, and how each gets its own."""
    for device in devices:
        count = most_at_once(device, shares)
        if count > 1:
            log.info(
                "%s takes up to %d trials at a time (hydra.launcher.trials_per_device)",
                *(short_name(device), count),
            )


def estimate_apart(runs: Sequence[tuple[int, Sequence[str]]]) -> list[int]:
    """Estimates runs in a process of its own.

    Args:
        runs: Of each the bytes of a GPU, and its arguments.

    Raises:
        ValueError: With the reason, if one cannot be estimated.
        OSError: If no process can be started.
        SubprocessError: If it takes too long.
    """
    done = subprocess.run(
        [sys.executable, *_PROGRAM],
        input=json.dumps([[size, [*arguments]] for size, arguments in runs]),
        env=importing(os.environ) | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode or not said:
        raise ValueError(said[-1] if said else f"it ended with exit code {done.returncode}")
    return [int(size) for size in json.loads(said[-1])]
