"""Pure maths on tensors: the preference losses and the partition function. Imports torch alone."""

from dpo_lightning.objectives.pairwise import (
    PAIRWISE_LOSSES,
    PairLogps,
    PairwiseLoss,
    pairwise_loss,
)
from dpo_lightning.objectives.partition import (
    exact_log_partition,
    log_partition,
    optimal_logps,
)

__all__ = [
    "PAIRWISE_LOSSES",
    "PairLogps",
    "PairwiseLoss",
    "exact_log_partition",
    "log_partition",
    "optimal_logps",
    "pairwise_loss",
]
