"""Groups and micro-batches of random ids, and the comparison of their scores."""

import numpy as np
import torch

from dpo_lightning.data.packing import (
    GroupBatch,
    collate_groups,
)
from dpo_lightning.data.tokens import TokenGroup
from tests.support.models import VOCABULARY


def make_groups() -> list[TokenGroup]:
    """K = 2, 3 and 5, prompts from one token on, ties, unequal lengths and weights."""
    draw = np.random.default_rng(7)

    def ids(n: int) -> np.ndarray:
        return draw.integers(3, VOCABULARY, n).astype(np.int32)

    return [
        TokenGroup(ids(7), (ids(5), ids(9)), (1, 2), 1.0, "a", "a"),
        TokenGroup(ids(1), (ids(1), ids(4), ids(6)), (1, 2, 2), 0.5, "b", "b"),
        TokenGroup(
            ids(12), (ids(6), ids(2), ids(3), ids(3), ids(8)), (1, 1, 2, 3, 4), 2.0, "c", "c"
        ),
    ]


def gradients(model) -> torch.Tensor:
    grads = [
        (p.grad if p.grad is not None else torch.zeros_like(p)).flatten()
        for p in model.parameters()
    ]
    return torch.cat(grads)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def batch_of(groups: list[TokenGroup]) -> GroupBatch:
    return collate_groups(groups, range(len(groups)))


def random_groups(count, seed=0, most=12):
    random = np.random.default_rng(seed)

    def ids():
        return random.integers(0, 30, random.integers(1, most)).astype(np.int32)

    return [
        TokenGroup(ids(), (ids(), ids()), (1, 2), float(random.integers(1, 4)), "row", "key")
        for _ in range(count)
    ]
