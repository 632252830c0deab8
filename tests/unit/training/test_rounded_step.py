"""The step of bfloat16 weights: its numbers, its bytes, and that its pieces do not show."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from dpo_lightning.training import low_memory, rounded_step
from dpo_lightning.training.low_memory import LowMemoryAdamW
from dpo_lightning.training.rounded_step import (
    Buffers,
    Part,
    step_elements,
    step_numbers,
    step_on_cpu,
    step_on_gpu,
)
from dpo_lightning.training.rounding import noise_key

BF16 = torch.bfloat16
GROUP = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
KEY = noise_key(7, 3, 0)
COUNT = 1003


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def part(
    dtype: torch.dtype = BF16, *, gradient: torch.dtype = BF16, count: int = COUNT, start: int = 0
) -> Part:
    """A part in the middle of a run: its moments are no zeros."""
    draw = seeded(start)
    weight, grad, first, second = (torch.randn(count, generator=draw) for _ in range(4))
    return Part(
        weight.to(dtype),
        grad.to(gradient),
        (0.1 * first).to(dtype),
        (0.1 * second.square()).to(dtype),
        step_numbers(GROUP, 3),
        KEY,
        start,
    )


def copied(own: Part) -> Part:
    tensors = {name: getattr(own, name).clone() for name in ("weight", "first", "second")}
    return replace(own, **tensors)


def values(own: Part) -> list[torch.Tensor]:
    return [own.weight, own.first, own.second]


def plain_step(own: Part) -> list[torch.Tensor]:
    """AdamW in float64, step 3: weight and moments before they are rounded."""
    weight, gradient, first, second = (
        tensor.double() for tensor in (own.weight, own.gradient, own.first, own.second)
    )
    beta1, beta2 = GROUP["betas"]
    first = beta1 * first + (1 - beta1) * gradient
    second = beta2 * second + (1 - beta2) * gradient**2
    weight = weight * (1 - GROUP["lr"] * GROUP["weight_decay"])
    scale = (second / (1 - beta2**3)).sqrt() + GROUP["eps"]
    return [weight - GROUP["lr"] * first / (1 - beta1**3) / scale, first, second]


# Numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [BF16, torch.float32])
def test_a_step_is_that_of_adamw_rounded_to_a_neighbour(gradient):
    """Within 2^-7 of the value, of float64; in the mean within 6 standard errors.

    A rounding by chance is off by at most half a number in the mean square: 2^-8 of a value, over
    1,003 values 2^-8 / 31.7.
    """
    own = part(gradient=gradient)
    expected = plain_step(own)
    step_on_cpu([own], None)
    for found, value in zip(values(own), expected, strict=True):
        error = (found.double() - value) / value.abs()
        assert error.abs().max().item() < 2**-7 * 1.001
        assert abs(error.mean().item()) < 6 * 2**-8 / math.sqrt(COUNT)


def test_a_step_of_float32_is_that_of_adamw():
    own = part(torch.float32, gradient=torch.float32)
    expected = plain_step(own)
    step_on_cpu([own], None)
    for found, value in zip(values(own), expected, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [64, 333])
def test_a_step_in_pieces_is_the_step(monkeypatch, size: int, threads: int):
    """Bits are those of the element, whatever the piece it is in."""
    whole, cut = part(), part()
    step_elements(*tensors(whole), whole.numbers, (*KEY, 0))
    monkeypatch.setattr(rounded_step, "_PIECE", size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    buffers = step_on_cpu([cut], None)
    assert all(map(torch.equal, values(whole), values(cut)))
    # The next step, or one with fewer threads, has the same room.
    assert step_on_cpu([cut], buffers) is buffers


def tensors(own: Part) -> tuple[torch.Tensor, ...]:
    return own.weight, own.gradient, own.first, own.second


def test_a_half_is_stepped_as_in_the_whole():
    whole = part()
    halves = [copied(piece) for piece in part().pieces(600)]
    assert [half.start for half in halves] == [0, 600]
    step_on_cpu([whole], None)
    step_on_cpu(halves, None)
    for one, *others in zip(values(whole), *map(values, halves), strict=True):
        assert torch.equal(one, torch.cat(others))


def test_without_a_key_the_nearest_number_is_taken():
    own = replace(part(), key=None)
    expected = [value.bfloat16() for value in plain_step(own)]
    step_on_cpu([own], None)
    for found, value in zip(values(own), expected, strict=True):
        # A value halfway between two may fall to the other side of float32.
        assert (found == value).float().mean().item() > 0.99


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_and_harms_no_other(bad: float):
    own, sound = part(), part()
    own.gradient[5] = bad
    step_on_cpu([own], None)
    step_on_cpu([sound], None)
    assert not any(value[5].isfinite() for value in values(own)[:1])
    for found, value in zip(values(own), values(sound), strict=True):
        assert torch.equal(torch.cat([found[:5], found[6:]]), torch.cat([value[:5], value[6:]]))


def test_a_nan_with_every_bit_set_stays_one():
    """0x7FFFFFFF, as GPUs write it: any random bit would turn it over to -0."""
    own = part(gradient=torch.float32)
    own.gradient[:64] = torch.full((64,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    step_on_cpu([own], None)
    assert all(value[:64].isnan().all() for value in values(own))


# Bytes -------------------------------------------------------------------------------------------


def bytes_moved(own: Part) -> int:
    """Bytes of an element that are read and written of the operands, as the step itself does it.

    Each operand is read once by one kernel, and written once where the step changed it.
    """
    operands = tensors(own)
    before = [operand._version for operand in operands]
    step_elements(*operands, own.numbers, (*KEY, 0))
    read = sum(operand.element_size() for operand in operands)
    changed = zip(operands, before, strict=True)
    return read + sum(o.element_size() for o, version in changed if o._version > version)


def test_a_step_moves_at_most_24_bytes_a_parameter():
    """Weight 2 + 2, first moment 2 + 2, second moment 2 + 2, gradient 2; or 4 in float32."""
    assert bytes_moved(part()) == 14
    assert bytes_moved(part(gradient=torch.float32)) == 16


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("gradient", [BF16, torch.float32])
def test_the_compiled_step_is_one_kernel_that_moves_those_bytes(gradient):
    """The compiler's own count; the bits are those of the step that is not compiled.

    A compiler may join a product and a sum, which moves float32 by its last bit, and then one
    rounding in 2^8 or so.
    """
    from torch._inductor import metrics

    metrics.reset()
    own, plain = part(gradient=gradient), part(gradient=gradient)
    compiled = torch.compile(step_elements, fullgraph=True, dynamic=True)
    assert step_on_gpu([own], lambda: compiled) is not None
    step_on_gpu([plain], None)
    assert metrics.generated_kernel_count == 1
    for found, value in zip(values(own), values(plain), strict=True):
        assert (found == value).float().mean().item() > 0.98
        torch.testing.assert_close(found, value, rtol=2**-6, atol=0)
    # Other sizes and other steps take the same kernel.
    other = replace(part(gradient=gradient, count=517), numbers=step_numbers(GROUP, 9))
    step_on_gpu([other], lambda: compiled)
    assert metrics.generated_kernel_count == 1


# The way of a GPU --------------------------------------------------------------------------------


def test_a_gpu_takes_the_same_step_with_numbers_that_were_sent():
    own = [part(), part(torch.float32, gradient=torch.float32, count=10, start=4096)]
    others = [copied(one) for one in own]
    calls = []

    def kernel(*arguments):
        calls.append([tuple(number.shape) for number in arguments[4]])
        step_elements(*arguments)

    def compiled():
        return kernel

    assert step_on_gpu(own, compiled) is compiled
    assert calls == [[()] * 6, [()] * 6]
    step_on_cpu(others, None)
    for one, other in zip(own, others, strict=True):
        assert all(map(torch.equal, values(one), values(other)))
    assert step_on_gpu([], compiled) is compiled


def test_a_step_that_is_not_compiled_is_taken_once_and_said(caplog, monkeypatch):
    """The second parameter's kernel fails: it is stepped without, and the first not again."""
    import torch._dynamo.exc

    monkeypatch.setattr(rounded_step, "_UNCOMPILED", 100)
    own = [part(), part(start=2048)]
    others = [copied(one) for one in own]
    done = []

    def kernel(*arguments):
        if done:
            raise torch._dynamo.exc.TorchDynamoException("no\ncompiler")
        done.append(step_elements(*arguments))

    with caplog.at_level(logging.WARNING):
        assert step_on_gpu(own, lambda: kernel) is None
    assert "is not compiled and takes longer: no compiler" in caplog.text
    step_on_cpu(others, None)
    for one, other in zip(own, others, strict=True):
        assert all(map(torch.equal, values(one), values(other)))


def test_another_error_of_a_kernel_is_not_hidden():
    def kernel(*arguments):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        step_on_gpu([part()], lambda: kernel)


# A thousand steps --------------------------------------------------------------------------------

STEPS, RATE, SIZE = 1000, 1e-4, 1 << 14


def gradient_of(step: int) -> torch.Tensor:
    """About 1, so that each step is about the rate, downwards; not of the weights."""
    return 1 + 0.5 * torch.randn(SIZE, generator=seeded(step))


def trajectory(dtype: torch.dtype, *, by_chance: bool = True) -> torch.Tensor:
    weight = torch.nn.Parameter(torch.full((SIZE,), 1.5, dtype=dtype))
    optimizer = LowMemoryAdamW([weight], lr=RATE, stochastic_rounding=by_chance, seed=3)
    for step in range(STEPS):
        weight.grad = gradient_of(step).to(dtype)
        optimizer.step()
    return weight.detach().float()


def float32_trajectory() -> torch.Tensor:
    """AdamW by its formulas, in float32."""
    weight, first, second = torch.full((SIZE,), 1.5), torch.zeros(SIZE), torch.zeros(SIZE)
    for step in range(1, STEPS + 1):
        gradient = gradient_of(step - 1)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        scale = (second / (1 - 0.999**step)).sqrt() + 1e-8
        weight = weight - RATE * first / (1 - 0.9**step) / scale
    return weight


def test_a_thousand_steps_end_where_those_of_float32_end():
    """From 1.5 down by 0.09 in steps of 1e-4, where bfloat16 numbers are 2^-7 = 0.0078 apart.

    A step of s is p = s / 2^-7 of that way, taken with a chance of p: a variance of at most
    s 2^-7, over all steps 0.09 * 2^-7 = 7.0e-4, which is 0.027 an element and, over 2^14 of them,
    2.1e-4 in their mean. Moments have errors of their own: a second moment goes 0.001 of itself a
    step, a quarter of the 2^-8 to its neighbour at most, so it errs by 0.44 * 2^-8, kept for the
    1 / (1 - 0.999^2) = 500 steps of its memory: 3.8%. A mean of 1 / sqrt(v) is 3/8 of the square of
    that too large, 0.05% of 0.09 or 5e-5. In sum the mean is within 5 * 2.1e-4 + 5e-5 = 1.1e-3 of
    float32's, a 80th of the way, and an element within 0.03 in the mean square. Rounded to the
    nearest no step is taken at all.
    """
    single = float32_trajectory()
    assert (1.5 - single).mean().item() == pytest.approx(0.09, abs=0.005)
    chance = trajectory(BF16)
    assert (chance - single).mean().item() == pytest.approx(0, abs=1.1e-3)
    assert (chance - single).square().mean().sqrt().item() < 0.03
    assert torch.allclose(trajectory(torch.float32), single, rtol=0, atol=2e-5)


def test_rounded_to_the_nearest_none_of_them_is_taken(monkeypatch):
    monkeypatch.setitem(globals(), "STEPS", 10)
    assert (trajectory(BF16, by_chance=False) == 1.5).all()


# States ------------------------------------------------------------------------------------------


def stepped(steps: int = 2) -> tuple[torch.nn.Parameter, LowMemoryAdamW]:
    weight = torch.nn.Parameter(torch.randn(64, 8, generator=seeded(1)).bfloat16())
    optimizer = LowMemoryAdamW([weight], lr=1e-2, seed=5)
    for step in range(steps):
        weight.grad = torch.randn(64, 8, generator=seeded(10 + step)).bfloat16()
        optimizer.step()
    return weight, optimizer


def test_a_state_of_an_earlier_version_is_taken_and_said(caplog):
    """It has no word on its random bits; its numbers are loaded as they are."""
    _, optimizer = stepped()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        assert group.pop("random_bits") == "lowbias32"
    _, other = stepped(0)
    with caplog.at_level(logging.INFO):
        other.load_state_dict(state)
    assert "rounded with the random bits of an earlier version" in caplog.text
    for name, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(other.state_dict()["state"][0][name], value)
    # From here on it is a state like any other.
    assert {group["random_bits"] for group in other.param_groups} == {"lowbias32"}
    caplog.clear()
    with caplog.at_level(logging.INFO):
        stepped(0)[1].load_state_dict(other.state_dict())
    assert caplog.text == ""


def test_a_gpu_s_optimizer_compiles_its_step(monkeypatch):
    """The branch of a GPU, on meta tensors' behalf: what it hands on is what a CPU computes."""
    weight, _ = stepped()
    monkeypatch.setattr(low_memory, "_is_gpu", lambda tensor: True)
    used = []

    def compiled():
        used.append(1)
        return step_elements

    monkeypatch.setattr(low_memory, "compiled_step", compiled)
    other, _ = stepped()
    assert torch.equal(weight, other)
    assert len(used) == 2


def test_buffers_are_large_enough_and_kept():
    _, optimizer = stepped(3)
    assert isinstance(optimizer._buffers, Buffers)
