"""Answers of a batch, token after token, until all have ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_lightning.data.tokens import Ids
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.noise import draw_tokens
from dpo_lightning.evaluation.writers import Writer

# Answers that have ended leave a batch when they are this share of it: each time keys are copied.
_ENDED = 0.125
# Steps from one look at which answers have ended to the next, where a look waits for the device.
_LOOK_EVERY = 8


@dataclass(frozen=True, slots=True)
class WrittenRows:
    """Answers of a batch, and what each is drawn with.

    Attributes:
        keys: Of the noise of each.
        limits: Most tokens of each.
        ends: Tokens that end one.
        temperature: Of all.
        together: True if all ranks draw the same answers, of a sharded model.
    """

    keys: list[int]
    limits: list[int]
    ends: list[int]
    temperature: float
    together: bool

    def write(
        self, writer: Writer, prompts: Sequence[Ids], owners: Sequence[int], *, eager: bool
    ) -> list[Ids]:
        """Draws token after token until all answers have ended.

        Args:
            writer: Gives the scores.
            prompts: Token ids of each prompt.
            owners: The prompt of each answer, ascending.
            eager: True if an answer that has ended has to leave the batch at once.
        """
        scores = writer.begin(prompts, owners)
        device = scores.device
        keys, limits, stops = (
            torch.tensor(values, dtype=torch.int64, device=device)
            for values in (self.keys, self.limits, self.ends)
        )
        lengths = torch.zeros_like(limits)
        written = torch.zeros(len(owners), max(self.limits), dtype=torch.int64, device=device)
        alive = torch.arange(len(owners), device=device)
        sound = torch.ones(len(owners), dtype=torch.bool, device=device)
        look = 1 if eager or _looks_at_each(device) else _LOOK_EVERY
        for step in range(max(self.limits)):
            tokens, finite = draw_tokens(scores, keys[alive], step, temperature=self.temperature)
            if self.together:
                # They computed the same; what follows must be the same to the bit.
                torch.distributed.broadcast(tokens, src=0)
            written[alive, step] = tokens
            unended = lengths[alive] == 0
            sound[alive] &= finite | ~unended
            ends = unended & (torch.isin(tokens, stops) | (limits[alive] == step + 1))
            lengths[alive] = torch.where(ends, step + 1, lengths[alive])
            if (step + 1) % look == 0:
                open_rows = (lengths[alive] == 0).nonzero()[:, 0].tolist()
                _require_finite(sound)
                if not open_rows:
                    break
                ended = len(alive) - len(open_rows)
                if ended and (eager or ended >= _ENDED * len(alive)):
                    writer.keep(open_rows)
                    alive, tokens = alive[open_rows], tokens[open_rows]
            if step + 1 < max(self.limits):
                scores = writer.next(tokens)
        _require_finite(sound)
        return _cut(written, lengths)


def _looks_at_each(device: torch.device) -> bool:
    """True where it costs nothing to look at tensors of a device."""
    return device.type == "cpu"


def _require_finite(sound: Tensor) -> None:
    if not bool(sound.all()):
        raise UserError(
            "sampling: the model's scores of the next token are not finite; its training has "
            "diverged: lower optimizer.lr, or go on from an earlier checkpoint"
        )


def _cut(written: Tensor, lengths: Tensor) -> list[Ids]:
    """Answers of their lengths, out of rows (N, R)."""
    rows = written.cpu().numpy().astype(np.int32)
    return [row[:length].copy() for row, length in zip(rows, lengths.tolist(), strict=True)]
