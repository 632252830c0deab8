"""Each strategy on two gloo ranks: its steps are one process's, and no micro-batch costs a message.

Counted is what one training step sends, in steps of two and of six micro-batches a rank.
"""

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from dpo_lightning.models.loading import meta_model
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import decoder_layers, shard_model
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.strategies import ShardedStrategy
from tests.support.models import make_model
from tests.support.operations import Collectives
from tests.support.ranks import on_ranks
from tests.support.steps import pair, take_steps, with_logratios

COMMON: dict[str, Any] = {"steps": 2, "beta": 0.5, "lr": 1e-3, "max_grad_norm": 0.2}
FEW, MANY = 4, 12
WAYS = {
    "ddp": {},
    "fsdp, step": {"sync_every_micro_batch": False},
    "fsdp, micro_batch": {"sync_every_micro_batch": True},
}


def groups(count: int) -> list[Any]:
    model = make_model("llama")
    return [with_logratios(model, pair(n), 0.3 * n, -0.2) for n in range(count)]


def _steps(rank: int, folder: Path, way: str, count: int) -> tuple[dict[str, int], list[float]]:
    model = make_model("llama")
    how: dict[str, Any] = {"model": model, **WAYS[way]}
    if way != "ddp":
        policy = model if rank == 0 else meta_model(model.config, dtype=torch.float32)
        Scorer("flat").prepare(policy)
        mesh = init_device_mesh("cpu", (2,))
        how["model"] = shard_model(policy, mesh, torch.device("cpu"), compute_dtype=None)
        how["strategy"] = ShardedStrategy(timeout=datetime.timedelta(minutes=1))
    sent: list[dict[str, int]] = []
    step = DPOModule.training_step

    def watched(self, batch, batch_idx):
        with Collectives() as found:
            step(self, batch, batch_idx)
        sent.append(dict(found.counts))

    DPOModule.training_step = watched  # in a process of its own
    taken = take_steps(
        folder / f"{way}-{count}",
        groups(count),
        ranks=2,
        batch_size=count,
        equal_counts=way != "ddp",
        micro_batch_tokens=10,
        **how,
        **COMMON,
    )
    DPOModule.training_step = step
    return sent[1], taken.values("train/loss")


def _all_ways(rank: int, folder: Path) -> dict[str, Any]:
    return {way: [_steps(rank, folder, way, n) for n in (FEW, MANY)] for way in WAYS}


@pytest.mark.slow
def test_messages_of_a_step_by_its_micro_batches(tmp_path):
    """DDP reduces once a step, whatever the micro-batches; so does FSDP2, which gathers each layer.

    Of FSDP2 a group is a layer, or all around the layers. A layer is gathered forward and backward
    in each micro-batch, or once where it is still there; what is around them once a step.
    """
    one, other = on_ranks(_all_ways, tmp_path, tmp_path)
    layers = len(list(decoder_layers(make_model("llama"))))
    losses = {
        count: take_steps(
            tmp_path / f"one-{count}",
            groups(count),
            batch_size=count,
            micro_batch_tokens=10,
            **COMMON,
        ).values("train/loss")
        for count in (FEW, MANY)
    }
    reduced = {}
    for way in WAYS:
        for number, count in enumerate((FEW, MANY)):
            sent, found = one[way][number]
            assert sent == other[way][number][0], way
            assert found == pytest.approx(losses[count], rel=1e-5), way
            passes = count // 2
            reduced[way, count] = sent.pop("_reduce_scatter_base_", 0)
            gathered = sent.pop("_allgather_base_", 0)
            assert gathered <= (0 if way == "ddp" else 2 * layers * passes + 1), (way, sent)
        # All else is as much in a step of three times the micro-batches.
        few, many = (dict(one[way][number][0]) for number in (0, 1))
        assert few == many, way
        assert 0 < sum(few.values()) <= 8, (way, few)
    assert reduced["ddp", FEW] == reduced["ddp", MANY] == 0
    assert reduced["fsdp, step", FEW] == reduced["fsdp, step", MANY] == layers + 1
    assert reduced["fsdp, micro_batch", MANY] == (layers + 1) * MANY // 2
