"""The share that each pair of a micro-batch has in its group."""

from dataclasses import replace

import pytest

from dpo_lightning.data.packing import GroupBatch, collate_groups
from dpo_lightning.data.tokens import TokenGroup
from tests.support.groups import ids, token_group

# Three responses, the last two tied: two pairs.
THREE = TokenGroup(ids(1), (ids(2), ids(3, 0), ids(4, 0)), (1, 2, 2), 3.0, "row", "key")


def shares(batch: GroupBatch) -> dict[tuple[int, int], float]:
    pairs = zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True)
    return dict(zip(pairs, batch.pair_share.tolist(), strict=True))


def test_the_pairs_of_a_group_share_it_equally_whatever_its_weight():
    found = shares(collate_groups([THREE, token_group()], [0, 1]))
    assert found == {(0, 1): 0.5, (0, 2): 0.5, (3, 4): 1.0}


def test_a_ranking_that_may_be_wrong_counts_the_other_way_round_too():
    """Right with probability 0.8: two pairs of 0.4 each, and of 0.1 each exchanged."""
    doubted = replace(THREE, confidence=0.8)
    found = shares(collate_groups([token_group(), doubted], [0, 1]))
    expected = {(0, 1): 1.0, (2, 3): 0.4, (2, 4): 0.4, (3, 2): 0.1, (4, 2): 0.1}
    assert found == pytest.approx(expected, abs=1e-6)
