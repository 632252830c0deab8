"""Loss scaling: float16 gradients that are computed large, and steps that are taken again.

Small gradients are zero in float16. So the loss of every micro-batch is multiplied by a scale
before its backward pass, and the sum of the gradients, float32, is divided by it once before it is
clipped. Where a gradient is then not finite the scale was too large: no step is taken, no weight,
moment, schedule or number of steps changes, the scale is halved and *the same groups* are scored
again. So a step is always of its own groups, and the plan of the data stays a function of the
number of steps; a checkpoint never falls between the two tries.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.optim import Optimizer

from dpo_lightning.training.outcome import Outcome

log = logging.getLogger(__name__)

# A scale that makes nothing larger: what overflows with it would do so without.
_LEAST_SCALE = 1.0


class Float16Precision(Precision):
    """Precision plugin of ``16-mixed``: float16 by autocast, and torch's ``GradScaler``.

    Lightning's own takes the step of the scaler inside its optimizer step, where a step of several
    micro-batches has been clipped already, and on a CPU it is bfloat16.

    Args:
        device: Kind of device.
        autocast: True if each operation chooses its type; False if the weights are gathered in
            float16.

    Attributes:
        skipped: Tries at a step that were given up for an overflow, since the run began.
    """

    precision = "16-mixed"

    def __init__(self, device: str, *, autocast: bool = True) -> None:
        self.scaler = torch.amp.GradScaler(device)
        self.skipped = 0
        self._device = device
        self._autocast = autocast

    @contextlib.contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """The context of all that Lightning has the module compute."""
        with contextlib.ExitStack() as stack:
            if self._autocast:
                stack.enter_context(torch.autocast(self._device, dtype=torch.float16))
            yield

    def pre_backward(self, tensor: Tensor, module: Any) -> Tensor:
        """Scales a loss."""
        scaled: Tensor = self.scaler.scale(tensor)
        return super().pre_backward(scaled, module)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divides the gradients of a whole step by the scale; the host does not wait."""
        self.scaler.unscale_(optimizer)

    def tries_again(self, optimizer: Optimizer, outcome: Outcome, *, said: str | None) -> bool:
        """Ends a try at a step; the same on all ranks, as the outcome is.

        Args:
            optimizer: Whose gradients were divided.
            outcome: What all ranks found.
            said: The step as messages name it; None on ranks that say nothing.

        Returns:
            True if the scale is lower now and the groups are to be scored again. False where the
            step can be taken, or no scale would help: with a loss that is not finite, or a scale
            of 1.
        """
        overflows = outcome.loss and not outcome.gradients
        if not outcome.loss or (overflows and self.scale() <= _LEAST_SCALE):
            self.scaler.update(self.scale())  # as it was
            return False
        # A norm may be infinite by gradients that are not, or by those of another rank's shards.
        for found in self.scaler._found_inf_per_device(optimizer).values():
            found.fill_(float(overflows))
        self.scaler.update()
        if overflows:
            self.skipped += 1
            if said is not None:
                log.info(
                    "%s: its gradients overflow in float16, and no step is taken; its groups are "
                    "scored again with the loss scaled by %g",
                    *(said, self.scale()),
                )
        return overflows

    def scale(self) -> float:
        """The scale of the next loss."""
        return float(self.scaler.get_scale())

    def state_dict(self) -> dict[str, Any]:
        """The scale, how long it has been right, and the count; plain numbers."""
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.scaler.load_state_dict(state_dict["scaler"])
        self.skipped = state_dict["skipped"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says so if a checkpoint knows of no scale."""
        if type(self).__qualname__ not in checkpoint:
            log.info(
                "resume: the checkpoint has no loss scale, as its run had another "
                "trainer.precision; it starts at %g",
                self.scale(),
            )
