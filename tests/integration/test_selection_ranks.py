"""Two ranks select checkpoints, end early and export as one process does, and go on so too."""

import pytest
from safetensors.torch import load_file

from tests.support.ranks import launch
from tests.support.recovery import assert_same_end
from tests.support.runs import Run
from tests.support.warm import run_apart

pytestmark = pytest.mark.long

# Steps of such a size that held-out rows are soon predicted worse than before.
TASK = (
    *("data.batch_size=4", "data.controlled.train_groups=48", "data.controlled.eval_groups=9"),
    *("trainer.max_steps=30", "optimizer.lr=0.03", "optimizer.schedule=constant"),
    *("optimizer.warmup=0", "evaluation.every_n_steps=2", "checkpoint.every_n_steps=3"),
    *("checkpoint.monitor=eval/loss", "checkpoint.patience=3", "checkpoint.export=best"),
    *("checkpoint.keep=2", "evaluation.partition_samples=0", "evaluation.samples=0"),
)


def saved(run: Run) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (run.folder / "checkpoints").glob("*.ckpt"))


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Run:
    return launch(tmp_path_factory.mktemp("one") / "run", *TASK)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_decide_like_one_process(one: Run, tmp_path, strategy: str):
    """Best step, end and kept checkpoints are the same; values and weights but for rounding."""
    assert one.result["selection"]["stopped_early"]
    assert one.result["exported_step"] < one.result["step"] < 30
    two = launch(tmp_path / "run", *TASK, f"strategy={strategy}", "trainer.devices=2")
    for key in ("step", "exported_step"):
        assert two.result[key] == one.result[key], key
    own, theirs = one.result["selection"], two.result["selection"]
    assert theirs == own | {"best": pytest.approx(own["best"], rel=1e-4)}
    assert saved(two) == saved(one)
    weights = [load_file(run.folder / "model" / "model.safetensors") for run in (one, two)]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_one_goes_on_and_ends_the_same(tmp_path, strategy: str):
    """Rank 0 is gone in the fifth step, after an evaluation at the fourth."""
    task = (
        *(*TASK, f"strategy={strategy}", "trainer.devices=2", "trainer.accelerator=cpu"),
        *("trainer.threads=1", "logger=none", "plugins=[tests.support.disturbances]"),
        "trainer.callbacks=[disturb]",
    )
    whole = run_apart(*task, f"hydra.run.dir={tmp_path / 'whole'}", env={"DISTURB": "vanish:99:0"})
    assert whole.returncode == 0, whole.stdout + whole.stderr
    own = (*task, f"hydra.run.dir={tmp_path / 'run'}")
    assert run_apart(*own, env={"DISTURB": "vanish:5:0"}).returncode != 0
    again = run_apart(*own, "resume=auto", env={"DISTURB": "vanish:99:0"})
    assert again.returncode == 0, again.stdout + again.stderr
    undisturbed, resumed = Run(0, tmp_path / "whole"), Run(0, tmp_path / "run")
    step = resumed.result["resumed"]["step"]
    assert step in (2, 3, 4)
    assert_same_end(resumed, undisturbed, after=step)
    for key in ("step", "exported_step", "selection"):
        assert resumed.result[key] == undisturbed.result[key], key
    assert saved(resumed) == saved(undisturbed)
