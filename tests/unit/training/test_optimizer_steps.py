"""Single steps of every optimizer, by hand: decay, and rounding."""

import pytest
import torch

from dpo_lightning.training.optimizers import OptimizerSettings, make_optimizer

KINDS = [
    ("adamw", torch.float32),
    ("adamw", torch.bfloat16),
    ("adamw_8bit", torch.float32),
    ("adamw_8bit", torch.bfloat16),
]


def make(weights, name: str, **changes):
    values = {
        **{"name": name, "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        **{"stochastic_rounding": None, "seed": 7},
    }
    return make_optimizer(weights, OptimizerSettings(**(values | changes)))


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_without_a_gradient_a_matrix_loses_rate_times_decay(name: str, dtype: torch.dtype):
    """2 (1 - 0.1 * 0.25) = 1.95 and, in the next step at half of the rate, 1.95 (1 - 0.05 * 0.25).

    Vectors stay 2. The mean of weights that are rounded by chance is off by less than 4.5 of its
    standard errors, 2^-7 / 2 / sqrt(64 * 256) = 3.1e-5.
    """
    matrix = torch.nn.Parameter(torch.full((64, 256), 2.0, dtype=dtype))
    vector = torch.nn.Parameter(torch.full((64,), 2.0, dtype=dtype))
    optimizer = make([matrix, vector], name, weight_decay=0.25)
    for lr, expected in ((0.1, 1.95), (0.05, 1.95 * (1 - 0.05 * 0.25))):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for weight in (matrix, vector):
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert matrix.detach().float().mean().item() == pytest.approx(expected, abs=2.8e-4)
        assert (vector == 2).all()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_the_first_step_is_the_rate_times_the_sign(name: str):
    """g / (sqrt(g^2) + eps) whatever g is: 1 - 0.1 and 1 + 0.1, in float32."""
    weight = torch.nn.Parameter(torch.ones(64, 128))
    optimizer = make([weight], name)
    weight.grad = torch.linspace(-3, 2, weight.numel()).view(64, 128)
    expected = 1 - 0.1 * weight.grad.sign()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_weights_of_one_step_are_rounded_apart(name: str):
    """Two matrices that are the same and have the same gradient: each draws bits of its own."""
    one, other = (torch.nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = make([one, other], name, lr=1e-3)
    for weight in (one, other):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    # 1 - 1e-3 lies a quarter of the way from 1 to the number below it, 1 - 2^-8.
    share = [(weight < 1).float().mean().item() for weight in (one, other)]
    assert share == pytest.approx([0.256, 0.256], abs=0.03)
    # Alike by chance are 0.744^2 + 0.256^2 = 0.62 of them.
    assert (one == other).float().mean().item() == pytest.approx(0.62, abs=0.03)
