"""The links of the f-divergences: against f itself, by hand, and at both ends."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_lightning.objectives.divergences import link
from dpo_lightning.objectives.registry import DIVERGENCES

# f of each, as defined: D_f(pi || pi_ref) = E_ref[f(t)], t = pi / pi_ref. A link is f'(exp(u)) of
# the log-ratio u, up to a constant.
GENERATORS = {
    "reverse_kl": lambda t, a: t * math.log(t),
    "forward_kl": lambda t, a: -math.log(t),
    "js_divergence": lambda t, a: t * math.log(t) - (t + 1) * math.log((t + 1) / 2),
    "alpha_divergence": lambda t, a: (t**a - a * t - (1 - a)) / (a * (a - 1)),
}
ALPHAS = (-1.5, -0.5, 0.5, 2.0, 3.0)
CASES = [(n, 0.5) for n in DIVERGENCES if n != "alpha_divergence"]
CASES += [("alpha_divergence", alpha) for alpha in ALPHAS]


def scores(name, alpha, logratios, dtype=torch.float64):
    linked = link(name, alpha)
    values = torch.as_tensor(logratios, dtype=dtype)
    return values if linked is None else linked(values)


def test_every_divergence_has_a_generator_here():
    assert set(GENERATORS) == set(DIVERGENCES)


@pytest.mark.parametrize(("name", "alpha"), CASES)
def test_differences_of_scores_are_those_of_the_derivative_of_f(name, alpha):
    """f' by central differences, h = 1e-5 t; of two ratios, as f' counts up to a constant."""

    def slope(t):
        h = 1e-5 * t
        return (GENERATORS[name](t + h, alpha) - GENERATORS[name](t - h, alpha)) / (2 * h)

    for u in (-3.0, -0.7, 0.4, 2.5):
        one, other = scores(name, alpha, [u, 0.0]).tolist()
        assert one - other == pytest.approx(slope(math.exp(u)) - slope(1.0), rel=1e-6, abs=1e-8)


def test_scores_by_hand():
    """At u = log 2, t = 2: forward KL 1 - 1/2; JS log(4/3) = 0.287682; alpha 1/2
    (2^-0.5 - 1) / -0.5 = 2 - 2 * 0.707107 = 0.585786; alpha 2, 2 - 1; alpha 3, (4 - 1) / 2.
    """
    u = [math.log(2)]
    assert scores("reverse_kl", 0.5, u).item() == pytest.approx(0.693147, abs=1e-6)
    assert scores("forward_kl", 0.5, u).item() == pytest.approx(0.5, abs=1e-12)
    assert scores("js_divergence", 0.5, u).item() == pytest.approx(0.287682, abs=1e-6)
    assert scores("alpha_divergence", 0.5, u).item() == pytest.approx(0.585786, abs=1e-6)
    assert scores("alpha_divergence", 2.0, u).item() == pytest.approx(1.0, abs=1e-12)
    assert scores("alpha_divergence", 3.0, u).item() == pytest.approx(1.5, abs=1e-12)


def test_the_reverse_kl_needs_no_link():
    assert link("reverse_kl", 0.5) is None
    assert link("alpha_divergence", 1.0) is None
    assert link("alpha_divergence", 1.0 + 1e-7) is None


@pytest.mark.parametrize("near", [1 - 1e-3, 1 + 1e-3, 1 - 1e-5])
def test_close_to_alpha_1_it_is_nearly_the_logarithm(near):
    """(t^e - 1) / e = u + e u^2 / 2 + ...: off by 5e-4 * 9 at u = 3."""
    u = torch.linspace(-3, 3, 13)
    linked = link("alpha_divergence", near)
    assert linked is not None
    assert (linked(u) - u).abs().max() <= abs(near - 1) * 4.6 + 1e-6


@given(u=st.floats(-20, 20))
def test_alpha_0_is_the_forward_kl(u):
    ours = scores("alpha_divergence", 0.0, [u])
    assert torch.equal(ours, scores("forward_kl", 0.5, [u]))
    assert ours.item() == pytest.approx(1 - math.exp(-u), rel=1e-12)


@given(u=st.floats(-500, 500))
def test_js_is_its_closed_form(u):
    """log(2 t / (1 + t)) = log 2 - log(1 + 1/t), at most log 2; far below, u + log 2."""
    value = scores("js_divergence", 0.5, [u]).item()
    expected = math.log(2) - (math.log1p(math.exp(-u)) if u > -30 else -u)
    assert value == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert value <= math.log(2)


@pytest.mark.parametrize(("name", "alpha"), CASES)
def test_it_grows_and_is_0_at_the_reference(name, alpha):
    """f is convex, so f' grows; policy = reference has a score of 0."""
    u = torch.linspace(-12, 12, 97, dtype=torch.float64)
    assert (scores(name, alpha, u).diff() > 0).all()
    assert scores(name, alpha, [0.0]).item() == pytest.approx(0.0, abs=1e-15)


# Where t^(alpha - 1) is large: the wrong side of each.
FAR = [("forward_kl", 0.5, -1), ("alpha_divergence", 3.0, 1), ("alpha_divergence", -1.0, -1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "alpha", "side"), FAR)
def test_far_out_it_goes_on_as_a_line(name, alpha, side, dtype):
    u = torch.tensor([30, 100, 1e4, 1e6], dtype=dtype).mul(side).requires_grad_()
    linked = link(name, alpha)
    assert linked is not None
    values = linked(u)
    values.sum().backward()
    assert values.isfinite().all()
    assert (values * side > 0).all()
    assert (values.abs().diff() > 0).all()
    # The same slope everywhere, exp's where the line starts, and no zero.
    assert u.grad is not None
    assert u.grad.tolist() == pytest.approx([u.grad[0].item()] * 4)
    assert u.grad[0].item() == pytest.approx(math.exp(25), rel=1e-5)
    # The square of a margin of +-2e6 nats still is a float32.
    assert ((values - values.flip(0)) * 2).square().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [-20.0, -5.0, -1e-3, 0.0, 1e-3, 1.0, 5.0, 20.0])
def test_before_the_line_the_gradient_is_that_of_exp(u, dtype):
    """d/du (1 - e^-u) = e^-u. A line that is added and taken away again would round it to 0.

    expm1's own gradient is its value plus 1, so beside 1 it is good to the rounding of 1.
    """
    logratio = torch.tensor([u], dtype=dtype, requires_grad=True)
    linked = link("forward_kl", 0.5)
    assert linked is not None
    linked(logratio).sum().backward()
    assert logratio.grad is not None
    rounding = 2 * torch.finfo(dtype).eps
    assert logratio.grad.item() == pytest.approx(math.exp(-u), rel=1e-6, abs=rounding)


def test_the_line_starts_where_exp_stops():
    """No step, in the value or in the slope."""
    u = torch.tensor([-25 - 1e-6, -25.0, -25 + 1e-6], dtype=torch.float64, requires_grad=True)
    linked = link("forward_kl", 0.5)
    assert linked is not None
    values = linked(u)
    values.sum().backward()
    assert values.diff().tolist() == pytest.approx([math.exp(25) * 1e-6] * 2, rel=1e-3)
    assert u.grad is not None
    assert u.grad.tolist() == pytest.approx([math.exp(25)] * 3, rel=1e-5)


@pytest.mark.parametrize(("name", "alpha"), CASES)
def test_gradients(name, alpha):
    linked = link(name, alpha)
    u = torch.tensor([-3.0, -0.2, 0.1, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    if linked is not None:
        assert torch.autograd.gradcheck(linked, u, rtol=1e-5)


def test_another_name_is_answered_with_the_choices():
    with pytest.raises(ValueError, match="'kl': choose one of reverse_kl, forward_kl"):
        link("kl", 0.5)
