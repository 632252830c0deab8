"""The check of what is read from the cache: a few rows, by the model itself."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_lightning.errors import UserError
from dpo_lightning.reference.cache import ReferenceCache
from dpo_lightning.reference.spot_check import check_stored
from tests.support.batches import make_groups
from tests.support.models import make_model
from tests.support.reference_caches import (
    FACTS,
    GROUPS,
    MANY,
    CountingScorer,
    fill,
    pair,
)


class Planned(CountingScorer):
    def plan(self, batch):
        return None


def check(groups, folder=Path("there"), *, scorer=None, dtype=torch.float32, model=None) -> None:
    check_stored(
        groups,
        folder,
        load=lambda: torch.nn.Linear(1, 1) if model is None else model,
        scorer=scorer or Planned(),
        device=torch.device("cpu"),
        precision=contextlib.nullcontext,
        dtype=dtype,
    )


def stored(tmp_path, groups=MANY):
    """Groups as a second run reads them."""
    cache = ReferenceCache(tmp_path, FACTS)
    fill(cache, groups)
    [found], reference = fill(cache, groups)
    assert (reference.computed, reference.folder) == (0, cache.path)
    assert list(reference.read) == [*range(len(groups))]
    return found


def test_right_values_pass_and_few_rows_are_computed(tmp_path):
    scorer = Planned()
    check(stored(tmp_path), scorer=scorer)
    assert 4 <= len({prompt for prompt, _ in scorer.seen}) <= 6
    # From one end to the other.
    assert {(1, 0), (1, 39)} <= {prompt for prompt, _ in scorer.seen}


@pytest.mark.parametrize("off", [0.01, -0.01, float("nan")])
def test_another_value_is_refused_with_the_folder_and_the_row(tmp_path, off):
    groups = stored(tmp_path)
    for group in groups:
        group.reference_logps[1] += off
    with pytest.raises(UserError, match=r"the cache there has .* of f:1, .*delete that folder"):
        check(groups)


@pytest.mark.parametrize("place", ["longest", "shortest", "first", "last"])
def test_one_wrong_row_is_found_where_the_others_are_right(tmp_path, place):
    """A window that was edited changes the rows that are longer than it, and no other."""
    longest, shortest = pair((1, 2, 3), (4, 5, 6, 7, 0), (8, 0)), pair((3,), (0,), (4,))
    groups = stored(tmp_path, [*MANY[:13], longest, *MANY[13:29], shortest, *MANY[29:]])
    number = {"longest": 13, "shortest": 30, "first": 0, "last": -1}[place]
    groups[number].reference_logps[0] -= 0.1
    with pytest.raises(UserError, match="delete that folder"):
        check(groups)


def test_rounding_passes_by_the_type_that_is_computed_in(tmp_path):
    groups = stored(tmp_path)
    for group in groups:
        group.reference_logps[:] += 0.05
    check(groups, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"rounding in torch\.float32"):
        check(groups)


def test_of_many_responses_the_longest_and_the_shortest_are_scored(tmp_path):
    group = pair((9,), (3, 0), (4, 5, 6, 0), (5, 4, 0), (7,), (8, 0))
    scorer = Planned()
    check(stored(tmp_path, [group]), scorer=scorer)
    assert {response for _, response in scorer.seen} == {(4, 5, 6, 0), (7,)}


def test_nothing_read_is_nothing_to_load(tmp_path):
    _, reference = fill(ReferenceCache(tmp_path, FACTS), GROUPS)
    assert list(reference.read) == []
    check_stored(
        [], reference.folder, load=lambda: 1 / 0, scorer=CountingScorer(),
        device=torch.device("cpu"), precision=contextlib.nullcontext, dtype=torch.float32,
    )  # fmt: skip


def test_rows_that_were_there_before_are_told_from_those_computed_now(tmp_path, monkeypatch):
    """The last prompt's seven tokens are a block, and the nine of the other are one."""
    monkeypatch.setattr("dpo_lightning.reference.blocks._LEAST_BLOCK_TOKENS", 10)
    cache = ReferenceCache(tmp_path, FACTS)
    fill(cache, GROUPS[2:], budget=1)
    _, reference = fill(cache, GROUPS, budget=1)
    assert (list(reference.read), reference.computed) == ([2], 2)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_what_is_drawn_stay_as_they_were(training):
    from dpo_lightning.models.scoring import Scorer

    model = make_model("llama").train(training)
    scorer = Scorer("flat")
    scorer.prepare(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = make_groups()
    for group in groups:
        object.__setattr__(
            group, "reference_logps", np.zeros(len(group.responses), dtype=np.float32)
        )
    drawn = torch.random.get_rng_state()
    with pytest.raises(UserError):
        check(groups, scorer=scorer, model=model)
    assert model.training is training
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
