"""One optimizer step, number by number: gradient, clip, AdamW, learning rate."""

import math

import lightning.pytorch as pl
import pytest
import torch

from tests.support.batches import relative
from tests.support.models import make_model
from tests.support.steps import in_turn, pair, plain_logps, take_steps, with_logratios

BETA = 0.5
# Nothing moves: steps can be compared whose gradients are of the same weights.
STILL = {"lr": 1e-12}


def policy():
    return make_model("llama")


def groups_apart():
    """Two pairs whose margins are 0.8 and -1.2 and whose weights are 1 and 3."""
    model = policy()
    return [
        with_logratios(model, pair(1), 0.5, -0.3),
        with_logratios(model, pair(2, weight=3.0), -0.2, 1.0),
    ]


def plain_gradients(groups) -> list[torch.Tensor]:
    """Gradients of sum_g w_g log(1 + exp(-beta margin_g)) / sum_g w_g, by a plain forward pass."""
    model = policy()
    loss = torch.zeros(())
    for group in groups:
        chosen, rejected = plain_logps(model, group)
        reference = torch.from_numpy(group.reference_logps)
        margin = (chosen - reference[0]) - (rejected - reference[1])
        loss = loss + group.weight * torch.log1p(torch.exp(-BETA * margin))
    (loss / sum(group.weight for group in groups)).backward()
    return [parameter.grad for parameter in model.parameters()]


def in_groups(tensors) -> list[torch.Tensor]:
    """Weights in the optimizer's order: matrices, which may decay, before vectors."""
    return [t for t in tensors if t.ndim >= 2] + [t for t in tensors if t.ndim < 2]


def norm(tensors) -> float:
    return math.hypot(*(tensor.norm().item() for tensor in tensors))


@pytest.mark.parametrize("micro_batch_tokens", [1000, 1])
def test_a_step_has_the_gradient_of_a_plain_loop(tmp_path, micro_batch_tokens: int):
    """AdamW's first moments are (1 - 0.9) g and 0.001 g^2; the metric is the norm of g.

    The loss is (1 log(1 + e^-0.4) + 3 log(1 + e^0.6)) / 4 = (0.513015 + 3 * 1.037488) / 4.
    """
    groups = groups_apart()
    taken = take_steps(
        tmp_path, groups, batch_size=2, beta=BETA, micro_batch_tokens=micro_batch_tokens, **STILL
    )
    expected = in_groups(plain_gradients(groups))
    first, second = taken.moments["exp_avg"], taken.moments["exp_avg_sq"]
    assert len(first) == len(expected)
    for gradient, one, two in zip(expected, first, second, strict=True):
        assert relative(one, 0.1 * gradient) < 1e-4
        assert relative(two, 0.001 * gradient.square()) < 1e-4
    assert taken.values("train/loss") == pytest.approx([(0.513015 + 3 * 1.037488) / 4], abs=1e-5)
    assert taken.values("train/grad_norm") == pytest.approx([norm(expected)], rel=1e-4)


def test_a_clipped_step_is_the_unclipped_one_scaled(tmp_path):
    """A limit of half of the norm halves every entry: 0.1 g / 2 and 0.001 g^2 / 4.

    Together the first moments then have the norm 0.1 * limit. A limit above it changes nothing, and
    what is logged is the norm before the clip.
    """
    groups = groups_apart()

    def step(name: str, limit: float | None):
        return take_steps(
            tmp_path / name, groups, batch_size=2, beta=BETA, max_grad_norm=limit, **STILL
        )

    plain = step("plain", None)
    [size] = plain.values("train/grad_norm")
    clipped, above = step("clipped", size / 2), step("above", size * 2)
    for kind, share in (("exp_avg", 0.5), ("exp_avg_sq", 0.25)):
        for one, other in zip(clipped.moments[kind], plain.moments[kind], strict=True):
            torch.testing.assert_close(one, share * other, rtol=1e-5, atol=0)
        assert all(map(torch.equal, above.moments[kind], plain.moments[kind]))
    assert norm(clipped.moments["exp_avg"]) == pytest.approx(0.1 * size / 2, rel=1e-5)
    for taken in (clipped, above):
        assert taken.values("train/grad_norm") == pytest.approx([size], rel=1e-6)


def test_a_step_begins_without_the_gradient_of_the_one_before(tmp_path):
    """Two steps of one group each: 0.9 * 0.1 g_1 + 0.1 g_2, where nothing moves in between."""
    groups = groups_apart()
    taken = take_steps(tmp_path, in_turn(*groups), steps=2, beta=BETA, **STILL)
    one, other = (in_groups(plain_gradients([group])) for group in groups)
    for moment, first, second in zip(taken.moments["exp_avg"], one, other, strict=True):
        assert relative(moment, 0.09 * first + 0.1 * second) < 1e-4


def test_weights_take_the_step_of_adamw_and_matrices_decay(tmp_path):
    """The first step is lr * g / (|g| + eps); before it a matrix loses lr * decay of itself."""
    lr, eps, decay = 0.01, 1e-3, 0.2
    groups = groups_apart()
    start = policy()
    gradients = dict(
        zip((n for n, _ in start.named_parameters()), plain_gradients(groups), strict=True)
    )
    taken = take_steps(
        tmp_path, groups, batch_size=2, beta=BETA, lr=lr, eps=eps, weight_decay=decay
    )
    found = taken.weights
    for name, weight in start.named_parameters():
        gradient = gradients[name]
        kept = 1 - lr * decay if weight.ndim >= 2 else 1.0
        expected = weight.detach() * kept - lr * gradient / (gradient.abs() + eps)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=2e-6, msg=name)


class Moved(pl.Callback):
    """Records how far the weight that went farthest went in each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_start(self, trainer, pl_module):
        self._before = [p.detach().clone() for p in pl_module.policy.parameters()]

    def on_train_batch_end(self, trainer, pl_module, *_):
        now = [p.detach().clone() for p in pl_module.policy.parameters()]
        moved = [(a - b).abs().max().item() for a, b in zip(now, self._before, strict=True)]
        self.steps.append(max(moved))
        self._before = now


# Shares of the peak in each of eight steps, two of which warm up. A half turn of the cosine goes
# over six steps: (1 + cos(pi k / 6)) / 2, of which the cosine is 1, 0.866025, 0.5, 0, -0.5, ...
SHARES = {
    "linear": [0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    "cosine": [0, 1 / 2, 1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873],
    "constant": [0, 1 / 2, 1, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("schedule", SHARES)
def test_each_step_has_its_own_learning_rate(tmp_path, schedule: str):
    """The rates that are logged are those that the weights move by.

    With decay rates of 0 AdamW's step is lr * g / (|g| + eps), as good as lr where g is not small.
    """
    peak, moved = 1e-3, Moved()
    taken = take_steps(
        tmp_path,
        groups_apart(),
        steps=8,
        beta=BETA,
        lr=peak,
        betas=(0.0, 0.0),
        schedule=schedule,
        warmup_steps=2,
        callbacks=[moved],
    )
    expected = [peak * share for share in SHARES[schedule]]
    assert taken.values("train/learning_rate") == pytest.approx(expected, abs=1e-9)
    assert moved.steps == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_without_a_warm_up_the_first_step_has_the_peak(tmp_path):
    taken = take_steps(
        tmp_path, groups_apart(), steps=2, lr=1e-3, schedule="linear", warmup_steps=0
    )
    assert taken.values("train/learning_rate") == pytest.approx([1e-3, 5e-4])
