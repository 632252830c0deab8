"""Meetings of ranks over the store that they found each other by, before they talk by a collective.

A collective that others are late for is ended after ``strategy.timeout_minutes``, and with it the
run. What makes a rank late is as a rule a disk: weights that are read, a cache that another process
holds, a checkpoint that is written. So ranks wait for that here, where a wait costs nothing, and
begin the collective together.
"""

from __future__ import annotations

import datetime
import time

import torch
from torch.distributed.distributed_c10d import _get_default_store

from dpo_lightning.errors import DpoLightningError

# Where a rank is gone whoever started it ends the others; this is for what nobody notices.
LONGEST_WAIT = datetime.timedelta(days=1)

_ARRIVALS = "dpo-lightning/arrivals"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.25


def meet(longest: datetime.timedelta = LONGEST_WAIT) -> None:
    """Waits until all ranks are here; nothing where there is one.

    Every rank has to come as often as the others. Signals are noticed meanwhile, as the wait is
    Python's own.

    Args:
        longest: How long this rank waits.

    Raises:
        DpoLightningError: If the others do not come.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    store, size = _get_default_store(), torch.distributed.get_world_size()
    # Nobody comes to the next meeting before all came to this one, so one counter is enough.
    arrival = int(store.add(_ARRIVALS, 1))
    everyone = -(-arrival // size) * size
    deadline = time.monotonic() + longest.total_seconds()
    pause = _FIRST_PAUSE
    while (here := int(store.add(_ARRIVALS, 0))) < everyone:
        if time.monotonic() > deadline:
            raise DpoLightningError(
                f"rank {torch.distributed.get_rank()} waited {longest} for {everyone - here} other "
                "ranks, which are gone or still read from a disk"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
