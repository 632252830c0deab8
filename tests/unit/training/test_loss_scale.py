"""Steps in float16: scaled backward passes, one division, a clip; overflows are tried again."""

import logging
import math
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from dpo_lightning.errors import DivergedError
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.reference.kinds import LiveReference
from dpo_lightning.training.checkpoints.exact_resume import ExactResume
from dpo_lightning.training.loss_scale import Float16Precision
from dpo_lightning.training.outcome import agree
from tests.support.batches import relative
from tests.support.models import make_model
from tests.support.ranks import on_ranks
from tests.support.steps import in_turn, pair, plain_logps, take_steps, with_logratios

BETA = 0.5
# With a larger one some gradients of these models come close to the limit.
START = 2.0**10


def group(number: int, chosen: float, rejected: float, **changes):
    return with_logratios(make_model("llama"), pair(number, **changes), chosen, rejected)


def groups(count: int = 4):
    ratios = [(0.5, -0.3), (-0.2, 1.0), (0.4, -0.4), (0.1, 0.2), (1.0, 0.0), (-0.5, 0.5)]
    return [
        group(number, *ratio, weight=1.0 + number % 2)
        for number, ratio in enumerate(ratios[:count], start=1)
    ]


def plain_gradients(own) -> list[torch.Tensor]:
    """Gradients of sum_g w_g log(1 + exp(-beta margin_g)) / sum_g w_g, in plain float32."""
    model = make_model("llama")
    loss = torch.zeros(())
    for one in own:
        chosen, rejected = plain_logps(model, one)
        reference = torch.from_numpy(one.reference_logps)
        margin = (chosen - reference[0]) - (rejected - reference[1])
        loss = loss + one.weight * torch.log1p(torch.exp(-BETA * margin))
    (loss / sum(one.weight for one in own)).backward()
    found = [parameter.grad for parameter in model.parameters()]
    return [t for t in found if t.ndim >= 2] + [t for t in found if t.ndim < 2]


def norm(tensors) -> float:
    return math.hypot(*(tensor.norm().item() for tensor in tensors))


class Overflows(pl.Callback):
    """Makes the gradient of one weight infinite in the first tries at some steps, from 1.

    Args:
        **tries: How many, by step.
    """

    def __init__(self, tries: dict[int, float]) -> None:
        self._left = dict(tries)
        self.counts: list[int] = []

    def on_train_start(self, trainer, pl_module):
        def spoil(gradient):
            self.counts.append(trainer.global_step)
            left = self._left.get(trainer.global_step + 1, 0)
            self._left[trainer.global_step + 1] = left - 1
            return gradient * torch.inf if left > 0 else gradient

        next(pl_module.policy.parameters()).register_hook(spoil)


class Types(pl.Callback):
    """Types of what the first linear layer gives in training."""

    def __init__(self) -> None:
        self.found: set[torch.dtype] = set()

    def on_train_start(self, trainer, pl_module):
        layer = next(m for m in pl_module.policy.modules() if isinstance(m, torch.nn.Linear))
        layer.register_forward_hook(lambda module, given, result: self.found.add(result.dtype))


def scaled(*, init: float = START, interval: int = 2000) -> Float16Precision:
    plugin = Float16Precision("cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=init, growth_interval=interval)
    return plugin


# A step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_tokens", [1000, 1])
def test_a_step_in_float16_has_the_gradient_of_a_plain_loop(tmp_path, micro_batch_tokens: int):
    """First moments are 0.1 g once clipped to half of the norm 0.05 g, float32, whatever the scale.

    Of one micro-batch or of two: each is scaled, the sum is divided once. float16 has 11 bits, so a
    gradient of some products is off by less than a per cent.
    """
    own, types = groups(2), Types()
    expected = plain_gradients(own)
    limit = norm(expected) / 2
    taken = take_steps(
        tmp_path, own, batch_size=2, beta=BETA, lr=1e-12, max_grad_norm=limit,
        micro_batch_tokens=micro_batch_tokens, scaled=scaled(), callbacks=[types],
    )  # fmt: skip
    assert types.found == {torch.float16}
    assert {weight.dtype for weight in taken.weights.values()} == {torch.float32}
    assert taken.values("train/grad_norm") == pytest.approx([norm(expected)], rel=0.01)
    first = taken.moments["exp_avg"]
    assert {moment.dtype for moment in first} == {torch.float32}
    assert norm(first) == pytest.approx(0.1 * limit, rel=1e-5)
    together = torch.cat([moment.flatten() for moment in first])
    assert relative(together, 0.05 * torch.cat([g.flatten() for g in expected])) < 0.01
    assert taken.values("train/loss_scale") == [START]
    assert taken.values("train/overflow_skips") == [0]


def test_small_gradients_are_no_zeros(tmp_path):
    """A gradient of beta / 2 = 5e-8 is below the smallest float16, 2^-24; scaled by 2^16 it is not.

    So without the scale next to nothing comes through the layers, and with it all of it.
    """
    found = {}
    for name, plugin in (("scaled", scaled()), ("plain", scaled(init=1.0)), ("single", None)):
        taken = take_steps(
            tmp_path / name, groups(2), batch_size=2, beta=1e-7, lr=1e-12, scaled=plugin
        )
        [found[name]] = taken.values("train/grad_norm")
    assert found["scaled"] == pytest.approx(found["single"], rel=0.02)
    assert abs(found["plain"] - found["single"]) > 0.2 * found["single"]


# Overflows ---------------------------------------------------------------------------------------

COMMON = {"steps": 4, "beta": BETA, "lr": 1e-3, "schedule": "linear", "max_grad_norm": 1.0}


def test_an_overflow_takes_no_step_and_its_groups_come_again(tmp_path, caplog):
    """Step 2 is tried three times: weights, rates and steps are those of a run without overflows.

    A power of two makes no other bits. The scale is 2^10, halved twice.
    """
    own, trouble = in_turn(*groups()), Overflows({2: 2})
    with caplog.at_level(logging.INFO):
        taken = take_steps(tmp_path / "a", own, scaled=scaled(), callbacks=[trouble], **COMMON)
    plain = take_steps(tmp_path / "b", own, scaled=scaled(), **COMMON)
    assert taken.trainer.global_step == plain.trainer.global_step == 4
    assert trouble.counts == [0, 1, 1, 1, 2, 3]
    assert taken.values("train/overflow_skips") == [0, 2, 2, 2]
    assert taken.values("train/loss_scale") == [START, START / 4, START / 4, START / 4]
    assert taken.module.skipped_steps == 0
    for name in ("train/loss", "train/learning_rate", "train/grad_norm"):
        assert taken.values(name) == pytest.approx(plain.values(name), rel=1e-3), name
    assert taken.values("train/learning_rate") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    for name, weight in taken.weights.items():
        torch.testing.assert_close(weight, plain.weights[name], rtol=1e-3, atol=1e-5)
    said = [record for record in caplog.records if "overflow in float16" in record.message]
    assert len(said) == 2
    assert said[0].message.startswith("step 2:")
    assert said[1].message.endswith("scaled by 256")


def test_rows_of_a_reference_count_once_a_step_and_not_once_a_try(tmp_path):
    """Four steps of one group, of which the second is tried three times."""
    scorer = Scorer("flat")
    frozen = make_model("llama")
    scorer.prepare(frozen)
    reference = LiveReference(frozen, scorer)
    trouble = Overflows({2: 2})
    take_steps(
        tmp_path, in_turn(*groups()), reference=reference, scaled=scaled(), callbacks=[trouble],
        **COMMON,
    )  # fmt: skip
    assert trouble.counts[-1] == 3
    assert (reference.rows, reference.computed) == (4, 4)


def test_a_norm_beyond_float32_is_an_overflow_of_finite_gradients():
    """The squares of four gradients of 1e30 are 1e60 each, and no gradient is infinite."""
    plugin = scaled()
    plugin.scaler.scale(torch.ones(()))
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.full((4,), 1e30 * START)
    plugin.unscale(optimizer)
    total = torch.nn.utils.clip_grad_norm_([weight], 1e9)
    outcome = agree(torch.ones(()), total, signal=0, world_size=1)
    assert (outcome.loss, outcome.gradients) == (True, False)
    assert plugin.tries_again(optimizer, outcome, said=None)
    assert (plugin.scale(), plugin.skipped) == (START / 2, 1)


def test_a_scale_that_is_too_large_comes_down_by_itself(tmp_path):
    """From 2^40 to where nothing overflows, before the first step, which is the same."""
    own = groups(2)
    taken = take_steps(tmp_path / "a", own, batch_size=2, beta=BETA, scaled=scaled(init=2.0**40))
    plain = take_steps(tmp_path / "b", own, batch_size=2, beta=BETA, scaled=scaled())
    [skips], [scale] = taken.values("train/overflow_skips"), taken.values("train/loss_scale")
    assert skips > 0
    assert scale == 2.0 ** (40 - skips) > 1
    assert taken.values("train/grad_norm") == pytest.approx(
        plain.values("train/grad_norm"), rel=1e-3
    )


def test_a_mean_margin_is_adapted_once_a_step(tmp_path):
    """Of three tries at a step the first two leave no trace in the moving average."""
    plan = {"adaptive": 0.4, "momentum": 0.75}
    own = in_turn(*groups(3))
    how = {"steps": 3, "beta": BETA, "lr": 1e-12, "plan": plan}
    taken = take_steps(
        tmp_path / "a", own, scaled=scaled(), callbacks=[Overflows({1: 1, 2: 2})], **how
    )
    plain = take_steps(tmp_path / "b", own, scaled=scaled(), **how)
    assert taken.values("train/overflow_skips") == [1, 3, 3]
    assert torch.equal(taken.module.margin_average, plain.module.margin_average)
    assert taken.values("train/beta") == plain.values("train/beta")


def test_a_gradient_that_no_scale_would_help_is_the_end(tmp_path):
    """It is not finite at a scale of 1 either, after 10 halvings of 2^10."""
    plugin = scaled()
    with pytest.raises(DivergedError, match="and the gradient norm is"):
        take_steps(
            tmp_path, in_turn(*groups()), scaled=plugin, callbacks=[Overflows({2: math.inf})],
            **COMMON,
        )  # fmt: skip
    assert (plugin.skipped, plugin.scale()) == (10, 1.0)


def test_a_loss_that_is_not_finite_is_no_overflow(tmp_path):
    """It is passed over where that is allowed, counts as a step, and leaves the scale."""
    bad = pair(2, reference_logps=np.array([np.nan, -1.0], dtype=np.float32))
    own = in_turn(group(1, 0.5, -0.3), bad, group(3, 0.4, -0.4))
    taken = take_steps(
        tmp_path, own, steps=3, beta=BETA, max_skipped_steps=1, scaled=scaled(interval=2)
    )
    assert taken.trainer.global_step == 3
    assert taken.values("train/skipped_steps") == [0, 1, 1]
    assert taken.values("train/overflow_skips") == [0, 0, 0]
    # Two steps that were taken let it grow.
    assert taken.values("train/loss_scale") == [START, START, 2 * START]


# Resuming ----------------------------------------------------------------------------------------


class Saves(pl.Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self._step:
            trainer.save_checkpoint(self._path)


def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path):
    """To the bit: the scale, how long it has been right, the count, weights and moments.

    The scale grows every two steps; of two overflows before the checkpoint, whose scale is another
    than at the start, and one after it, all are counted.
    """
    own, path = in_turn(*groups(6)), tmp_path / "step.ckpt"
    how = {"steps": 6, "beta": BETA, "lr": 1e-3}

    def take(name: str, *callbacks, **more):
        plugin = scaled(interval=2)
        taken = take_steps(
            tmp_path / name,
            own,
            scaled=plugin,
            callbacks=[ExactResume(), *callbacks],
            **how,
            **more,
        )
        return taken, plugin

    whole, plugin = take("whole", Overflows({2: 2, 5: 1}), Saves(path, 3))
    resumed, other = take("resumed", Overflows({5: 1}), checkpoint=path)
    assert torch.load(path, weights_only=True)["Float16Precision"]["skipped"] == 2
    assert resumed.values("train/loss_scale") == whole.values("train/loss_scale")[3:]
    assert len(set(resumed.values("train/loss_scale"))) > 1
    assert plugin.state_dict() == other.state_dict()
    assert (plugin.skipped, other.skipped) == (3, 3)
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    for kind, moments in whole.moments.items():
        assert all(map(torch.equal, resumed.moments[kind], moments))


def test_a_checkpoint_without_a_scale_is_said_and_so_is_one_too_many(tmp_path, caplog):
    own = in_turn(*groups())
    for name, first, then, said in (
        ("one", None, scaled(), "the checkpoint has no loss scale"),
        ("two", scaled(), None, "the checkpoint's loss scale is left out"),
    ):
        path = tmp_path / f"{name}.ckpt"
        callbacks = [ExactResume(), Saves(path, 1)]
        take_steps(tmp_path / name, own, steps=2, scaled=first, callbacks=callbacks)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            take_steps(
                tmp_path / f"{name}-resumed", own, steps=2, scaled=then,
                callbacks=[ExactResume()], checkpoint=path,
            )  # fmt: skip
        assert said in caplog.text


# Two ranks ---------------------------------------------------------------------------------------


# With 2^16 the first of these steps overflows by itself.
SMALL = 2.0**12


def _on_two(rank: int, folder) -> dict:
    """One rank's gradients overflow in the first try at step 2."""
    trouble = Overflows({2: 1}) if rank == 1 else Overflows({})
    taken = take_steps(
        folder / "run", groups(), steps=2, batch_size=2, ranks=2, beta=BETA, max_grad_norm=0.2,
        scaled=scaled(init=SMALL), callbacks=[trouble],
    )  # fmt: skip
    plugin = taken.trainer.precision_plugin
    return {
        "weights": {name: weight.numpy() for name, weight in taken.weights.items()},
        "scale": (plugin.scale(), plugin.skipped, taken.trainer.global_step),
        "counts": trouble.counts,
    }


def test_two_ranks_try_a_step_again_together(tmp_path):
    one, other = on_ranks(_on_two, tmp_path, tmp_path)
    assert one["scale"] == other["scale"] == (SMALL / 2, 1, 2)
    assert one["counts"] == other["counts"] == [0, 1, 1]
    plain = take_steps(
        tmp_path / "one", groups(), steps=2, batch_size=2, beta=BETA, max_grad_norm=0.2,
        scaled=scaled(init=SMALL),
    )  # fmt: skip
    for name, weight in plain.weights.items():
        np.testing.assert_array_equal(one["weights"][name], other["weights"][name])
        np.testing.assert_allclose(one["weights"][name], weight, rtol=2e-2, atol=2e-3)


def _in_shards(rank: int) -> tuple[bool, float, float, int]:
    """Gradients of shards, of which one rank's alone are not finite."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from dpo_lightning.models.sharding import gathered
    from dpo_lightning.training.outcome import agree

    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(torch.nn.Linear(4, 4, bias=False), mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plugin = scaled()
    loss = plugin.scaler.scale(model(torch.ones(2, 4)).sum())
    loss.backward()
    if rank == 1:
        model.weight.grad.to_local()[0, 0] = math.inf
    plugin.unscale(optimizer)
    total = gathered(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    outcome = agree(torch.ones(()), total, signal=0, world_size=2)
    again = plugin.tries_again(optimizer, outcome, said=None)
    return again, plugin.scale(), float(total), plugin.skipped


def test_shards_agree_about_an_overflow_of_one(tmp_path):
    for again, scale, total, skipped in on_ranks(_in_shards, tmp_path):
        assert (again, scale, skipped) == (True, START / 2, 1)
        assert not math.isfinite(total)
