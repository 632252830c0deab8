"""LoRA beside a base that two ranks share equals LoRA on one process: steps, exports, resumes."""

import copy
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from dpo_lightning.data.packing import collate_groups
from dpo_lightning.models.adapters import Adapters, LoraSettings
from dpo_lightning.models.loading import meta_model
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import is_sharded, shard_model
from dpo_lightning.training.strategies import ShardedStrategy
from tests.support.models import make_model
from tests.support.operations import Collectives
from tests.support.ranks import on_ranks
from tests.support.recovery import differences
from tests.support.steps import Taken, pair, plain_logps, take_steps, with_logratios

CPU = torch.device("cpu")
# Rank 3 over two ranks: shares of two rows and of one.
NEW = LoraSettings(r=3, alpha=6, target_modules=None, rslora=False, dora=False, gaussian=True)
# Seven groups of unequal weights in steps of four and of three, and micro-batches of one.
COMMON: dict[str, Any] = {
    **{"steps": 4, "batch_size": 4, "beta": 0.5, "lr": 1e-2, "max_grad_norm": 0.2},
    **{"micro_batch_tokens": 10, "equal_counts": True},
}
METRICS = ("train/loss", "train/grad_norm", "train/logps/chosen")


def groups() -> list[Any]:
    model = make_model("llama")
    return [
        with_logratios(model, pair(number, weight=1.0 + number % 3), 0.3 * number, -0.2)
        for number in range(7)
    ]


def adapt(policy: Any, settings: LoraSettings = NEW) -> Adapters:
    return Adapters(
        policy,
        settings,
        reference=None,
        dropout=0.0,
        seed=3,
        load_base=lambda: make_model("llama"),
    )


def shared(rank: int, settings: LoraSettings = NEW) -> Adapters:
    """The adapted model in shares: rank 0 has it whole, the other one has its shapes alone."""
    whole = make_model("llama")
    policy = whole if rank == 0 else meta_model(whole.config, dtype=torch.float32)
    Scorer("flat").prepare(policy)
    adapters = adapt(policy, settings)
    shard_model(policy, init_device_mesh("cpu", (2,)), CPU, compute_dtype=None)
    return adapters


def strategy() -> ShardedStrategy:
    return ShardedStrategy(timeout=datetime.timedelta(minutes=1))


def save(taken: Taken) -> None:
    taken.trainer.save_checkpoint(taken.folder / "here.ckpt")


def trained(taken: Taken) -> dict[str, Any]:
    """The metrics of each step, and weights and moments of a checkpoint after them."""
    save(taken)
    state = torch.load(taken.folder / "here.ckpt", weights_only=True)
    return {
        "metrics": {name: taken.values(name) for name in METRICS},
        "weights": state["state_dict"],
        "optimizer": state["optimizer_states"],
    }


def _on_two(rank: int, folder: Path) -> dict[str, Any]:
    adapters = shared(rank)
    policy, reference = adapters.policy, adapters.reference
    assert is_sharded(policy)
    assert is_sharded(reference)
    assert all(isinstance(p, DTensor) for p in policy.parameters())
    scorer, batch = Scorer("flat"), collate_groups(groups()[:2], [0, 1])
    with torch.no_grad():
        first = scorer.logps(reference, batch)
    taken = take_steps(
        folder / "two", groups(), model=policy, ranks=2, strategy=strategy(), **COMMON
    )
    with Collectives() as sent:
        found = trained(taken) if rank == 0 else save(taken)
    with torch.no_grad():
        logps = [scorer.logps(model, batch).numpy() for model in (policy, reference)]
    assert np.array_equal(logps[1], first.numpy())
    own = adapters.gathered(keep=rank == 0, with_base=False)
    if own is not None:
        own.save(folder / "adapter", base="the/base", revision=None)
    own = adapters.gathered(keep=rank == 0, with_base=True)
    if own is not None:
        own.merge().save_pretrained(folder / "merged")
    matrices = sum(p.requires_grad for p in policy.parameters())
    # Each with its two moments; nothing of the base.
    assert sent.counts["all_gather_into_tensor"] == 3 * matrices
    return {"taken": found, "policy": logps[0], "reference": logps[1]}


@pytest.mark.slow
def test_two_ranks_equal_one_process_and_export_the_same(tmp_path):
    """Losses, gradient norms, weights and moments; the export in PEFT; the base as reference."""
    one, other = on_ranks(_on_two, tmp_path, tmp_path)
    model = make_model("llama")
    base = copy.deepcopy(model)
    adapt(model)
    alone = trained(take_steps(tmp_path / "one", groups(), model=model, **COMMON))
    found = one["taken"]
    for name, values in alone["metrics"].items():
        assert found["metrics"][name] == pytest.approx(values, rel=1e-5), name
    assert found["weights"].keys() == alone["weights"].keys()
    assert all(".lora_" in name for name in found["weights"])
    for name, weight in alone["weights"].items():
        assert (found["weights"][name] - weight).norm() <= 1e-5 * weight.norm(), name
    [own], [theirs] = found["optimizer"], alone["optimizer"]
    assert own["param_groups"] == theirs["param_groups"]
    for number, moments in theirs["state"].items():
        for name, value in moments.items():
            difference = (own["state"][number][name] - value).norm()
            assert difference <= 1e-3 * value.norm(), (number, name)
    # What was trained is not what it started as, and the base is as it was.
    expected = torch.stack([logp for group in groups()[:2] for logp in plain_logps(base, group)])
    for rank in (one, other):
        np.testing.assert_allclose(rank["reference"], expected.detach(), rtol=1e-5)
        assert np.abs(rank["policy"] - rank["reference"]).max() > 0.05
    for folder, loaded in (
        ("adapter", PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))),
        ("merged", type(base).from_pretrained(tmp_path / "merged")),
    ):
        again = [logp for group in groups()[:2] for logp in plain_logps(loaded.eval(), group)]
        np.testing.assert_allclose(
            torch.stack(again).detach(), one["policy"], rtol=1e-5, err_msg=folder
        )


def _variants(rank: int, folder: Path) -> list[Any]:
    found = []
    for number, settings in enumerate(VARIANTS):
        adapters = shared(rank, settings)
        adapters.policy.activation_checkpointing_enable({"use_reentrant": False})
        taken = take_steps(
            folder / str(number),
            groups(),
            model=adapters.policy,
            ranks=2,
            strategy=strategy(),
            sync_every_micro_batch=True,
            **COMMON,
        )
        save(taken)
        found.append({name: taken.values(name) for name in METRICS})
    return found


# One row, which the second rank has nothing of; lengths apart from directions.
VARIANTS = (
    LoraSettings(r=1, alpha=2, target_modules=["q_proj"], rslora=True, dora=False, gaussian=True),
    LoraSettings(r=2, alpha=4, target_modules=None, rslora=False, dora=True, gaussian=False),
)


@pytest.mark.slow
def test_kinds_of_adapters_are_shared_alike(tmp_path):
    """A rank without rows, DoRA; layers computed again, gradients reduced in each micro-batch."""
    found, _ = on_ranks(_variants, tmp_path, tmp_path)
    for number, settings in enumerate(VARIANTS):
        model = make_model("llama")
        adapt(model, settings)
        alone = take_steps(tmp_path / f"one-{number}", groups(), model=model, **COMMON)
        for name in METRICS:
            assert found[number][name] == pytest.approx(alone.values(name), rel=1e-5), name
        state = torch.load(tmp_path / str(number) / "here.ckpt", weights_only=True)["state_dict"]
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                other = state[f"policy.{name}"]
                assert (other - parameter).norm() <= 1e-5 * parameter.norm(), name


def test_a_rank_without_weights_has_the_adapter_s_names_and_types():
    """Of bfloat16 weights too, beside which PEFT holds float32 matrices."""
    for dtype in (torch.float32, torch.bfloat16):
        whole = make_model("llama").to(dtype)
        meta = meta_model(whole.config, dtype=dtype)
        for settings in (NEW, *VARIANTS):
            models = [copy.deepcopy(whole), copy.deepcopy(meta)]
            seen = []
            for model in models:
                adapt(model, settings)
                seen.append(
                    [
                        (name, p.shape, p.dtype, p.requires_grad)
                        for name, p in model.named_parameters()
                    ]
                )
            assert seen[0] == seen[1]
            assert {p.device.type for p in models[1].parameters()} == {"meta"}
            assert differences([n for n, _ in models[0].named_buffers()],
                               [n for n, _ in models[1].named_buffers()]) == []  # fmt: skip
