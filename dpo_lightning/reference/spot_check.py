"""Check of what a run takes from the cache: a few rows of it, by the model itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_lightning.data.packing import collate_groups
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.models.scoring import Scorer

# Rows that are computed again.
_ROWS = 6
# Difference that rounding can explain, per token and beside it, by the type computed in. In half
# precision the value of one rare token may be off by some tenths of a nat.
_PER_TOKEN = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_BESIDE = {torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 5e-1}


@torch.no_grad()
def check_stored(
    groups: Sequence[TokenGroup],
    folder: Path,
    *,
    load: Callable[[], Any],
    scorer: Scorer,
    device: torch.device,
    precision: Callable[[], contextlib.AbstractContextManager[Any]],
    dtype: torch.dtype,
) -> None:
    """Refuses a cache that holds other values than the model gives.

    The model is left as it was, and nothing is drawn. Ranks that share a model call it together.

    Args:
        groups: Rows whose log-probabilities were read, in the order of the data.
        folder: Where they were read.
        load: Gives the reference, prepared by ``scorer``; called where there is something to check.
        scorer: Scores the rows.
        device: Where to compute.
        precision: The context to compute in.
        dtype: Type that is computed in.

    Raises:
        UserError: If a value differs by more than rounding explains.
    """
    chosen = _spread(groups)
    if not chosen:
        return
    model = load().to(device)
    training = model.training
    model.eval()
    try:
        for group in chosen:
            batch = collate_groups([group], [0]).to(device)
            with precision():
                live = scorer.logps(model, batch, scorer.plan(batch))
            assert group.reference_logps is not None
            differences = (live.float().cpu() - torch.from_numpy(group.reference_logps)).abs()
            allowed = _PER_TOKEN[dtype] * batch.lengths.cpu() + _BESIDE[dtype]
            # A value that is no number is no match.
            wrong = (~(differences <= allowed)).nonzero().flatten().tolist()
            if wrong:
                _refuse(folder, group, wrong[0], live[wrong[0]].item(), dtype)
    finally:
        model.train(training)


def _spread(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """A few rows: the longest, the shortest, and some from all over the data, of two responses."""
    if not groups:
        return []
    lengths = [len(g.prompt) + max(map(len, g.responses)) for g in groups]
    places = np.linspace(0, len(groups) - 1, _ROWS - 2).round().astype(int).tolist()
    numbers = {int(np.argmax(lengths)), int(np.argmin(lengths)), *places}
    return [_two_responses(groups[number]) for number in sorted(numbers)]


def _two_responses(group: TokenGroup) -> TokenGroup:
    """A group's shortest and longest response, with their stored values."""
    order = sorted(range(len(group.responses)), key=lambda k: len(group.responses[k]))
    kept = sorted({order[0], order[-1]} if len(order) > 2 else {*order})
    assert group.reference_logps is not None
    return replace(
        group,
        responses=tuple(group.responses[k] for k in kept),
        ranks=(1,) * len(kept),
        reference_logps=group.reference_logps[kept],
        reference_token_logps=None,
    )


def _refuse(folder: Path, group: TokenGroup, place: int, live: float, dtype: torch.dtype) -> None:
    assert group.reference_logps is not None
    raise UserError(
        f"reference: the cache {folder} has the log-probability "
        f"{group.reference_logps[place]:.6g} for a response of {group.source}, the model gives it "
        f"{live:.6g}, and rounding in {dtype} does not explain that: another program wrote it, or "
        "the model computes otherwise than its files say; delete that folder, and its rows are "
        "computed again, or name another with reference.cache_dir="
    )
