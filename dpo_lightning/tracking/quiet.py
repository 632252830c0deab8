"""Warnings of libraries that are not shown, each with the reason why nobody can act on it.

Only these: whatever else a library warns of reaches the user. Imports no torch.
"""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unshown:
    """A warning of a library.

    Attributes:
        begins: Its first words, as they are.
        then: Words that follow later in it; empty for none.
        reason: Reason why it is not shown.
    """

    begins: str
    then: str
    reason: str

    @property
    def pattern(self) -> str:
        """Regular expression that its text matches from the beginning."""
        return re.escape(self.begins) + (f".*{re.escape(self.then)}" if self.then else "")


UNSHOWN = (
    Unshown(
        "The '",
        "does not have many workers which may be a bottleneck",
        "batches are small and made in time; data.num_workers is there for other data",
    ),
    Unshown("You're resuming from a checkpoint", "", "steps are counted by the data module"),
    Unshown("Checkpoint directory", "exists and is not empty", "a resumed run has its own there"),
    Unshown("`isinstance(treespec, LeafSpec)` is deprecated", "", "Lightning calls torch so"),
    Unshown(
        "It is recommended to use `self.log('",
        "sync_dist=True)` when logging on epoch level",
        "sums are reduced over ranks before they are logged",
    ),
    Unshown(
        "torch.distributed.nn.functional.all_gather is deprecated", "", "Lightning calls torch so"
    ),
)

QUIET_LOGGERS = {
    "lightning.pytorch": "its tips and tables; the header says what runs",
    "lightning.fabric": "its tips; the header says what runs",
    "torchao": "kernels of its own that it could not load, which nothing here uses",
    "bitsandbytes": "kernels of its own that it could not load; peft=qlora says what it needs",
    "httpx": "a line for each question to a judge, and for each file of the hub",
    "httpcore": "the same in more words",
    "httpx2": "the same, of a newer client of the hub",
    "httpcore2": "the same in more words",
    "matplotlib.font_manager": "that it listed the machine's fonts, at the first run of all",
    "torch.utils._pytree": "torchao registers enums in a way that torch calls old",
}
"""Loggers that say errors alone, and the reason."""


def hide_warnings() -> None:
    """Adds the filters of :data:`UNSHOWN`, those of the user's environment stay in force."""
    for warning in UNSHOWN:
        warnings.filterwarnings("ignore", message=warning.pattern)


def quiet_loggers() -> None:
    """Has the loggers of :data:`QUIET_LOGGERS` say errors alone."""
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Silences what libraries say in every run and nobody can act on."""
    quiet_transformers()
    quiet_loggers()
    hide_warnings()


def quiet_transformers() -> None:
    """Silences transformers, and with its bars those of the hub."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
