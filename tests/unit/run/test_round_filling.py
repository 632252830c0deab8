"""Reference values of rounds: of the start, of the policy as it is, and never of one that moved."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_lightning import assets
from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.data.rounds import RoundPlan
from dpo_lightning.errors import CorruptArtifactError
from dpo_lightning.models.probe import choose_path
from dpo_lightning.reference.cache import ReferenceCache
from dpo_lightning.reference.fill import Watch
from dpo_lightning.reference.kinds import CachedReference, NoReference
from dpo_lightning.run.placement import _seen
from dpo_lightning.run.rounds.filling import (
    Filling,
    Moment,
    ParkedModel,
    _as_it_was,
    fill_round,
)

WATCH = Watch()


def bundled():
    return AutoModelForCausalLM.from_pretrained(Path(assets.__path__[0]) / "tiny_llama").eval()


@pytest.fixture(scope="module")
def groups():
    task = ControlledTask()
    return task.groups(6, seed=3, reference_logps=task.outcome_logps(bundled()))


def filling_of(folder: Path, policy, *, previous: bool, reference=None) -> Filling:
    start = bundled()
    scorer, _ = choose_path(policy, max_length=64)
    scorer.prepare(start)
    return Filling(
        reference=reference or CachedReference(rows=10, computed=4),
        previous=previous,
        start=ParkedModel(lambda: start, parks=True),
        cache=lambda weights, own: ReferenceCache(own or folder / "shared", {"w": weights or "s"}),
        policy=policy,
        scorer=scorer,
        device=torch.device("cpu"),
        precision=lambda: torch.autocast("cpu", enabled=False),
        dtype=torch.float32,
        micro_batch_tokens=64,
        per_token=False,
        threads=None,
    )


def moved_policy():
    """The bundled model after what could be some steps."""
    policy = bundled()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.05)
    return policy


def plain_logps(model, group) -> list[float]:
    """Sums over each response, one token after the other."""
    found = []
    for response in group.responses:
        whole = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
        with torch.no_grad():
            logps = model(input_ids=whole).logits[0].log_softmax(-1)
        places = range(len(group.prompt) - 1, whole.shape[1] - 1)
        found.append(sum(float(logps[at, whole[0, at + 1]]) for at in places))
    return found


def moment(folder: Path, *, round: int = 2, moved: bool = False) -> Moment:
    return Moment(round, "hash", folder, moved)


def test_a_round_has_values_of_the_start(tmp_path, groups):
    filling = filling_of(tmp_path, moved_policy(), previous=False)
    now = moment(tmp_path)
    drawn, given = fill_round(filling, groups[:4], groups[4:], [], moment=now, watch=WATCH)
    for group in drawn:
        assert group.reference_logps == pytest.approx(plain_logps(bundled(), group), abs=1e-4)
    assert [group.reference_logps for group in given] == [None, None]
    assert (filling.reference.rows, filling.reference.computed) == (14, 8)


def test_a_round_has_values_of_the_policy_that_drew_it(tmp_path, groups):
    """The given rows that its steps have too, and no others."""
    policy = moved_policy()
    filling = filling_of(tmp_path, policy, previous=True)
    now = moment(tmp_path)
    drawn, given = fill_round(filling, groups[:4], groups[4:], [1], moment=now, watch=WATCH)
    for group in (*drawn, given[1]):
        expected = plain_logps(moved_policy(), group)
        assert group.reference_logps == pytest.approx(expected, abs=1e-4)
        assert group.reference_logps != pytest.approx(plain_logps(bundled(), group), abs=1e-2)
    assert given[0].reference_logps is None
    assert [path.name for path in (tmp_path / "rounds").iterdir()] == [".reference"]


def test_a_resumed_round_has_the_values_that_were_kept(tmp_path, groups):
    """By then the policy has moved on, and would give others."""
    policy = moved_policy()
    filling = filling_of(tmp_path, policy, previous=True)
    first, _ = fill_round(filling, groups, [], [], moment=moment(tmp_path), watch=WATCH)
    with torch.no_grad():
        policy.get_output_embeddings().weight.mul_(1.1)
    later = moment(tmp_path, moved=True)
    again, _ = fill_round(filling, groups, [], [], moment=later, watch=WATCH)
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.reference_logps, other.reference_logps)


def test_values_of_a_policy_that_moved_on_are_not_made_up(tmp_path, groups):
    filling = filling_of(tmp_path, moved_policy(), previous=True)
    with pytest.raises(CorruptArtifactError, match="the policy has moved on since; put them back"):
        fill_round(filling, groups, [], [], moment=moment(tmp_path, moved=True), watch=WATCH)


def test_the_policy_of_the_first_round_is_the_start(tmp_path):
    filling = filling_of(tmp_path, moved_policy(), previous=True)
    assert _as_it_was(filling, moment(tmp_path, round=1, moved=True)) is filling.start.load()


def test_without_a_cached_reference_there_is_nothing_to_fill(tmp_path, groups):
    filling = filling_of(tmp_path, moved_policy(), previous=False, reference=NoReference())
    drawn, _ = fill_round(filling, groups, [], [], moment=moment(tmp_path), watch=WATCH)
    assert drawn is groups
    assert list(tmp_path.iterdir()) == []


def test_the_start_is_loaded_once_and_parked():
    made = []

    def make():
        made.append(torch.nn.Linear(1, 1, device="meta"))
        return made[-1]

    parked = ParkedModel(make, parks=False)
    parked.park()
    assert parked.load() is parked.load()
    parked.park()
    assert len(made) == 1


def test_given_rows_of_the_start_alone_are_filled_beforehand():
    """With the policy before as the reference a round fills its own."""
    own = RoundPlan(1, 4, None, 2, 6, 0.25, 5)

    def plan(previous: bool):
        settings = SimpleNamespace(previous=previous)
        rounds = SimpleNamespace(settings=settings, plan=own)
        return SimpleNamespace(batches=SimpleNamespace(rounds=rounds))

    assert np.flatnonzero(_seen(plan(False), 50)).tolist() == own.given_rows_of(1, 50)
    assert _seen(plan(True), 50).sum() == 0
