"""Whole steps as a GPU takes them, on tensors without values: types, shapes, kernels and waits.

Nothing is computed: that the numbers are right is for other tests. Here a step has to go through
every branch that is not the CPU's, in each precision and with models of each kind.
"""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch

from tests.support.meta_steps import (
    ARCHITECTURES,
    KERNEL_LAYERS,
    LAYERS,
    PASSES,
    PRECISIONS,
    config_of,
    take_meta_steps,
)

F32, BF16 = torch.float32, torch.bfloat16
HALF = {"32-true": F32, "16-mixed": torch.float16}

# Of pairs and of lists, by token and by likelihood.
_EVERY_PART_OF_A_LOSS = {
    **{"terms": {"sigmoid": 1.0, "exo_pair": 0.1, "softmax": 0.5}, "rpo_alpha": 0.1},
    **{"wpo": True, "ld_alpha": 0.5},
}

RANKS = "bf16-mixed, ranks"
QUICK = [("llama", precision) for precision in PRECISIONS]
QUICK += [(name, RANKS) for name in ARCHITECTURES if name != "llama"]
ALL = list(itertools.product(ARCHITECTURES, PRECISIONS))


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """Takes the steps of a case; one that was taken is not taken again."""

    @functools.cache
    def take(architecture: str, precision: str):
        if config_of(architecture) is None:
            pytest.skip(f"the installed transformers has no {architecture}")
        folder = tmp_path_factory.mktemp("meta")
        return take_meta_steps(folder, architecture, PRECISIONS[precision])

    return take


def waits_once(step) -> None:
    """The one answer of a step: is it finite, and has any rank had a signal.

    Of padded rows transformers asks besides whether any place is unused.
    """
    own = [answer for answer in step.answers if "masking_utils.py" not in answer]
    assert len(own) == 1, own
    assert own[0].startswith("answer: a copy to the host")


@pytest.mark.parametrize(
    ("architecture", "precision"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.long]) for case in ALL],
)
def test_a_step_goes_through_the_kernel_in_half_precision_and_waits_once(
    taken, architecture, precision
):
    """Each layer that the kernel takes goes to it, in the type that is computed in, and only those.

    Weights have gradients of their own type, or float32 ones where float32 weights stand behind.
    """
    step = taken(architecture, precision)
    half = HALF.get(precision, BF16)
    layers = 0 if half == F32 else KERNEL_LAYERS[architecture]
    assert sum(step.kernel_calls.values()) == PASSES * layers
    assert {dtype for dtype, _ in step.kernel_calls} == ({half} if layers else set())
    assert bool(step.bucket_calls) is (layers < LAYERS)
    assert {*step.bucket_calls} <= {half}
    assert step.copies == []
    waits_once(step)
    of_weights = BF16 if precision == "bf16-true" else F32
    assert step.gradients == [of_weights] * len(list(step.module.policy.parameters()))


@pytest.mark.parametrize("architecture", ["gemma3", "mistral"])
def test_a_window_of_eight_tokens_reaches_the_kernel(taken, architecture):
    """Seven back and itself; Mistral has it in both layers, Gemma 3 in its local one."""
    calls = taken(architecture, RANKS).kernel_calls
    local, whole = calls[BF16, (7, 0)], calls[BF16, (-1, 0)]
    expected = {"gemma3": (PASSES, PASSES), "mistral": (2 * PASSES, 0)}
    assert (local, whole) == expected[architecture]


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        (RANKS, {"path": "padded"}),
        ("bf16-mixed", {"checkpointing": True}),
        ("bf16-mixed", {"loss": _EVERY_PART_OF_A_LOSS}),
    ],
    ids=["padded", "checkpointing", "losses"],
)
def test_nothing_of_a_step_is_copied_while_the_device_waits(tmp_path, precision, options):
    step = take_meta_steps(tmp_path, "llama", PRECISIONS[precision], **options)
    assert step.copies == []
    waits_once(step)
    if options.get("checkpointing"):
        # The policy's layers once more, on the way back.
        assert sum(step.kernel_calls.values()) == (PASSES + PASSES // 2) * LAYERS


@pytest.mark.parametrize(
    ("architecture", "precision", "said"),
    [
        ("llama", RANKS, "prompts shared, flash kernel"),
        (
            "llama",
            "32-true",
            "prompts shared, in batches of like length (float32 and not half precision)",
        ),
        (
            "gemma4",
            RANKS,
            "prompts shared, flash kernel in 1 of 2 layers, the others in batches of like length "
            "(heads of 512 entries, more than 256)",
        ),
        (
            "deepseek_v3",
            RANKS,
            "prompts shared, in batches of like length (heads of 24 entries with values of 16)",
        ),
    ],
)
def test_the_path_of_attention_is_said_with_its_reason(taken, architecture, precision, said):
    assert taken(architecture, precision).scorer.attention == said


def test_an_architecture_that_is_missing_is_no_fault(monkeypatch):
    monkeypatch.setattr("tests.support.meta_steps.transformers", SimpleNamespace())
    assert {config_of(name) for name in ARCHITECTURES} == {None}
