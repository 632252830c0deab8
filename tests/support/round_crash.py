"""A plugin that kills its run inside a round: while answers, marks, rows or values are made.

``ROUND_CRASH=point:number`` in the environment says where, and the how manieth time. Nothing of
this is in the product: the calls it makes are replaced here.
"""

import os
import signal
from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import Callback

from dpo_lightning.plugins import register_callback, register_scorer
from dpo_lightning.reference.cache import ReferenceCache
from dpo_lightning.run.rounds import drawing, files

POINTS = ("before a batch", "after a batch", "in a mark", "between the files", "in the rows",
          "before values", "after values", "after a step")  # fmt: skip

_counts: dict[str, int] = {}


def at(point: str) -> None:
    """Dies if this is the time."""
    wanted, _, number = os.environ.get("ROUND_CRASH", "").partition(":")
    _counts[point] = _counts.get(point, 0) + 1
    if point == wanted and _counts[point] == int(number):
        os.kill(os.getpid(), signal.SIGKILL)


def around(owner: Any, name: str, *, before: str = "", after: str = "") -> None:
    """Replaces a function by one that may die before or after it."""
    real: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if before:
            at(before)
        found = real(*args, **kwargs)
        if after:
            at(after)
        return found

    setattr(owner, name, call)


@register_scorer("sunny")
def sunny(prompts: list[Any], answers: list[str]) -> list[float]:
    """Marks an answer by its words: two for each sun, less for long ones."""
    at("in a mark")
    return [2.0 * answer.split().count("sun") - 0.3 * len(answer.split()) for answer in answers]


@register_callback("die_after_a_step")
class DieAfterAStep(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        at("after a step")


if "ROUND_CRASH" in os.environ:
    around(drawing.DrawnParts, "keep", before="before a batch", after="after a batch")
    around(ReferenceCache, "publish", before="before values", after="after values")
    around(files, "write_whole", before="in the rows")
    around(files, "write_json", before="between the files")
