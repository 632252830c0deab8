"""The order of the groups in an epoch, which a resumed run must find as it was."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.packing import epoch_order
from tests.support.batches import random_groups
from tests.support.properties import examples


@given(n=st.integers(1, 300), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 50))
@settings(max_examples=examples(50))
def test_an_order_is_a_permutation_that_repeats(n, seed, epoch):
    order = epoch_order(n, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(n))
    assert all(type(i) is int for i in order)
    assert order == epoch_order(n, seed=seed, epoch=epoch)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch_order(50, seed=s, epoch=e)) for s in range(4) for e in range(4)}
    assert len(orders) == 16
    assert tuple(range(50)) not in orders


@pytest.mark.parametrize(
    ("seed", "epoch", "order"),
    [
        (1, 0, [8, 11, 4, 7, 5, 0, 1, 9, 2, 10, 6, 3]),
        (1, 1, [6, 2, 4, 9, 7, 1, 0, 3, 5, 11, 8, 10]),
        (0, 1, [0, 7, 1, 11, 3, 10, 4, 6, 9, 8, 2, 5]),
        (7, 3, [4, 2, 5, 8, 7, 3, 11, 10, 0, 1, 9, 6]),
    ],
)
def test_the_orders_of_old_checkpoints_stay(seed, epoch, order):
    """Literal numbers: nothing else says what they should be, and NumPy may change its draws.

    A checkpoint holds how many groups were seen and not which. It goes on at that place of this
    order: with any other, some groups would be seen twice in the epoch and some never, and nobody
    would be told. So whoever changes these numbers has to refuse the checkpoints of before.
    """
    assert epoch_order(12, seed=seed, epoch=epoch) == order


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_run_that_goes_on_has_the_groups_of_the_steps_that_are_left(taken):
    """Twelve groups, five a step: the third step of an epoch has the last two, then comes the next.

    The orders are those above, of seed 1.
    """
    data = PreferenceDataModule(
        train_groups=random_groups(12), eval_groups=[], batch_size=5, micro_batch_tokens=64,
        total_steps=6, seed=1, shared=True, num_workers=0,
    )  # fmt: skip
    data.trainer = SimpleNamespace(global_step=taken, global_rank=0, world_size=1)
    steps = [
        {row for micro in step.micro_batches for row in micro.rows}
        for step in data.train_dataloader()
    ]
    first, second = [8, 11, 4, 7, 5, 0, 1, 9, 2, 10, 6, 3], [6, 2, 4, 9, 7, 1, 0, 3, 5, 11, 8, 10]
    whole = [set(order[at : at + 5]) for order in (first, second) for at in (0, 5, 10)]
    assert steps == whole[taken:]
