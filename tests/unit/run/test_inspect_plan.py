"""Plan, FLOPs and time of a run that is not started."""

import json
import math

import pytest

from dpo_lightning.data.datamodule import PreferenceDataModule, groups_in_order
from dpo_lightning.run.inspect.speed import Workload, estimated_time
from tests.support.groups import token_group

WORK = Workload(
    parameters=100, trained=100, adapters=False, recomputed=False, tokens=50, reference_tokens=30
)


def test_flops_of_all_weights_and_of_adapters():
    """50 tokens, 100 weights: 2 forward, 2 + 2 backward: 600 a token. Reference: 200 for 30 tokens.

    Beside 8 weights of an adapter the 100 have no gradients: 400 + 2 * 8. Computed again: + 200.
    """
    assert (WORK.training_flops, WORK.reference_flops) == (600 * 50, 200 * 30)
    lora = Workload(100, 8, adapters=True, recomputed=False, tokens=50, reference_tokens=0)
    assert (lora.training_flops, lora.reference_flops) == (416 * 50, 0)
    again = Workload(100, 100, adapters=False, recomputed=True, tokens=50, reference_tokens=0)
    assert again.training_flops == 800 * 50


def leave(folder, *, speed=25.0, parameters=100, trainable=100, status="finished", name="tiny"):
    folder.mkdir(parents=True)
    model = {"name": name, "parameters": parameters, "trainable": trainable}
    result = {"status": status, "model": model, "throughput": {"tokens_per_second": speed}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.mark.parametrize(
    "other",
    [
        {"name": "other"}, {"parameters": 99}, {"trainable": 8}, {"status": "failed"},
        {"speed": None}, {"speed": 0.0}, {"speed": "fast"}, {"speed": math.inf},
    ],
)  # fmt: skip
def test_another_run_tells_no_time(tmp_path, other):
    leave(tmp_path / "runs" / "one", **other)
    (tmp_path / "runs" / "two").mkdir()
    (tmp_path / "runs" / "two" / "result.json").write_text("[1, 2")
    found = estimated_time(WORK, name="tiny", outputs=tmp_path)
    assert (found["seconds"], found["measured"]) == (None, None)
    assert found["training_flops"] == 30_000


@pytest.mark.parametrize("place", ["runs/one", "sweeps/many/beta-0.1"])
def test_an_earlier_run_tells_the_time_of_the_steps(tmp_path, place):
    """50 tokens at 25 a second: two seconds."""
    run = leave(tmp_path / place)
    found = estimated_time(WORK, name="tiny", outputs=tmp_path)
    assert found["seconds"] == 2.0
    assert found["measured"] == {"run": str(run), "tokens_per_second": 25.0}


def test_an_adapter_is_looked_for_with_its_own_weights(tmp_path):
    """``result.json`` counts those of the model and of the adapter."""
    lora = Workload(100, 8, adapters=True, recomputed=False, tokens=50, reference_tokens=0)
    leave(tmp_path / "runs" / "one", parameters=108, trainable=8)
    assert estimated_time(lora, name="tiny", outputs=tmp_path)["seconds"] == 2.0


@pytest.mark.parametrize("first", [0, 3, 5])
def test_groups_of_steps_are_those_that_are_served(first):
    """11 groups in steps of 4 are 3 steps an epoch: 8 steps are in the third."""
    module = PreferenceDataModule(
        train_groups=[token_group(number=n) for n in range(11)],
        eval_groups=[],
        batch_size=4,
        micro_batch_tokens=1000,
        total_steps=8,
        seed=3,
        shared=True,
        num_workers=0,
    )
    module.trainer = type("T", (), {"global_step": first, "world_size": 1, "global_rank": 0})()
    served = [sorted(row for m in step.micro_batches for row in m.rows)
              for step in module.train_dataloader()]  # fmt: skip
    told = groups_in_order(11, batch_size=4, steps=8, seed=3, first=first)
    assert [sorted(rows) for rows in told] == served
