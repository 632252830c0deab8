"""Calls of a pairwise loss on a few pairs, with default arguments."""

import torch

from dpo_lightning.objectives import pairwise_loss


def loss(name="sigmoid", *, policy, reference=None, lengths=((4, 5),), beta=0.1, **options):
    """Calls a loss; `policy`, `reference` and `lengths` are lists of (chosen, rejected)."""
    dtype = options.pop("dtype", torch.float32)
    policy = torch.tensor(policy, dtype=dtype)
    sides = None if reference is None else torch.tensor(reference, dtype=dtype)
    lengths = torch.tensor(lengths).expand(len(policy), 2)
    return pairwise_loss(
        name,
        policy_chosen_logps=policy[:, 0],
        policy_rejected_logps=policy[:, 1],
        reference_chosen_logps=None if sides is None else sides[:, 0],
        reference_rejected_logps=None if sides is None else sides[:, 1],
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        beta=beta,
        **options,
    )
