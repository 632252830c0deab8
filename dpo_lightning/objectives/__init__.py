"""Pure maths on tensors: the preference losses and the partition function. Imports torch alone.

In: log-probabilities, lengths, groups and ranks. Out: a loss for each pair or group, and log Z.

What is exported here is imported when it is asked for: settings are checked against `registry`,
`objective` and `losses`, which do without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_lightning.objectives.closed_form import fit_tabular_policy
    from dpo_lightning.objectives.listwise import listwise_loss
    from dpo_lightning.objectives.losses import PairLogps
    from dpo_lightning.objectives.pairwise import pairwise_loss
    from dpo_lightning.objectives.partition import (
        StreamedPartition,
        estimate_log_partition,
        exact_log_partition,
        group_shares,
        log_partition,
        optimal_logps,
    )
    from dpo_lightning.objectives.registry import (
        LISTWISE_LOSSES,
        PAIRWISE_LOSSES,
        UNPAIRED_LOSSES,
        PairwiseLoss,
        register_loss,
    )
    from dpo_lightning.objectives.unpaired import unpaired_loss

_HOMES = {
    "LISTWISE_LOSSES": "registry",
    "PAIRWISE_LOSSES": "pairwise",
    "PairLogps": "losses",
    "PairwiseLoss": "registry",
    "StreamedPartition": "partition",
    "UNPAIRED_LOSSES": "registry",
    "estimate_log_partition": "partition",
    "exact_log_partition": "partition",
    "group_shares": "partition",
    "fit_tabular_policy": "closed_form",
    "listwise_loss": "listwise",
    "log_partition": "partition",
    "optimal_logps": "partition",
    "pairwise_loss": "pairwise",
    "register_loss": "registry",
    "unpaired_loss": "unpaired",
}

__all__ = [
    "LISTWISE_LOSSES",
    "PAIRWISE_LOSSES",
    "UNPAIRED_LOSSES",
    "PairLogps",
    "PairwiseLoss",
    "StreamedPartition",
    "estimate_log_partition",
    "exact_log_partition",
    "fit_tabular_policy",
    "group_shares",
    "listwise_loss",
    "log_partition",
    "optimal_logps",
    "pairwise_loss",
    "register_loss",
    "unpaired_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
