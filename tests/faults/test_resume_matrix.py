"""Every step of two passes is a place to stop at: the resumed run equals the undisturbed one."""

import itertools

import pytest

from tests.support.recovery import DRAWING, assert_same_end, checkpoint
from tests.support.runs import Run, run_train

pytestmark = pytest.mark.faults

# Seventy groups make five steps a pass, the last of them short.
STEPS = 10
TASK = (
    *("data.controlled.train_groups=70", "data.controlled.eval_groups=20", "data.batch_size=16"),
    *("trainer.max_epochs=2", "checkpoint.every_n_steps=1", "checkpoint.keep=99"),
    *("evaluation.samples=2", "evaluation.partition_samples=0", "optimizer.lr=0.01"),
    *("trainer.enable_progress_bar=false", "trainer.accelerator=cpu"),
)

# Two values of each; the first is what a user gets.
FACTORS = {
    "reference": ("reference=cached", "reference=live"),
    "workers": ("data.num_workers=0", "data.num_workers=2"),
    "precision": ("trainer.precision=32-true", "trainer.precision=bf16-mixed"),
    "beta": ("loss.adaptive_beta=0", "loss.adaptive_beta=0.6"),
    "log": ("trainer.log_every_n_steps=1", "trainer.log_every_n_steps=3"),
    "evaluation": ("evaluation.every_n_steps=null", "evaluation.every_n_steps=3"),
    # An adapter's dropout draws random numbers of its own.
    "trained": ("peft=none", "peft=lora peft.dropout=0.1 model.gradient_checkpointing=true"),
}


def pairwise() -> list[tuple[str, ...]]:
    """Eight modes in which any two values of two factors meet: an orthogonal array of 2^7."""
    modes = []
    for a, b, c in itertools.product((0, 1), repeat=3):
        bits = (a, b, c, a ^ b, a ^ c, b ^ c, a ^ b ^ c)
        modes.append(tuple(values[bit] for values, bit in zip(FACTORS.values(), bits, strict=True)))
    return modes


def test_any_two_values_meet_in_a_mode():
    for one, other in itertools.combinations(FACTORS.values(), 2):
        for pair in itertools.product(one, other):
            assert any(set(pair) <= set(mode) for mode in pairwise()), pair


@pytest.fixture(scope="module", params=pairwise(), ids=lambda mode: " ".join(mode))
def mode(request) -> tuple[str, ...]:
    return (*TASK, *DRAWING, *" ".join(request.param).split())


@pytest.fixture(scope="module")
def whole(mode, tmp_path_factory) -> Run:
    run = run_train(tmp_path_factory.mktemp("whole") / "run", *mode)
    assert run.code == 0
    assert len(list((run.folder / "checkpoints").glob("*.ckpt"))) == STEPS
    return run


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_stopped_at_every_step(whole: Run, mode, tmp_path, step: int):
    resumed = run_train(tmp_path / "run", *mode, f"resume={checkpoint(whole, step)}")
    assert_same_end(resumed, whole, after=step)
