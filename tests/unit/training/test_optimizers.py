"""Optimizers by name, moments of 8 bits, and that a resumed optimizer goes on to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.training import eight_bit
from dpo_lightning.training.eight_bit import dequantise, quantise
from dpo_lightning.training.low_memory import LowMemoryAdamW
from dpo_lightning.training.optimizers import OptimizerSettings, make_optimizer
from tests.support.properties import examples
from tests.support.ranks import on_ranks

# The shapes of a small model; 64 x 128 and 256 x 32 are quantised, the others are too small.
SHAPES = ((64, 128), (256, 32), (128,), (3, 5))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(name: str, dtype: torch.dtype, *, lr: float = 1e-3, **options) -> tuple[list, object]:
    draw = seeded(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]
    values = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "seed": 7}
    values |= {"stochastic_rounding": None}
    return weights, make_optimizer(
        weights, OptimizerSettings(name=name, lr=lr, **(values | options))
    )


def take_steps(weights: list, optimizer, steps: range) -> None:
    """Gradients of a quadratic bowl with noise, the same for each number of a step."""
    for step in steps:
        draw = seeded(1000 + step)
        for weight in weights:
            noise = torch.randn(weight.shape, generator=draw)
            weight.grad = (weight.detach().float() + 0.3 * noise).to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


# Small steps ------------------------------------------------------------------------------------


def moved(stochastic_rounding: bool) -> torch.Tensor:
    """Distance that 10,000 weights of 1 went in 200 AdamW steps of 5e-7, one gradient."""
    weight = torch.nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
    optimizer = make_optimizer(
        [weight],
        OptimizerSettings(
            name="adamw",
            lr=5e-7,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.0,
            stochastic_rounding=stochastic_rounding,
            seed=3,
        ),
    )
    for _ in range(200):
        weight.grad = -torch.ones_like(weight)
        optimizer.step()
    return weight.detach().float() - 1


def test_steps_that_the_nearest_rounding_loses_survive_in_the_mean():
    """200 steps of 5e-7 are 1e-4, a 78th of the 2^-7 above 1 that bfloat16 has next.

    So 0.0128 of the weights went up by 2^-7 (few of them twice) and the mean is 1e-4, within 4
    standard errors: 2^-7 sqrt(0.0128 (1 - 0.0128) / 10,000) = 8.8e-6 each.
    """
    assert (moved(stochastic_rounding=False) == 0).all()
    kept = moved(stochastic_rounding=True)
    assert set(kept.unique().tolist()) <= {0.0, 2.0**-7, 2.0**-6}
    assert kept.mean().item() == pytest.approx(1e-4, abs=4 * 8.8e-6)


@pytest.mark.parametrize(("stochastic", "share"), [(True, 1.0), (False, 18.2)])
def test_a_second_moment_falls_again(stochastic: bool, share: float):
    """After 50 gradients of 10 and 2,950 of 0.1 it is 0.9 of a float32 one's decay, not stuck.

    By hand: v = 100 (1 - 0.999^50) 0.999^2950 + 0.01 (1 - 0.999^2950) = 0.2645. Rounded to the
    nearest, 4.8 - 0.0048 is 4.8 again: 18 times too much, a step four times too small.
    """
    expected = 100 * (1 - 0.999**50) * 0.999**2950 + 0.01 * (1 - 0.999**2950)
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    optimizer = make_optimizer(
        [weight],
        OptimizerSettings(
            name="adamw",
            lr=1e-9,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.0,
            stochastic_rounding=stochastic,
            seed=3,
        ),
    )
    for step in range(3000):
        weight.grad = torch.full_like(weight, 10.0 if step < 50 else 0.1)
        optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"].float().mean().item()
    assert second == pytest.approx(share * expected, rel=0.03)


# Which one --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "by_chance", "kind"),
    [
        ("adamw", torch.float32, None, "AdamW"),
        ("adamw", torch.bfloat16, None, "LowMemoryAdamW"),
        ("adamw", torch.bfloat16, False, "AdamW"),
        ("adamw_8bit", torch.float32, None, "LowMemoryAdamW"),
        ("adamw_8bit", torch.bfloat16, None, "LowMemoryAdamW"),
    ],
)
def test_the_optimizer_follows_the_settings_and_vectors_are_not_decayed(
    name, dtype, by_chance, kind
):
    _, optimizer = make(name, dtype, stochastic_rounding=by_chance)
    assert type(optimizer).__name__ == kind
    decays = {g["weight_decay"]: [tuple(p.shape) for p in g["params"]] for g in
              optimizer.param_groups}  # fmt: skip
    assert decays == {0.01: [(64, 128), (256, 32), (3, 5)], 0.0: [(128,)]}
    if kind == "LowMemoryAdamW":
        assert optimizer._stochastic_rounding is (dtype == torch.bfloat16)


def test_float32_weights_are_stepped_as_torch_steps_them():
    weights, optimizer = make("adamw", torch.float32)
    others = [torch.nn.Parameter(w.detach().clone()) for w in weights]
    own = LowMemoryAdamW(
        [{"params": [w for w in others if w.ndim > 1], "weight_decay": 0.01},
         {"params": [w for w in others if w.ndim == 1]}],
        lr=1e-3, seed=7,
    )  # fmt: skip
    take_steps(weights, optimizer, range(20))
    take_steps(others, own, range(20))
    for one, other in zip(weights, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_step_in_pieces_is_the_step(monkeypatch):
    """Of 8 bits too: random bits are those of an element, and blocks never cross a row."""
    results = []
    for size in (1 << 18, 100):
        monkeypatch.setitem(eight_bit._PIECE, "cpu", size)
        weights, optimizer = make("adamw_8bit", torch.bfloat16)
        take_steps(weights, optimizer, range(3))
        results.append([w.detach() for w in weights])
    assert all(map(torch.equal, *results))


def test_weights_that_are_no_rows_in_memory_are_trained_too():
    weight = torch.nn.Parameter(torch.randn(6, 4, generator=seeded(0)).bfloat16().t())
    before = weight.detach().clone()
    optimizer = LowMemoryAdamW([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.1, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_8_bits_follow_those_of_32(dtype):
    """Towards the bottom of a bowl: the same loss within 3% after 60 steps, the way within 10%."""
    found = {}
    for name in ("adamw", "adamw_8bit"):
        weights, optimizer = make(name, dtype, lr=1e-2)
        start = [w.detach().clone().float() for w in weights]
        take_steps(weights, optimizer, range(60))
        found[name] = [w.detach().float() for w in weights]
    for begin, one, other in zip(start, *found.values(), strict=True):
        assert one.square().mean() < 0.7 * begin.square().mean()
        assert other.square().mean().item() == pytest.approx(one.square().mean().item(), rel=0.03)
        assert ((one - other).norm() / (one - begin).norm()).item() < 0.1


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_torchao(signed: bool):
    from torchao.optim.quant_utils import create_dynamic_map

    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    [numbers] = dequantise(codes, torch.ones(1, 1), signed=signed)
    torch.testing.assert_close(numbers, torch.tensor(create_dynamic_map(signed)))


def test_steps_with_8_bits_are_those_of_torchao():
    """Rows of 256 have the same blocks. A value halfway between two numbers may go either way.

    Of a moment that is a code off both optimizers go on differently, so nearly all are compared.
    """
    from torchao.optim import AdamW8bit

    start = torch.randn(256, 256, generator=seeded(0))
    one, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    own = LowMemoryAdamW([one], lr=1e-2, weight_decay=0.01, eight_bit=True)
    theirs = AdamW8bit([other], lr=1e-2, weight_decay=0.01)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(5):
            take_steps([one], own, range(1))
            take_steps([other], theirs, range(1))
    assert (one - start).abs().mean() > 0.04
    close = torch.isclose(one, other, rtol=0, atol=1e-4)
    assert close.float().mean().item() > 0.999


@settings(max_examples=examples(30))
@given(
    signed=st.booleans(), seed=st.integers(0, 99), size=st.floats(2.0**-60, 2.0**60),
    block=st.sampled_from([32, 256]),
)  # fmt: skip
def test_codes_stand_for_the_nearest_number_of_their_block(signed, seed, size, block):
    """Values between 0.1 and 1 of a block's largest are off by at most half of a 64th of 0.9
    (a 128th without a sign), and zero is zero; a second moment does not become it."""
    values = torch.randn(8, 256, generator=seeded(seed)) * size
    values[:, ::7] = 0
    values = values if signed else values.abs()
    codes, scales = quantise(values, torch.empty(8, 256 // block), signed=signed)
    back = dequantise(codes, scales, signed=signed)
    assert (back[values == 0] == 0).all()
    shares, found = ((x.view(8, -1, block) / scales[..., None]).abs() for x in (values, back))
    upper = shares > 0.1
    half = 0.9 / (64 if signed else 128) / 2
    assert ((shares - found)[upper].abs() <= half * 1.001).all()
    top = (values.view(8, -1, block) == scales[..., None]) & (scales[..., None] > 0)
    assert (found[top] == 1).all()
    if not signed:
        assert (back[values > 0] > 0).all()


def test_a_row_that_is_not_met_again_stands_still():
    """A small entry of a row with a large one: its second moment must not be 0 under its first."""
    weight = torch.nn.Parameter(torch.zeros(16, 256))
    optimizer = LowMemoryAdamW([weight], lr=1e-3, eight_bit=True)
    weight.grad = torch.zeros_like(weight)
    weight.grad[0] = 1e-4
    weight.grad[0, 0] = 1.0
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    # At most what AdamW itself would step: 0.9 / 1.9 of the learning rate over 0.999 / 1.999.
    assert (weight.detach() - before).abs().max().item() < 1.1e-3


# Checkpoints ------------------------------------------------------------------------------------

KINDS = [
    ("adamw", torch.float32),
    ("adamw", torch.bfloat16),
    ("adamw_8bit", torch.float32),
    ("adamw_8bit", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_a_resumed_optimizer_goes_on_to_the_bit(name, dtype, tmp_path):
    """The state is loaded from plain tensors; draws elsewhere in between play no part."""
    whole, optimizer = make(name, dtype)
    take_steps(whole, optimizer, range(3))
    state = {"weights": [w.detach() for w in whole], "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    torch.rand(100)
    take_steps(whole, optimizer, range(3, 6))
    loaded = torch.load(
        tmp_path / "state.pt", weights_only=True, map_location=lambda storage, location: storage
    )
    weights, again = make(name, dtype)
    again.load_state_dict(loaded["optimizer"])
    for weight, value in zip(weights, loaded["weights"], strict=True):
        weight.data.copy_(value)
    for one, other in zip(again.state.values(), optimizer.state.values(), strict=True):
        assert {k: v.dtype for k, v in one.items()} == {k: v.dtype for k, v in other.items()}
    take_steps(weights, again, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(weights, whole, strict=True))


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_a_step_draws_nothing_from_the_global_generator(name, dtype):
    weights, optimizer = make(name, dtype)
    before = torch.get_rng_state()
    take_steps(weights, optimizer, range(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_seeds_and_steps_round_differently_and_the_same_ones_alike(name):
    results = {}
    for seed in (7, 8):
        weights, optimizer = make(name, torch.bfloat16, seed=seed)
        again, other = make(name, torch.bfloat16, seed=seed)
        take_steps(weights, optimizer, range(2))
        take_steps(again, other, range(2))
        assert all(map(torch.equal, weights, again))
        results[seed] = weights[0].detach()
    assert not torch.equal(results[7], results[8])


@pytest.mark.parametrize(
    ("shape", "block"),
    [((64, 128), 128), ((32, 576), 64), ((16, 4, 256), 256), ((8, 64), None), ((4096,), None),
     ((1024, 80), None)],
)  # fmt: skip
def test_what_has_8_bits_and_what_float32(shape, block):
    """576 = 9 * 64; 8 x 64 is small; 80 = 5 * 16 would be a scale for 16 entries."""
    weight = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = LowMemoryAdamW([weight], lr=1e-3, eight_bit=True)
    optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg_sq"].dtype == (torch.float32 if block is None else torch.uint8)
    if block is not None:
        rows = shape[0]
        assert state["exp_avg_sq_scale"].shape == (rows, weight.numel() // rows // block)


# Shards -----------------------------------------------------------------------------------------

SHARDED = [("adamw", torch.bfloat16), ("adamw_8bit", torch.float32), ("adamw_8bit", torch.bfloat16)]


def _linear(dtype: torch.dtype) -> torch.nn.Linear:
    """With rows that are all the same, so that what differs later was rounded differently."""
    model = torch.nn.Linear(128, 128, bias=False, dtype=dtype)
    model.weight.data.copy_(torch.randn(128, generator=seeded(0)).expand(128, 128))
    return model


def _train(model, name: str) -> torch.optim.Optimizer:
    optimizer = make_optimizer(
        model.parameters(),
        OptimizerSettings(
            name=name,
            lr=0.05,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.01,
            stochastic_rounding=None,
            seed=7,
        ),
    )
    for step in range(3):
        inputs = torch.randn(8, 128, generator=seeded(step))
        model(inputs.to(model.weight.dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _train_sharded(rank: int) -> list[dict[str, torch.Tensor]]:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    found = []
    for name, dtype in SHARDED:
        model = fully_shard(_linear(dtype), mesh=mesh)
        optimizer = _train(model, name)
        before = dict(optimizer.state[model.weight])
        # As a distributed checkpoint does.
        set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
        after = optimizer.state[model.weight]
        whole = {key: getattr(value, "full_tensor", value.clone)() for key, value in after.items()}
        for key, value in before.items():
            assert after[key].dtype == value.dtype
            assert torch.equal(getattr(value, "full_tensor", value.clone)(), whole[key]), key
        # And as one process's checkpoint does, with whole tensors.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"param_groups": groups, "state": {0: whole}})
        for key, value in optimizer.state[model.weight].items():
            assert torch.equal(
                getattr(value, "to_local", value.clone)(),
                getattr(before[key], "to_local", before[key].clone)(),
            )
        found.append({"weight": model.weight.full_tensor().detach(), **whole})
    return found


def test_shards_are_stepped_like_the_whole(tmp_path):
    """FSDP2 over two processes against one: bfloat16 weights to the bit, random bits and all.

    Their gradients are equal, as both ranks have the same rows; a float32 matrix product may sum
    them in another order. Rows are all the same, and are rounded apart.
    """
    found, _ = on_ranks(_train_sharded, tmp_path)
    for (name, dtype), values in zip(SHARDED, found, strict=True):
        model = _linear(dtype)
        start = model.weight.detach().float().clone()
        state = _train(model, name).state[model.weight]
        whole, sharded = model.weight.detach().float(), values.pop("weight").float()
        if dtype == torch.float32:
            assert (whole - sharded).norm() < 1e-5 * (whole - start).norm()
        else:
            assert torch.equal(whole, sharded)
            assert all(torch.equal(values[key], value) for key, value in state.items())
        assert {k: (v.shape, v.dtype) for k, v in values.items()} == {
            k: (v.shape, v.dtype) for k, v in state.items()
        }
        halves = sharded.chunk(2)
        assert torch.equal(*halves) is (dtype == torch.float32)
