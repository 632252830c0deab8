"""A plugin's optimizer in training: the groups it gets, its steps, and a resume."""

from collections.abc import Iterator

import pytest
import torch

from dpo_lightning.errors import UserError
from dpo_lightning.plugins import OPTIMIZERS, register_optimizer
from dpo_lightning.training.optimizers import OptimizerSettings, make_optimizer
from tests.support.models import make_model
from tests.support.steps import in_turn, pair, take_steps, with_logratios

GIVEN: dict = {}


@pytest.fixture(autouse=True)
def _sgd() -> Iterator[None]:
    before = dict(OPTIMIZERS)

    @register_optimizer("sgd")
    def sgd(groups, *, lr: float, weight_decay: float, seed: int, momentum: float = 0.5):
        GIVEN.update(groups=groups, lr=lr, weight_decay=weight_decay, seed=seed)
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)

    yield
    OPTIMIZERS.clear()
    OPTIMIZERS.update(before)


def settings(**changes) -> OptimizerSettings:
    values = {"name": "sgd", "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.2}
    return OptimizerSettings(**(values | {"seed": 4, "options": {"momentum": 0.25}} | changes))


def test_it_gets_what_it_names_and_matrices_alone_decay():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))
    made = make_optimizer([vector, matrix], settings())
    assert type(made) is torch.optim.SGD
    assert [group["momentum"] for group in made.param_groups] == [0.25, 0.25]
    assert (GIVEN["lr"], GIVEN["weight_decay"], GIVEN["seed"]) == (0.1, 0.2, 4)
    decays = [(group["params"][0].ndim, group["weight_decay"]) for group in GIVEN["groups"]]
    assert decays == [(2, 0.2), (1, 0.0)]


def test_what_is_no_optimizer_is_refused():
    register_optimizer("none", lambda groups, *, lr: None)
    with pytest.raises(UserError, match="made a NoneType; it has to return a torch"):
        make_optimizer([torch.nn.Parameter(torch.ones(2))], settings(name="none", options={}))


def test_a_run_takes_its_steps(tmp_path):
    """Plain descent: the last of two weights is the first less lr (g_2 + momentum g_1).

    With a rate of 1e-12 nothing moves, so the momentum buffer is g_2 + 0.25 g_1, of unclipped
    gradients whose norms are logged; a triangle bounds its norm.
    """
    model = make_model("llama")
    groups = in_turn(
        with_logratios(model, pair(1), 0.5, -0.3), with_logratios(model, pair(2), -0.2, 1.0)
    )
    taken = take_steps(
        tmp_path, groups, steps=2, optimizer="sgd", options={"momentum": 0.25}, lr=1e-12
    )
    [optimizer] = taken.trainer.optimizers
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
    size = torch.stack([buffer.norm() for buffer in buffers]).norm().item()
    one, other = taken.values("train/grad_norm")
    assert abs(other - 0.25 * one) * 0.999 <= size <= (other + 0.25 * one) * 1.001
