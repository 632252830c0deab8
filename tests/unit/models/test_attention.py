"""The kernel for any lengths: its calls, the trust in it, and the comparison behind that.

It runs on GPUs alone, so a plain one with the documented behaviour stands in for it here.
"""

import pytest
import torch
from torch.nn import functional as F

from dpo_lightning.data.packing import collate_groups
from dpo_lightning.models import attention
from dpo_lightning.models.attention import AttentionPlan, Sequences, group_attention, varlen_fault
from dpo_lightning.models.scoring import Scorer
from tests.support.groups import group
from tests.support.models import tiny_llama_config

CPU = torch.device("cpu")


def plain_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
):
    """Plain attention, sequence by sequence; causal from the last key backwards, as documented."""
    left, right = window_size
    assert right == 0
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]].transpose(0, 1)
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]].transpose(0, 1) for x in (key, value))
        assert q.shape[1] <= max_q
        assert k.shape[1] <= max_k
        # The last query stands at the last key.
        places = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        distance = places - torch.arange(k.shape[1])
        mask = (distance >= 0) & ((distance <= left) | (left < 0))
        outputs.append(
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=enable_gqa
            )[0].transpose(0, 1)
        )
    assert sum(len(output) for output in outputs) == len(query)
    return torch.cat(outputs)


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
    found = Sequences.of(collate_groups([group(2, 1, 2), group(1, 1)], [0, 1]))
    assert found.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 5, 6]
    assert found.query_ends.tolist() == [0, 2, 3, 5, 6, 7]
    assert found.key_ends.tolist() == [0, 2, 5, 9, 10, 12]
    assert (found.most_queries, found.most_keys) == (2, 4)
    assert found.query_ends.dtype == torch.int32


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_both_ways_give_the_same_values_and_gradients(monkeypatch, window, key_heads):
    monkeypatch.setattr(attention.varlen, "varlen_attn", plain_varlen)
    monkeypatch.setattr(attention, "_HALF", (torch.float32,))
    draw = torch.Generator().manual_seed(0)
    micro = batch()
    shapes = [(1, heads, len(micro.input_ids), 8) for heads in (4, key_heads, key_heads)]
    inputs = [torch.randn(shape, generator=draw) for shape in shapes]
    results = []
    for plan in (AttentionPlan(micro, varlen=True), AttentionPlan(micro)):
        own = [tensor.clone().requires_grad_() for tensor in inputs]
        output, _ = group_attention(
            torch.nn.Identity(), *own, None, sliding_window=window, group_plan=plan
        )
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        results.append([output, *torch.autograd.grad((output * weights).sum(), own)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_float32_never_takes_it(monkeypatch):
    monkeypatch.setattr(attention.varlen, "varlen_attn", None)
    micro = batch()
    query = torch.randn(1, 2, len(micro.input_ids), 8)
    group_attention(
        torch.nn.Identity(), query, query, query, None, group_plan=AttentionPlan(micro, varlen=True)
    )


def without_windows(*inputs, window_size, **options):
    """A kernel that sees everything behind a query, whatever the window."""
    return plain_varlen(*inputs, window_size=(-1, window_size[1]), **options)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (plain_varlen, None),
        (without_windows, "it differs from plain attention"),
        (top_left, "it differs from plain attention"),
        (lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel")), "no kernel"),
        (lambda q, k, v, *_, **__: (q + 0 * (k.sum() + v.sum())) * float("nan"), "differs"),
        (None, "trying it failed"),
    ],
)
def test_a_kernel_is_trusted_only_after_it_was_right(monkeypatch, kernel, said):
    monkeypatch.setattr(attention.varlen, "varlen_attn", kernel)
    fault = varlen_fault(CPU, torch.bfloat16, heads=4, key_heads=2, size=16)
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
    micro = collate_groups([attention._probe_group(2, 1)], [0])
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


def test_there_is_none_on_a_cpu():
    scorer = Scorer("flat")
    assert scorer.choose_kernel(tiny_llama_config(), CPU) is None
    assert not scorer.varlen
    assert scorer.kernel == "flat"


def test_a_gpu_that_passes_uses_it_and_one_that_does_not_says_why(monkeypatch):
    from dpo_lightning.models import scoring

    asked = []

    def fault(device, dtype, **shape):
        asked.append(shape)
        return None if len(asked) == 1 else "why"

    monkeypatch.setattr(scoring, "varlen_fault", fault)
    scorer = Scorer("flat")
    assert scorer.choose_kernel(tiny_llama_config(), torch.device("cuda")) is None
    assert scorer.varlen
    assert scorer.kernel == "flat, any lengths"
    assert asked == [{"heads": 2, "key_heads": 1, "size": 8}]
    assert scorer.choose_kernel(tiny_llama_config(), torch.device("cuda")) == "why"
    assert not scorer.varlen
    assert Scorer("padded").choose_kernel(tiny_llama_config(), torch.device("cuda")) is None
