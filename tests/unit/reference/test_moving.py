"""A reference that follows the policy: against a plain loop, by hand, over ranks, and resumed."""

import copy
import datetime
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh

from dpo_lightning.data.packing import collate_groups
from dpo_lightning.errors import UserError
from dpo_lightning.models.adapters import Adapters, LoraSettings, count_parameters
from dpo_lightning.models.loading import meta_model
from dpo_lightning.models.master_weights import cast_frozen
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import shard_model
from dpo_lightning.reference.moving import Movement, MovingReference, make_moving, say_if_still
from dpo_lightning.training.strategies import ShardedStrategy
from tests.support.batches import relative
from tests.support.models import make_model
from tests.support.ranks import on_ranks
from tests.support.recovery import differences
from tests.support.steps import Taken, in_turn, pair, plain_logps, take_steps, with_logratios

CPU = torch.device("cpu")
LORA = LoraSettings(r=3, alpha=6, target_modules=None, rslora=False, dora=False, gaussian=True)
DORA = replace(LORA, r=2, alpha=4, dora=True)
# A large epsilon: Adam would make a step of any size out of a gradient that is only rounding.
HOW: dict[str, Any] = {"steps": 5, "beta": 0.5, "lr": 1e-2, "eps": 1e-3}
EVERY, ALPHA = 2, 0.6


def groups(count: int = 5) -> list[Any]:
    return [pair(number, weight=1.0) for number in range(count)]


def moving(
    policy: Any,
    *,
    every: int = EVERY,
    alpha: float = ALPHA,
    adapters: Adapters | None = None,
    reference: Any = None,
    dtype: torch.dtype | None = None,
) -> MovingReference:
    """A reference that starts as the policy, or as another model."""
    scorer = Scorer("flat")
    model = reference
    if adapters is not None:
        model = adapters.copy
    elif reference is None:
        model = copy.deepcopy(policy)
    scorer.prepare(model)
    return make_moving(
        model,
        scorer,
        policy=policy,
        adapters=adapters,
        movement=Movement(every, alpha),
        cast=lambda model: model if dtype is None else cast_frozen(model, dtype),
    )


def adapt(policy: Any, settings: LoraSettings = LORA) -> Adapters:
    return Adapters(
        policy,
        settings,
        reference=None,
        dropout=0.0,
        seed=3,
        load_base=lambda: make_model("llama"),
        moves=True,
    )


def plain_loop(policy: Any, reference: Any, pairs: dict[str, str]) -> tuple[list[float], Any]:
    """Losses of each step of a float32 loop written out, and the reference after them.

    Args:
        policy: The model to train; what needs a gradient is trained.
        reference: Another model.
        pairs: Names of the policy's trained weights, and of those of the reference that follow.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=HOW["lr"], eps=HOW["eps"], weight_decay=0.0)
    losses = []
    for step, group in enumerate(groups(), start=1):
        chosen, rejected = plain_logps(policy, group)
        with torch.no_grad():
            other_chosen, other_rejected = plain_logps(reference, group)
        margin = (chosen - other_chosen) - (rejected - other_rejected)
        loss = torch.log1p(torch.exp(-HOW["beta"] * margin))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            with torch.no_grad():
                for own, other in pairs.items():
                    value = reference.get_parameter(other)
                    mean = ALPHA * policy.get_parameter(own) + (1 - ALPHA) * value
                    value.copy_(mean)
    return losses, reference


# Against a plain loop -----------------------------------------------------------------------------


def test_full_weights_follow_as_in_a_plain_loop(tmp_path):
    """Five steps, updates after the second and the fourth; the first loss is ln 2."""
    model = make_model("llama")
    reference = moving(model)
    names = {name: name for name, _ in model.named_parameters()}
    losses, expected = plain_loop(make_model("llama"), make_model("llama"), names)
    taken = take_steps(
        tmp_path,
        in_turn(*groups()),
        model=model,
        reference=reference,
        starts_from_reference=True,
        **HOW,
    )
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert max(abs(loss - math.log(2)) for loss in losses[1:]) > 0.01
    assert taken.values("train/loss") == pytest.approx(losses, abs=1e-5)
    start = make_model("llama")
    for name in names:
        found = reference.model.get_parameter(name)
        own = expected.get_parameter(name)
        gone = (own - start.get_parameter(name)).norm()
        assert (found - own).norm() <= 1e-3 * gone + 1e-7, name


@pytest.mark.parametrize("settings", [LORA, DORA], ids=["lora", "dora"])
def test_a_copy_of_an_adapter_follows_as_in_a_plain_loop(tmp_path, settings: LoraSettings):
    """Matrix by matrix, beside a base that stays as it is; the oracle is two models of PEFT's."""
    model = make_model("llama")
    adapters = adapt(model, settings)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    config = LoraConfig(task_type="CAUSAL_LM", **settings.arguments())
    policy = get_peft_model(make_model("llama"), config).base_model.model
    with torch.no_grad():
        for name, value in start.items():
            policy.get_parameter(name).copy_(value)
    losses, expected = plain_loop(policy, copy.deepcopy(policy), {name: name for name in start})
    base = {name: p.detach().clone() for name, p in model.named_parameters() if ".base_" in name}
    reference = moving(model, adapters=adapters)
    taken = take_steps(
        tmp_path,
        in_turn(*groups()),
        model=model,
        reference=reference,
        starts_from_reference=True,
        **HOW,
    )
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert taken.values("train/loss") == pytest.approx(losses, abs=1e-5)
    for name, first in start.items():
        found = model.get_parameter(adapters.name_of_copy(name))
        own = expected.get_parameter(name)
        assert (found - own).norm() <= 1e-3 * (own - first).norm() + 1e-7, name
    assert all(torch.equal(model.get_parameter(name), value) for name, value in base.items())


def test_the_start_of_an_adapter_is_still_the_reference_that_answers_are_measured_from(tmp_path):
    """The base model; the copy has moved away from it, and is not counted among the weights."""
    model = make_model("llama")
    plain = copy.deepcopy(model).eval()
    adapters = adapt(model)
    total, trained = count_parameters(model)
    assert total == count_parameters(plain)[0] + trained
    take_steps(
        tmp_path,
        in_turn(*groups()),
        model=model,
        reference=moving(model, adapters=adapters, alpha=1.0),
        **HOW,
    )
    scorer, batch = Scorer("flat"), collate_groups(groups(1), [0])
    scorer.prepare(plain)
    with torch.no_grad():
        start, moved, policy, base = (
            scorer.logps(own, batch) for own in (adapters.reference, adapters.copy, model, plain)
        )
    assert torch.equal(start, base)
    assert not torch.equal(moved, start)
    assert not torch.equal(moved, policy)  # a step was taken after the last update
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".default." in name
    }


# By hand ------------------------------------------------------------------------------------------


class One(torch.nn.Module):
    """A model of one weight."""

    def __init__(self, value: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([value], dtype=dtype))


def of_one(start: float, movement: Movement, dtype: torch.dtype) -> MovingReference:
    """A reference of one weight, held in a type."""
    return make_moving(
        One(start),
        None,
        policy=One(start),
        adapters=None,
        movement=movement,
        cast=lambda model: cast_frozen(model, dtype),
    )


def test_alpha_weighs_the_policy():
    """From 1 to a policy of 3: 0.25 * 3 + 0.75 * 1 = 1.5, then of 5: 0.25 * 5 + 0.75 * 1.5 = 2.375.

    Other steps than every third leave it as it is.
    """
    reference = of_one(1.0, Movement(3, 0.25), torch.float32)
    seen = []
    for step, value in enumerate((9.0, 9.0, 3.0, 9.0, 9.0, 5.0, 9.0), start=1):
        reference.follow([torch.tensor([value])], step=step)
        seen.append(reference.model.weight.item())
    assert seen == pytest.approx([1, 1, 1.5, 1.5, 1.5, 2.375, 2.375])


def test_a_hard_update_is_the_policy_to_the_last_bit():
    reference = of_one(0.1, Movement(1, 1.0), torch.float32)
    reference.follow([torch.tensor([0.7])], step=1)
    assert reference.model.weight.item() == torch.tensor(0.7).item()


def test_small_updates_add_up_behind_a_reference_in_16_bits():
    """At 1 two bfloat16 numbers are 2^-7 = 0.0078 apart, so a way of 0.0039 rounds up.

    A tenth of the way to 1.02 each time: 0.02 * (1 - 0.9^n) = 0.002, 0.0038, 0.00542. Updates of
    the rounded weight itself would stay at 1 for ever: 0.002 is lost each time.
    """
    reference = of_one(1.0, Movement(1, 0.1), torch.bfloat16)
    assert reference.model.weight.dtype == torch.bfloat16
    seen = []
    for step in range(1, 4):
        reference.follow([torch.tensor([1.02])], step=step)
        seen.append(reference.model.weight.item())
    assert seen == [1.0, 1.0, 1.0078125]
    assert reference.state(keep=True)["weight"].item() == pytest.approx(1.00542, abs=1e-6)


def test_the_float32_start_is_kept_and_not_its_rounding():
    """1.003 is 1 in bfloat16. Half of the way to it from there is 1.0015; from itself none."""
    reference = of_one(1.003, Movement(1, 0.5), torch.bfloat16)
    assert reference.model.weight.item() == 1.0
    assert reference.state(keep=True)["weight"].item() == pytest.approx(1.003, abs=1e-7)


def test_the_copy_of_an_adapter_in_16_bits_starts_at_the_adapter_s_float32():
    model = make_model("llama")
    adapters = adapt(model)
    cast_frozen(model, torch.bfloat16)
    reference = moving(model, adapters=adapters)
    for name, value in reference.state(keep=True).items():
        own = model.get_parameter(name)
        rounded = model.get_parameter(adapters.name_of_copy(name))
        assert (value.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(value, own)
        assert value.data_ptr() != own.data_ptr()
        assert torch.equal(rounded, own.bfloat16())


def test_masters_behind_a_rounded_policy_are_followed(tmp_path):
    """The policy computes in bfloat16; its float32 masters count, and the reference is rounded."""
    model = make_model("llama")
    reference = moving(model, every=1, alpha=1.0, dtype=torch.bfloat16)
    taken = take_steps(
        tmp_path,
        in_turn(*groups(2)),
        model=model,
        reference=reference,
        compute_dtype=torch.bfloat16,
        steps=2,
        lr=1e-3,
    )
    taken.trainer.save_checkpoint(tmp_path / "here.ckpt")
    saved = torch.load(tmp_path / "here.ckpt", weights_only=True)
    lost = 0
    for name, value in saved["reference"].items():
        master = saved["state_dict"][f"policy.{name}"]
        assert torch.equal(value, master), name
        assert torch.equal(reference.model.get_parameter(name), master.bfloat16()), name
        lost += not torch.equal(master, master.bfloat16().float())
    assert lost > 3


# Rows ---------------------------------------------------------------------------------------------


def test_rows_with_the_start_s_log_probabilities_are_compared_with_those(tmp_path):
    """Held-out rows bring log-ratios of 1.0 and -0.5 of the start along.

    At a learning rate of nothing the policy stays there: -log sigmoid(0.5 * 1.5) = 0.386871, also
    after the reference has become the policy, by which it would be ln 2.
    """
    model = make_model("llama")
    held_out = [with_logratios(model, pair(9), 1.0, -0.5)]
    reference = moving(model, every=1, alpha=0.5)
    taken = take_steps(
        tmp_path,
        in_turn(*groups(2)),
        model=model,
        reference=reference,
        eval_groups=held_out,
        eval_every=1,
        steps=2,
        beta=0.5,
        lr=1e-12,
    )
    assert taken.values("eval/loss") == pytest.approx([0.386871] * 2, abs=1e-5)
    assert taken.values("train/loss") == pytest.approx([math.log(2)] * 2, abs=1e-5)
    # Two trained and two evaluated; the latter were computed before.
    assert (reference.rows, reference.computed) == (4, 2)


def test_values_of_tokens_are_those_of_the_rows_where_they_have_them():
    model = make_model("llama")
    reference = moving(model)
    [group] = groups(1)
    batch = collate_groups([group], [0])
    live = reference.token_logps(batch, None)
    sums = torch.zeros(2).index_add(0, batch.response, live)
    plain = torch.stack(plain_logps(make_model("llama"), group)).detach()
    torch.testing.assert_close(sums, plain)
    own = tuple(np.full(len(ids), -0.25, dtype=np.float32) for ids in group.responses)
    brought = collate_groups(
        [replace(group, reference_logps=np.zeros(2, np.float32), reference_token_logps=own)], [0]
    )
    assert reference.token_logps(brought, None).tolist() == [-0.25] * 6
    assert (reference.rows, reference.computed) == (2, 1)


# Saved and resumed --------------------------------------------------------------------------------


class StopAfter(pl.Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self._step


def trained(folder: Path, kind: str, **how: Any) -> tuple[Taken, MovingReference]:
    """Five steps of full weights in bfloat16, or of an adapter, and the reference after them."""
    model = make_model("llama")
    if kind == "lora":
        reference = moving(model, adapters=adapt(model))
    else:
        reference = moving(model, dtype=torch.bfloat16)
        how |= {"compute_dtype": torch.bfloat16}
    taken = take_steps(folder, in_turn(*groups()), model=model, reference=reference, **HOW, **how)
    taken.trainer.save_checkpoint(folder / "here.ckpt")
    return taken, reference


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_goes_on_with_the_reference_as_it_had_moved(tmp_path, kind: str, step: int):
    """Stopped at an update and a step behind one: the end is the same to the last bit."""
    _, whole = trained(tmp_path / "whole", kind)
    trained(tmp_path / "first", kind, callbacks=[StopAfter(step)])
    taken, again = trained(tmp_path / "second", kind, checkpoint=tmp_path / "first" / "here.ckpt")
    assert taken.trainer.global_step == 5
    assert differences(whole.state(keep=True), again.state(keep=True)) == []
    ends = [
        torch.load(tmp_path / name / "here.ckpt", weights_only=True) for name in ("whole", "second")
    ]
    for part in ("state_dict", "optimizer_states", "reference"):
        assert differences(ends[0][part], ends[1][part], part) == []
    batch = collate_groups(groups(1), [0])
    assert torch.equal(whole.logps(batch, None), again.logps(batch, None))
    assert all(".lora_" in name for name in ends[0]["reference"]) is (kind == "lora")
    assert not any(".moving." in name for name in ends[0]["state_dict"])


def test_a_checkpoint_without_a_moved_reference_begins_at_the_start(caplog):
    model = make_model("llama")
    reference = moving(model)
    with caplog.at_level("INFO"):
        reference.load(None)
    assert "did not move" in caplog.text
    assert all(map(torch.equal, reference.model.parameters(), model.parameters()))


@pytest.mark.parametrize("change", ["missing", "more", "shape"])
def test_a_moved_reference_of_another_model_is_refused(change: str):
    reference = moving(make_model("llama"))
    state = reference.state(keep=True)
    name = next(iter(state))
    if change == "missing":
        state.pop(name)
    elif change == "more":
        state["another"] = state[name]
    else:
        state[name] = state[name][:1]
    with pytest.raises(UserError, match=r"resume: .* other weights .*first of 1.*model= and peft="):
        reference.load(state)


# What cannot move ---------------------------------------------------------------------------------


def test_a_reference_of_another_shape_is_refused():
    with pytest.raises(
        UserError, match=r"reference\.sync_every: .*only a reference of the policy's"
    ):
        moving(make_model("llama"), reference=make_model("gpt2"))


def test_another_model_of_the_same_shape_moves():
    other = make_model("llama", seed=1)
    model = make_model("llama")
    reference = moving(model, reference=other, every=1, alpha=0.5)
    first = other.lm_head.weight.detach().clone()
    reference.follow([*model.parameters()], step=1)
    expected = (first + model.lm_head.weight.detach()) / 2
    torch.testing.assert_close(reference.model.lm_head.weight.detach(), expected)


@pytest.mark.parametrize(("every", "said"), [(4, False), (5, True)])
def test_updates_that_come_too_late_are_said(every: int, said: bool, caplog):
    """The last of five steps is taken before its update."""
    say_if_still(Movement(every, 0.6), total_steps=5)
    assert ("reference.sync_every=5: the run has 5 steps" in caplog.text) is said


def test_updates_in_words():
    assert Movement(512, 0.6).describe() == "every 512 steps 0.6 policy + 0.4 reference"
    assert Movement(1, 0.01).describe() == "every step 0.01 policy + 0.99 reference"
    assert Movement(2048, 1.0).describe() == "becomes the policy every 2,048 steps"


# Several ranks ------------------------------------------------------------------------------------

SHARED: dict[str, Any] = {
    **{"steps": 4, "batch_size": 4, "beta": 0.5, "lr": 1e-2, "eps": 1e-3, "max_grad_norm": 0.2},
    **{"micro_batch_tokens": 10, "equal_counts": True},
}


def weighted() -> list[Any]:
    """Seven groups of unequal weights: steps of four and of three."""
    return [pair(number, weight=1.0 + number % 3) for number in range(7)]


def _whole_on_two(rank: int, folder: Path) -> dict[str, Any]:
    """Whole models on both ranks (DDP)."""
    model = make_model("llama")
    reference = moving(model)
    taken = take_steps(
        folder / "run", weighted(), model=model, reference=reference, ranks=2, **SHARED
    )
    return {"loss": taken.values("train/loss"), "reference": reference.state(keep=True)}


def _shared_on_two(rank: int, folder: Path, kind: str) -> dict[str, Any]:
    """Shares of both models (FSDP2): rank 0 begins with whole ones, the other with shapes."""
    mesh, scorer = init_device_mesh("cpu", (2,)), Scorer("flat")

    def of_rank() -> Any:
        whole = make_model("llama")
        model = whole if rank == 0 else meta_model(whole.config, dtype=torch.float32)
        scorer.prepare(model)
        return model

    model, adapters, other = of_rank(), None, None
    if kind == "lora":
        adapters = adapt(model)
    else:
        other = shard_model(of_rank(), mesh, CPU, compute_dtype=None).requires_grad_(False).eval()
    shard_model(model, mesh, CPU, compute_dtype=None)
    reference = moving(model, adapters=adapters, reference=other)
    taken = take_steps(
        folder / "run",
        weighted(),
        model=model,
        reference=reference,
        ranks=2,
        strategy=ShardedStrategy(timeout=datetime.timedelta(minutes=1)),
        **SHARED,
    )
    taken.trainer.save_checkpoint(folder / "here.ckpt")
    saved = torch.load(folder / "here.ckpt", weights_only=True)["reference"]
    before = reference.state(keep=True)
    reference.follow([torch.zeros_like(p) for p in taken.module._trained], step=2)
    reference.load(saved)
    assert differences(before, reference.state(keep=True)) == []
    assert bool(reference.state(keep=rank == 0)) is (rank == 0)
    return {"loss": taken.values("train/loss"), "reference": saved}


def alone(folder: Path, kind: str) -> dict[str, Any]:
    model = make_model("llama")
    reference = moving(model, adapters=adapt(model) if kind == "lora" else None)
    taken = take_steps(folder, weighted(), model=model, reference=reference, **SHARED)
    return {"loss": taken.values("train/loss"), "reference": reference.state(keep=True)}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["reference"].keys() == expected["reference"].keys()
    for name, value in expected["reference"].items():
        assert relative(found["reference"][name], value) <= 1e-4, name


@pytest.mark.slow  # two ranks
def test_two_ranks_with_whole_models_equal_one(tmp_path):
    one, other = on_ranks(_whole_on_two, tmp_path, tmp_path)
    expected = alone(tmp_path / "one", "full")
    assert_same(one, expected)
    assert differences(one["reference"], other["reference"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_ranks_that_share_the_models_equal_one(tmp_path, kind: str):
    """Each moves its own shards; a checkpoint has whole tensors, which each takes its shards of."""
    one, other = on_ranks(_shared_on_two, tmp_path, tmp_path, kind)
    assert_same(one, alone(tmp_path / "one", kind))
    assert differences(one["reference"], other["reference"]) == []
