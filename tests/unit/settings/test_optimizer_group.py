"""The ``optimizer`` group with plugins' optimizers: names, options, what is refused, identity."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from dpo_lightning.errors import UserError
from dpo_lightning.plugins import OPTIMIZERS, SHARED_SETTINGS, known_optimizers, register_optimizer
from dpo_lightning.run.identity import identity_of
from dpo_lightning.settings.conduct import OptimizerConfig
from dpo_lightning.settings.fingerprint import hashed_settings
from dpo_lightning.settings.keys import settings
from dpo_lightning.settings.optimizer_group import optimizer_options
from dpo_lightning.settings.schema import Config
from dpo_lightning.settings.store import register, schema
from dpo_lightning.settings.validation import validate

HASHES = dict.fromkeys(("data", "weights", "reference", "reference_config"), "h")


@pytest.fixture(autouse=True)
def _optimizers_as_they_were() -> Iterator[None]:
    before = dict(OPTIMIZERS)
    yield
    choices = ConfigStore.instance().repo.get("optimizer", {})
    for name in OPTIMIZERS.keys() - before.keys():
        choices.pop(f"{name}.yaml", None)
    OPTIMIZERS.clear()
    OPTIMIZERS.update(before)


@pytest.fixture
def heavy() -> str:
    """An optimizer with two options, which reads the rate and the decay alone."""

    @register_optimizer("heavy")
    def heavy(
        groups: Any,
        *,
        lr: float,
        weight_decay: float,
        mass: Annotated[float, {"least": 0, "below": 1}] = 0.9,
        nesterov: bool = False,
    ) -> None: ...

    return "heavy"


def validated(**values: Any) -> Config:
    cfg = schema().copy()
    for key, value in values.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return validate(cfg)


def problem(**values: Any) -> str:
    with pytest.raises(UserError) as caught:
        validated(**values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_its_name_and_options_are_settings(heavy: str):
    assert known_optimizers()[-1] == heavy
    found = settings()["optimizer.mass"]
    assert (found.kind, found.default, found.help) == (
        float, 0.9, "An option of the optimizer. For optimizer=heavy.",
    )  # fmt: skip
    config = validated(optimizer__name=heavy, optimizer__mass=0.5)
    assert optimizer_options(config.optimizer) == {"mass": 0.5, "nesterov": False}
    assert optimizer_options(validated().optimizer) == {}


def test_it_is_a_choice_of_the_group(heavy: str):
    register()
    node = ConfigStore.instance().load(f"optimizer/{heavy}.yaml").node
    assert OmegaConf.to_container(node) == {"name": heavy}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "heavy", "mass": 1.0}, "optimizer.mass=1.0: optimizer=heavy takes a number >= 0"),
        ({"mass": 0.5}, "optimizer=adamw has no such option; leave it out, or use optimizer=heavy"),
        ({"name": "heavy", "eps": 1e-6}, "optimizer.eps=1e-06: optimizer=heavy never reads it"),
        ({"name": "heavy", "betas": [0.8, 0.9]}, "optimizer.betas=[0.8,0.9]: optimizer=heavy"),
        ({"name": "heavy", "stochastic_rounding": False}, "optimizer.stochastic_rounding=False"),
        ({"name": "heavi"}, "must be one of adamw, adamw_8bit, or an optimizer of a module"),
    ],
)  # fmt: skip
def test_what_it_never_reads_is_refused(heavy: str, values: dict[str, Any], said: str):
    assert said in problem(**{f"optimizer__{key}": value for key, value in values.items()})


def test_a_typing_error_is_answered_with_its_name(heavy: str):
    assert "did you mean optimizer.name=heavy?" in problem(optimizer__name="heavi")


def test_a_resume_has_to_agree_about_its_options_and_no_other_run_s_identity_changes(heavy: str):
    one = identity_of(validated(optimizer__name=heavy), HASHES, numbers={})
    other = identity_of(validated(optimizer__name=heavy, optimizer__mass=0.1), HASHES, numbers={})
    differing = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert differing == {"optimizer.mass"}
    plain = identity_of(validated(), HASHES, numbers={})
    assert {key for key in plain if key.startswith("optimizer")} == {"optimizer.name"}


def test_what_other_optimizers_there_are_is_in_no_hash():
    before = hashed_settings(dataclasses.asdict(Config()))

    @register_optimizer("more")
    def more(groups: Any, *, lr: float, speed: int = 3) -> None: ...

    assert "speed" in dataclasses.asdict(Config())["optimizer"]
    assert hashed_settings(dataclasses.asdict(Config())) == before
    own = dataclasses.asdict(validated(optimizer__name="more"))
    assert hashed_settings(own)["optimizer"]["speed"] == 3


# Registering -------------------------------------------------------------------------------------


def test_it_is_registered_by_a_decorator_or_a_call():
    def build(groups: Any, *, lr: float, seed: int) -> None: ...

    assert register_optimizer("mine", build) is build
    assert OPTIMIZERS["mine"].shared == ("lr", "seed")
    assert register_optimizer("mine", build) is build  # imported again


def test_a_name_or_a_parameter_that_cannot_be_is_refused(heavy: str):
    def build(groups: Any, *, lr: float) -> None: ...

    for name in ("adamw", heavy):
        with pytest.raises(ValueError, match="is registered already"):
            register_optimizer(name, build)

    def by_place(groups: Any, lr: float) -> None: ...

    def untyped(groups: Any, *, lr: float, mass=0.9) -> None: ...

    def taken(groups: Any, *, lr: float, warmup: int = 3) -> None: ...

    def other_kind(groups: Any, *, lr: float, mass: int = 3) -> None: ...

    for function, said in (
        (by_place, "is called as build"),
        (untyped, "needs a type"),
        (taken, "'warmup' is a setting of every optimizer"),
        (other_kind, "is a float of optimizer 'heavy'"),
    ):
        with pytest.raises(ValueError, match=said):
            register_optimizer("other", function)
    assert "other" not in OPTIMIZERS


def test_every_key_of_the_group_is_shared_or_no_option():
    """A key that is added to the group would otherwise be hidden by an option of its name."""
    from dpo_lightning import plugins

    keys = {item.name for item in dataclasses.fields(OptimizerConfig)}
    assert keys <= {*SHARED_SETTINGS, *plugins._NO_OPTIONS}
