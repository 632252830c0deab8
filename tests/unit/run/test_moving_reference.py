"""A reference that moves, as a run tells of it: header, card, identity, other betas."""

from types import SimpleNamespace
from typing import Any

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.reference.moving import Movement
from dpo_lightning.run.beta_path import place_of, why_no_beta_of
from dpo_lightning.run.card import CardFacts, model_card
from dpo_lightning.run.header import _reference
from dpo_lightning.run.identity import identity_of
from dpo_lightning.run.prepare import movement_of
from dpo_lightning.settings.schema import Config
from dpo_lightning.training.checkpoints.files import changed_settings

HASHES = dict.fromkeys(("data", "weights", "reference", "reference_config"), "")


def config_of(every: int | None = None, alpha: float = 0.6) -> Config:
    config = Config()
    config.reference.sync_every, config.reference.sync_alpha = every, alpha
    return config


def identity(config: Config) -> dict[str, Any]:
    return identity_of(config, HASHES, numbers={})


def test_the_settings_are_the_movement():
    assert movement_of(config_of()) is None
    assert movement_of(config_of(64, 0.25)) == Movement(64, 0.25)


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ((None, 0.6), (64, 0.6), {"reference.sync_every", "reference.sync_alpha"}),
        ((64, 0.6), (32, 0.6), {"reference.sync_every"}),
        ((64, 0.6), (64, 0.5), {"reference.sync_alpha"}),
        ((64, 0.6), (64, 0.6), set()),
        # Nothing moves, whatever the share would be.
        ((None, 0.6), (None, 0.5), set()),
    ],
)
def test_a_resume_has_to_agree_about_it(before, now, changed: set[str]):
    found = changed_settings(identity(config_of(*before)), identity(config_of(*now)))
    assert {*found} == changed


def test_a_policy_of_a_moved_reference_is_no_optimum_of_another_beta():
    """π_ref·exp(r/β)/Z has one π_ref; and a run without it keeps its path."""
    assert why_no_beta_of(config_of()) is None
    assert "the reference moved over the run" in (why_no_beta_of(config_of(64)) or "")
    with pytest.raises(UserError, match=r"--at-beta=0\.05: the reference moved over the run"):
        place_of(0.05, config_of(64), trained=True, flag="--at-beta=")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ({}, False),  # a run of before
        ({"sync_every": None, "sync_alpha": 0.6}, False),
        ({"sync_every": 1024, "sync_alpha": 0.6}, True),
    ],
)
def test_the_card_has_the_updates(reference: dict[str, Any], said: bool):
    result = {
        **{"beta": 0.25, "loss": "ipo", "seed": 7, "step": 12, "command": "train", "metrics": {}},
        "data": {"train_groups": 11, "eval_groups": 9, "dropped": {}},
        "model": {"name": "tiny", "parameters": 2000, "trainable": 300},
    }
    settings = {
        "model": {"pretrained": None},
        "data": {"train": None, "batch_size": 16},
        "peft": {"kind": "none", "adapter": None, "dora": False},
        "reference": {"kind": "auto", "pretrained": None, "adapter": None} | reference,
        "optimizer": {"name": "adamw", "lr": 5e-6, "schedule": "cosine"},
    }
    text = model_card(CardFacts("run", result, settings), adapter=False).text
    row = "| reference's updates | every 1,024 steps, the policy's share 0.6 |"
    assert (row in text) is said
    assert ("updates" in text) is said


@pytest.mark.parametrize(
    ("movement", "line"),
    [
        (None, "initial policy (frozen)"),
        (Movement(64, 0.6), "initial policy (every 64 steps 0.6 policy + 0.4 reference)"),
        (Movement(64, 1.0), "initial policy (becomes the policy every 64 steps)"),
    ],
)
def test_the_header_has_the_updates(movement: Movement | None, line: str):
    models: Any = SimpleNamespace(reference=object(), adapters=None, movement=movement)
    plan: Any = SimpleNamespace(
        names=SimpleNamespace(reference=None, frozen_adapter=None),
        batches=SimpleNamespace(rounds=None),
    )
    assert _reference(plan, models) == line
