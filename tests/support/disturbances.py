"""A plugin that disturbs a run: not-a-number losses, too little memory, crashes, slow steps.

``DISTURB=kind:step:rank`` in the environment says which, at which step, and on which rank; a pause
ends when the file of ``DISTURB_GO`` is there.
"""

import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from dpo_lightning.plugins import register_callback


@register_callback("disturb")
def disturb() -> Callback:
    return Disturbance()


class Disturbance(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        kind, step, rank = os.environ["DISTURB"].split(":")
        if trainer.global_step + 1 != int(step) or trainer.global_rank != int(rank):
            return
        if kind == "sleep":
            print("asleep", flush=True)
            while True:
                time.sleep(1)
        elif kind == "pause":
            print("paused", flush=True)
            while not Path(os.environ["DISTURB_GO"]).exists():
                time.sleep(0.01)
        elif kind == "crash":
            raise ValueError("a fault that nobody foresaw")
        elif kind == "vanish":
            os._exit(9)
        else:
            compare = pl_module._compare

            def disturbed(batch, **options):
                del pl_module._compare
                if kind == "memory":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
                found = compare(batch, **options)
                if kind == "gradient":
                    found.loss.register_hook(lambda gradient: gradient * torch.nan)
                    return found
                sums = found.sums.clone()
                sums[0] = torch.nan
                # A finite gradient beside a loss that is none, or both.
                loss = found.loss * torch.nan if kind == "nan" else found.loss
                return replace(found, loss=loss, sums=sums)

            pl_module._compare = disturbed
