"""The rows that a run's first steps see."""

import numpy as np
import pytest

from dpo_lightning.data.datamodule import rows_of_steps
from dpo_lightning.data.packing import epoch_order


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 9])
def test_the_rows_of_a_runs_first_steps_are_those_that_it_serves(steps):
    """Ten groups in steps of four: four, eight and, with the third, all, then all again."""
    seen = rows_of_steps(10, batch_size=4, steps=steps, seed=3)
    order = epoch_order(10, seed=3, epoch=0)
    assert {*np.flatnonzero(seen).tolist()} == {*order[: 4 * steps]}
    assert seen.sum() == min(10, 4 * steps)
