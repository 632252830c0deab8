"""The head: values and gradients against a plain log-softmax, in whatever chunks and types."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo_lightning.models import head
from dpo_lightning.models.head import (
    LogitsTransform,
    collision_logps,
    token_logps,
    token_logps_and_collisions,
)
from tests.support.operations import Results

VOCABULARY, SIZE, TOKENS = 53, 8, 11
TRANSFORMS = {
    "plain": LogitsTransform(),
    "scaled": LogitsTransform(scale=0.3),
    "capped": LogitsTransform(cap=1.5),
    "both": LogitsTransform(scale=3.0, cap=0.7),
}


def inputs(dtype=torch.float64, *, bias=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(TOKENS, SIZE, generator=draw, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, SIZE, generator=draw, dtype=torch.float64).to(dtype)
    offset = torch.randn(VOCABULARY, generator=draw, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
    tensors = [states, weight, offset] if bias else [states, weight]
    return [tensor.requires_grad_() for tensor in tensors], targets


def plain(tensors, targets, transform):
    """Plain log-softmax, with all scores in memory."""
    states, weight, *bias = tensors
    logits = states @ weight.t() * transform.scale
    if bias:
        logits = (states @ weight.t() + bias[0]) * transform.scale
    if transform.cap is not None:
        logits = torch.tanh(logits / transform.cap) * transform.cap
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def chunked(tensors, targets, transform):
    states, weight, *bias = tensors
    return token_logps(states, weight, bias[0] if bias else None, targets, transform)


def gradients(function, tensors, targets, transform):
    weights = torch.linspace(-1, 2, TOKENS, dtype=tensors[0].dtype)
    values = function(tensors, targets, transform)
    return values.detach(), torch.autograd.grad((values * weights).sum(), tensors)


@pytest.fixture(params=["kept", "recomputed"])
def small_chunks(request, monkeypatch):
    """Three tokens at a time, and fifteen words of the vocabulary."""
    kept = (1 << 24) if request.param == "kept" else 0
    monkeypatch.setattr(head, "_ON_CPU", head.Limits(scores=3 * VOCABULARY, kept=kept))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_values_and_gradients_are_those_of_a_log_softmax(small_chunks, transform, bias):
    tensors, targets = inputs(bias=bias)
    expected, expected_gradients = gradients(plain, tensors, targets, transform)
    values, found = gradients(chunked, tensors, targets, transform)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_frozen_head_gives_the_states_the_same_gradient(small_chunks, transform):
    tensors, targets = inputs(bias=True)
    _, (expected, *_) = gradients(plain, tensors, targets, transform)
    frozen = [tensors[0], *(tensor.detach() for tensor in tensors[1:])]
    values = chunked(frozen, targets, transform)
    weights = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    [found] = torch.autograd.grad((values * weights).sum(), [tensors[0]])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_gradcheck(small_chunks):
    tensors, targets = inputs(bias=True)
    transform = TRANSFORMS["both"]
    assert torch.autograd.gradcheck(lambda *t: chunked(t, targets, transform), tensors)


def test_states_alone_and_weight_alone(small_chunks):
    """Whatever needs no gradient gets none; what needs one is right."""
    (states, weight), targets = inputs()
    _, expected = gradients(plain, [states, weight], targets, LogitsTransform())
    weights = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    values = chunked([states.detach(), weight], targets, LogitsTransform())
    [found] = torch.autograd.grad((values * weights).sum(), [weight])
    torch.testing.assert_close(found, expected[1], rtol=1e-10, atol=1e-12)
    assert not chunked([states.detach(), weight.detach()], targets, LogitsTransform()).requires_grad


def test_a_second_backward_pass_gives_the_same(small_chunks):
    tensors, targets = inputs(torch.float32)
    values = chunked(tensors, targets, LogitsTransform())
    first = torch.autograd.grad(values.sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(values.sum(), tensors)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_bfloat16_states_keep_float32_sums(small_chunks):
    """Log-probabilities of thousands of tokens in bfloat16 alone would be off by whole nats."""
    tensors, targets = inputs(torch.bfloat16)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected, expected_gradients = gradients(plain, wide, targets, LogitsTransform())
    values, found = gradients(chunked, tensors, targets, LogitsTransform())
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=0.02, atol=0.02)
    for one, other in zip(found, expected_gradients, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() <= 0.02 * other.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradient_of_a_likely_token_is_not_lost_beside_large_scores(dtype, frozen: bool):
    """Scores 128 * 16 = 2048 of the target and 128 * 15.9375 = 2040 of one rival, 0 of the others.

    So 1 - p = 1 / (1 + e^8) = 3.3535e-4, the state's gradient is (1 - p) (16 - 15.9375) = 2.096e-5
    and those of the two rows of the weight are (1 - p) 128 = 0.042925 and its negative. In float32
    the log-sum-exp is 2048.000244 for 2048.000335: 1 - p taken from it is wrong by a quarter, and
    the difference of the two rows by far more.
    """
    weight = torch.zeros(VOCABULARY, 2, dtype=dtype)
    weight[4, 0], weight[9, 0] = 16, 15.9375
    states = torch.tensor([[128.0, 0.0]], dtype=dtype, requires_grad=True)
    weight.requires_grad_(not frozen)
    value = token_logps(states, weight, None, torch.tensor([4]), LogitsTransform())
    value.sum().backward()
    left = 1 / (1 + math.exp(8))
    assert value.item() == pytest.approx(-left, rel=1e-3)
    # The rival's own p is off by 9e-5 of it, of which the difference of the rows makes 255 times.
    assert states.grad[0].tolist() == pytest.approx([left * 0.0625, 0], rel=0.05)
    if not frozen:
        assert weight.grad[4].tolist() == pytest.approx([128 * left, 0], rel=0.01)
        assert weight.grad[9].tolist() == pytest.approx([-128 * left, 0], rel=0.01)


def test_the_gradient_of_a_bias_is_added_up_in_float32():
    """259 tokens, all of them the first of 64 that are as likely: 259 * 63 / 64 and -259 / 64.

    A bfloat16 holds 1 / 64 and 63 / 64, but neither of the sums, which take more than eight bits.
    """
    states, weight = torch.zeros(259, SIZE), torch.zeros(64, SIZE)
    bias = torch.zeros(64, requires_grad=True)
    targets = torch.zeros(259, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = token_logps(states, weight, bias, targets, LogitsTransform())
    values.sum().backward()
    assert bias.grad[0].item() == 259 * 63 / 64
    assert bias.grad[1:].tolist() == [-259 / 64] * 63


def test_autocast_computes_products_in_bfloat16_and_gives_float32_weights_theirs():
    tensors, targets = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, found = gradients(chunked, tensors, targets, LogitsTransform())
    plain_values, plain_gradients = gradients(plain, tensors, targets, LogitsTransform())
    assert not torch.equal(values, plain_values)
    torch.testing.assert_close(values, plain_values, rtol=0.03, atol=0.03)
    for one, other in zip(found, plain_gradients, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.02 * other.norm()


def test_huge_scores_stay_finite():
    states = torch.full((2, SIZE), 1e4)
    weight = torch.randn(VOCABULARY, SIZE, generator=torch.Generator().manual_seed(0)) * 1e4
    values = token_logps(states, weight, None, torch.tensor([1, 2]), LogitsTransform())
    assert values.isfinite().all()
    assert (values <= 0).all()


@pytest.mark.parametrize(("kept", "products"), [(1 << 24, 3), (0, 4)])
def test_products_are_computed_once_or_once_more(monkeypatch, kept, products):
    """2 n V d FLOPs a product: forward, states, weight, and the scores again where not kept."""
    monkeypatch.setattr(head, "_ON_CPU", head.Limits(scores=1 << 20, kept=kept))
    tensors, targets = inputs(torch.float32)
    with FlopCounterMode(display=False) as counter:
        gradients(chunked, tensors, targets, LogitsTransform())
    assert counter.get_total_flops() == products * 2 * TOKENS * VOCABULARY * SIZE


def test_a_frozen_head_costs_two_products():
    (states, weight), targets = inputs(torch.float32)
    with FlopCounterMode(display=False) as counter:
        chunked([states, weight.detach()], targets, LogitsTransform()).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * TOKENS * VOCABULARY * SIZE


# Collisions ---------------------------------------------------------------------------------------


def with_collisions(tensors, targets, transform):
    states, weight, *bias = tensors
    return token_logps_and_collisions(states, weight, bias[0] if bias else None, targets, transform)


def plain_collisions(tensors, transform):
    """log sum_v p_v^2 out of each token's log-probability, one token after the other."""
    every = range(VOCABULARY)
    logps = [plain(tensors, torch.full((TOKENS,), v), transform) for v in every]
    return torch.stack(logps).exp().square().sum(0).log().detach()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_collisions_are_those_of_a_log_softmax(small_chunks, transform, bias, dtype, tolerance):
    tensors, targets = inputs(dtype, bias=bias)
    _, collisions = with_collisions(tensors, targets, transform)
    expected = plain_collisions(tensors, transform)
    assert collisions.dtype == dtype
    torch.testing.assert_close(collisions, expected, rtol=tolerance, atol=tolerance)
    # Between that of all words alike and that of a certain one.
    assert (collisions > -math.log(VOCABULARY)).all()
    assert (collisions < 0).all()


def test_collisions_of_bfloat16_states_are_float32(small_chunks):
    tensors, targets = inputs(torch.bfloat16)
    _, collisions = with_collisions(tensors, targets, LogitsTransform())
    expected = plain_collisions([tensor.double() for tensor in tensors], LogitsTransform())
    assert collisions.dtype == torch.float32
    torch.testing.assert_close(collisions.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("frozen", [False, True])
def test_collisions_change_nothing_and_have_no_gradient(small_chunks, frozen):
    tensors, targets = inputs(torch.float32, bias=True)
    if frozen:
        tensors = [tensors[0], *(tensor.detach() for tensor in tensors[1:])]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    values = chunked(tensors, targets, TRANSFORMS["both"])
    expected = torch.autograd.grad(values.sum(), wanted)
    again, collisions = with_collisions(tensors, targets, TRANSFORMS["both"])
    assert torch.equal(again, values)
    assert not collisions.requires_grad
    # A weight made of them is a number to the backward pass, as WPO has it.
    found = torch.autograd.grad((again * (collisions * 0 + 1)).sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_collisions_of_extreme_scores():
    alike, certain = torch.zeros(1, VOCABULARY), torch.zeros(1, VOCABULARY)
    certain[0, 3] = 1e4
    huge = torch.tensor([[3e8, 3e8, -3e8, 0.0]])
    assert collision_logps(alike).item() == pytest.approx(-math.log(VOCABULARY), rel=1e-6)
    assert collision_logps(certain).item() == 0
    assert collision_logps(huge).item() == pytest.approx(-math.log(2), rel=1e-6)


def test_scores_are_left_as_they_were():
    """The head keeps them for the backward pass."""
    scores = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    collision_logps(scores)
    assert torch.equal(scores, before)


def test_who_does_not_ask_for_collisions_pays_for_none(monkeypatch):
    def never(logits):
        raise AssertionError

    monkeypatch.setattr(head, "collision_logps", never)
    tensors, targets = inputs(torch.float32)
    chunked(tensors, targets, LogitsTransform()).sum().backward()
    with pytest.raises(AssertionError):
        with_collisions(tensors, targets, LogitsTransform())


@pytest.mark.parametrize("frozen", [pytest.param(False, marks=pytest.mark.slow), True])
def test_scores_of_a_large_vocabulary_never_stand_all_at_once(frozen: bool):
    """2,048 tokens over 131,072: 268 million scores, of which 4 million stand at a time."""
    n, size, vocabulary = 2048, 8, 131072
    states = torch.randn(n, size, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(vocabulary, size), requires_grad=not frozen)
    targets = torch.randint(vocabulary, (n,))
    with Results() as largest:
        token_logps(states, weight, None, targets, LogitsTransform()).sum().backward()
    assert 1 << 20 < largest.entries <= 1 << 22
    assert weight.numel() < 1 << 22


# On CUDA ----------------------------------------------------------------------------------------


def unrounded(one, other, *, out_dtype):
    """A product of half precision as CUDA gives it in float32: summed up in it, and left there."""
    assert one.dtype == other.dtype
    assert one.dtype in (torch.bfloat16, torch.float16)
    assert out_dtype == torch.float32
    return one.float() @ other.float()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_come_out_in_float32_on_cuda(
    small_chunks, monkeypatch, dtype, frozen, bias
):
    """Values are those of a float32 log-softmax of the same rounded inputs, to 1e-5 nats.

    Rounded products are off by a hundredth and more. Gradients are within the rounding of half
    precision, 2^-8 for bfloat16, as the probabilities behind them are rounded once.
    """
    tensors, targets = inputs(dtype, bias=bias)
    if frozen:
        tensors = [tensors[0], *(tensor.detach() for tensor in tensors[1:])]
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    expected = plain(wide, targets, LogitsTransform())
    weights = torch.linspace(-1, 2, TOKENS)
    expected_gradients = torch.autograd.grad(
        (expected * weights.double()).sum(), [t for t in wide if t.requires_grad]
    )

    rounded = chunked(tensors, targets, LogitsTransform())
    monkeypatch.setattr(head, "is_cuda", lambda device: True)
    monkeypatch.setattr(torch, "mm", unrounded)
    values = chunked(tensors, targets, LogitsTransform())
    found = torch.autograd.grad((values * weights).sum(), trained)
    assert (values - expected).abs().max() < 1e-5
    assert (rounded - expected).abs().max() > (1e-2 if dtype == torch.bfloat16 else 1e-3)
    for one, other, tensor in zip(found, expected_gradients, trained, strict=True):
        assert one.dtype == tensor.dtype
        assert (one.double() - other).norm() / other.norm() < 2**-8


def test_a_product_of_float32_states_is_as_it_was_on_cuda(monkeypatch):
    monkeypatch.setattr(head, "is_cuda", lambda device: True)
    monkeypatch.setattr(torch, "mm", None)
    (states, weight), targets = inputs(torch.float32)
    expected = plain([states, weight], targets, LogitsTransform())
    torch.testing.assert_close(chunked([states, weight], targets, LogitsTransform()), expected)
