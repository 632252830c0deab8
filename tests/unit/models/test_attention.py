"""The kernel for any lengths: its calls, the trust in it, and the comparison behind that.

It runs on GPUs alone, so a plain one with the documented behaviour stands in for it here.
"""

import logging

import pytest
import torch
from torch.nn import functional as F

from dpo_lightning.data.packing import Sequences, collate_groups
from dpo_lightning.models import kernel as kernel_module
from dpo_lightning.models import scoring
from dpo_lightning.models.attention import AttentionPlan, group_attention
from dpo_lightning.models.devices import settle_attention
from dpo_lightning.models.kernel import HeadShape, Kernel
from dpo_lightning.models.kernel_check import _probe_group, varlen_fault
from dpo_lightning.models.probe import choose_path
from dpo_lightning.models.scoring import Scorer
from tests.support.autocast import cuda_autocast
from tests.support.flash import plain_varlen, strict_varlen_attn
from tests.support.groups import group
from tests.support.models import make_model

CPU, META = torch.device("cpu"), torch.device("meta")
F32, BF16 = torch.float32, torch.bfloat16


def top_left(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """A kernel that counts from the first key: a response would not see its prompt."""
    outputs = []
    for i in range(len(cu_q) - 1):
        q = query[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
        k, v = (x[cu_k[i] : cu_k[i + 1]].transpose(0, 1) for x in (key, value))
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa
            ).transpose(0, 1)
        )
    return torch.cat(outputs)


def batch():
    return collate_groups([group(5, 3, 4), group(2, 1), group(1, 6, 2, 2)], [0, 1, 2])


def test_the_sequences_of_a_micro_batch():
    """A prompt's keys are its own, a response's the prompt's and its own."""
    groups = [group(2, 1, 2), group(1, 1)]
    found = collate_groups(groups, [0, 1], gathers="sequences").sequences
    assert isinstance(found, Sequences)
    assert found.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 5, 6]
    assert found.query_ends.tolist() == [0, 2, 3, 5, 6, 7]
    assert found.key_ends.tolist() == [0, 2, 5, 9, 10, 12]
    assert (found.most_queries, found.most_keys) == (2, 4)
    assert found.query_ends.dtype == torch.int32


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_both_ways_give_the_same_values_and_gradients(monkeypatch, window, key_heads):
    monkeypatch.setattr(kernel_module.varlen, "varlen_attn", plain_varlen)
    monkeypatch.setattr(kernel_module, "_HALF", (torch.float32,))
    draw = torch.Generator().manual_seed(0)
    micro = batch()
    shapes = [(1, heads, len(micro.input_ids), 8) for heads in (4, key_heads, key_heads)]
    inputs = [torch.randn(shape, generator=draw) for shape in shapes]
    results = []
    kernel = Kernel({HeadShape(4, key_heads, 8, 8): None})
    for plan in (AttentionPlan(micro, kernel=kernel), AttentionPlan(micro)):
        own = [tensor.clone().requires_grad_() for tensor in inputs]
        output, _ = group_attention(
            torch.nn.Identity(), *own, None, sliding_window=window, group_plan=plan
        )
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        results.append([output, *torch.autograd.grad((output * weights).sum(), own)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_float32_never_takes_it(monkeypatch):
    monkeypatch.setattr(kernel_module.varlen, "varlen_attn", None)
    micro = batch()
    query = torch.randn(1, 2, len(micro.input_ids), 8)
    plan = AttentionPlan(micro, kernel=Kernel({HeadShape(2, 2, 8, 8): None}))
    group_attention(torch.nn.Identity(), query, query, query, None, group_plan=plan)


def without_windows(*inputs, window_size, **options):
    """A kernel that sees everything behind a query, whatever the window."""
    return plain_varlen(*inputs, window_size=(-1, window_size[1]), **options)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (strict_varlen_attn, None),
        (without_windows, "it differs from plain attention"),
        (top_left, "it differs from plain attention"),
        (lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel")), "no kernel"),
        (lambda q, k, v, *_, **__: (q + 0 * (k.sum() + v.sum())) * float("nan"), "differs"),
        (None, "trying it failed"),
    ],
)
def test_a_kernel_is_trusted_only_after_it_was_right(monkeypatch, kernel, said):
    monkeypatch.setattr(kernel_module.varlen, "varlen_attn", kernel)
    fault = varlen_fault(CPU, BF16, HeadShape(4, 2, 16, 16))
    assert fault is None if said is None else said in str(fault)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"sinks": torch.zeros(2)}, "sinks"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_a_layer_asks_for_and_is_not_here_is_refused(asked, said):
    """A number without it would be another model's."""
    micro = batch()
    query = torch.randn(1, 2, len(micro.input_ids), 8)
    call = {"group_plan": AttentionPlan(micro)}
    with pytest.raises(NotImplementedError, match=f"^attention with {said}$"):
        group_attention(torch.nn.Identity(), query, query, query, None, **call, **asked)
    # Not asked for in so many words is not asked for.
    nothing = dict.fromkeys(asked, 0.0 if "dropout" in asked else None)
    group_attention(torch.nn.Identity(), query, query, query, None, **call, **nothing)


def test_scores_are_scaled_as_the_layer_says():
    """Two tokens with scores s and 2 s of a query and values 0 and 1: sigmoid(s) for s = 4 scale.

    Without a scale of its own a layer has 1 / sqrt(4).
    """
    micro = collate_groups([_probe_group(2, 1)], [0])
    query = torch.full((1, 1, 3, 4), 1.0)
    key = torch.tensor([1.0, 2.0, -100.0])[None, None, :, None].expand(1, 1, 3, 4)
    value = torch.tensor([0.0, 1.0, 0.0])[None, None, :, None].expand(1, 1, 3, 4)
    for scaling, scale in ((0.25, 0.25), (None, 0.5)):
        output, _ = group_attention(
            torch.nn.Identity(), query, key, value, None, scaling=scaling,
            group_plan=AttentionPlan(micro),
        )  # fmt: skip
        expected = torch.tensor(4 * scale).sigmoid().item()
        assert output[0, 1, 0].tolist() == pytest.approx([expected] * 4)


# Which calls it takes ---------------------------------------------------------------------------

GOOD = HeadShape(4, 2, 16, 16)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (GOOD, None),
        (HeadShape(1, 1, 256, 256), None),
        (HeadShape(8, 1, 8, 8), None),
        (HeadShape(4, 2, 264, 264), "heads of 264 entries, more than 256"),
        (HeadShape(4, 2, 512, 512), "heads of 512 entries, more than 256"),
        (HeadShape(4, 2, 20, 20), "heads of 20 entries, no multiple of 8"),
        (HeadShape(4, 4, 192, 128), "heads of 192 entries with values of 128"),
        (HeadShape(4, 3, 16, 16), "4 query heads, no multiple of 3 key heads"),
    ],
)
def test_heads_that_the_kernel_takes(shape, said):
    assert shape.fault() == said
    assert Kernel({shape: None}).fault(shape, BF16) == said


def test_a_call_goes_by_its_own_heads_and_types_and_says_once_what_it_lacks(caplog):
    kernel = Kernel({GOOD: None, HeadShape(2, 2, 32, 32): "it differs"})

    def takes(heads, size, *dtypes):
        tensors = [torch.zeros(1, heads, 3, size, dtype=dtype) for dtype in dtypes]
        return kernel.takes(tensors[0], tensors[1][:, :2], tensors[2][:, :2])

    with caplog.at_level(logging.WARNING):
        assert takes(4, 16, BF16, BF16, BF16)
        assert takes(4, 16, torch.float16, torch.float16, torch.float16)
        assert not takes(2, 32, BF16, BF16, BF16)  # which the header of the run has said
        assert caplog.messages == []
        for _ in range(2):
            assert not takes(4, 16, F32, BF16, BF16)
            assert not takes(4, 16, BF16, BF16, F32)
            assert not takes(4, 24, BF16, BF16, BF16)
    said = "attention: a layer goes without the flash kernel and is slower: "
    assert caplog.messages == [
        f"{said}float32 and not half precision", f"{said}heads that were not tried"
    ]  # fmt: skip


@pytest.mark.parametrize("on", ["meta", "cpu"])
def test_float32_meets_autocast_on_cuda_alone(monkeypatch, on):
    """Rotary embeddings leave float32 queries and keys beside values in half precision."""
    types = []

    def kernel(query, key, value, *args, **options):
        types.append((query.dtype, key.dtype, value.dtype))
        return strict_varlen_attn(query, key, value, *args, **options)

    monkeypatch.setattr(kernel_module.varlen, "varlen_attn", kernel)
    micro = batch().to(on)
    tokens = len(micro.input_ids)
    query, key = (torch.ones(1, n, tokens, 16, device=on) for n in (4, 2))
    plan = AttentionPlan(micro, kernel=Kernel({GOOD: None}))
    call = (torch.nn.Identity(), query, key, key.to(BF16), None)
    if on == "cpu":  # as it always was: products there choose their type by themselves
        with torch.autocast("cpu", dtype=BF16):
            group_attention(*call, group_plan=plan)
        assert types == []
        return
    with cuda_autocast(BF16):
        output, _ = group_attention(*call, group_plan=plan)
    assert types == [(BF16, BF16, BF16)]
    assert output.dtype == BF16


def test_layers_are_seen_as_they_are_and_not_as_a_config_says():
    """Heads and how many layers have them; those of the reference beside those of the policy."""
    scorer, reason = choose_path(make_model("gemma3-text"), max_length=16)
    assert reason is None
    assert scorer.heads == {HeadShape(4, 2, 8, 8): 2}


def choose(monkeypatch, heads, dtype=BF16, device=META, faults=()):
    """A scorer that has tried its kernel with heads, and what it was asked."""
    asked = []

    def fault(device, dtype, shape):
        asked.append((device.type, dtype, shape))
        return dict(faults).get(shape)

    monkeypatch.setattr(scoring, "varlen_fault", fault)
    scorer = Scorer("flat", heads=heads)
    return scorer, scorer.choose_kernel(device, dtype), asked


LARGE, OTHER = HeadShape(4, 2, 512, 512), HeadShape(8, 8, 64, 64)


@pytest.mark.parametrize(
    ("heads", "faults", "said", "name", "words"),
    [
        ({GOOD: 2}, {}, None, "any lengths", "flash kernel"),
        ({GOOD: 2, OTHER: 1}, {}, None, "any lengths", "flash kernel"),
        (
            {GOOD: 3, LARGE: 1}, {}, "heads of 512 entries, more than 256",
            "any lengths in 3 of 4",
            "flash kernel in 3 of 4 layers, the others in batches of like length (heads of 512 "
            "entries, more than 256)",
        ),
        (
            {GOOD: 3, OTHER: 2}, {GOOD: "why"}, "why", "any lengths in 2 of 5",
            "flash kernel in 2 of 5 layers, the others in batches of like length (why)",
        ),
        ({GOOD: 1, OTHER: 2}, {GOOD: "a", OTHER: "b"}, "a; b", None,
         "in batches of like length (a; b)"),
        ({LARGE: 2}, {}, "heads of 512 entries, more than 256", None,
         "in batches of like length (heads of 512 entries, more than 256)"),
    ],
)  # fmt: skip
def test_a_gpu_tries_the_heads_of_each_layer(monkeypatch, heads, faults, said, name, words):
    scorer, fault, asked = choose(monkeypatch, heads, faults=faults)
    assert fault == said
    assert scorer.attention == f"prompts shared, {words}"
    named = ["flat", *([name] if name else []), "float32 scores"]
    assert scorer.kernel == ", ".join(named)
    assert asked == [("meta", BF16, shape) for shape in heads if shape != LARGE]


def test_float32_is_not_tried_and_a_cpu_never(monkeypatch):
    scorer, fault, asked = choose(monkeypatch, {GOOD: 2}, dtype=F32)
    assert fault == "float32 and not half precision"
    assert scorer.attention == f"prompts shared, in batches of like length ({fault})"
    assert scorer.kernel == "flat"
    scorer, fault, others = choose(monkeypatch, {GOOD: 2}, device=CPU)
    assert (fault, scorer.kernel, scorer.attention) == (
        None,
        "flat",
        "prompts shared, in batches of like length",
    )
    assert asked == others == []
    padded = Scorer("padded")
    assert padded.choose_kernel(META, BF16) is None
    assert padded.attention == "the model's own, over padded rows"
    assert padded.kernel == "padded"


def test_a_kernel_that_plans_each_shape_is_off_on_cuda(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", chosen.append)
    settle_attention(CPU)
    assert chosen == []
    settle_attention(torch.device("cuda"))
    assert chosen == [False]
