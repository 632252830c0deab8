"""Long sequences on a CPU: exact, in parts put together, and never with a mask of all by all."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dpo_lightning.data.gathers import spans_of
from dpo_lightning.models import attention, long_attention
from dpo_lightning.models.attention import AttentionPlan, group_attention
from dpo_lightning.models.scoring import Scorer
from tests.support.batches import batch_of, gradients, make_groups, relative
from tests.support.groups import group
from tests.support.models import make_model
from tests.support.runs import ROOT

GIB = 1 << 30
GROUPS = (group(37, 3, 29, 1), group(5, 41, 2), group(2, 1))


@pytest.fixture
def long(monkeypatch):
    """Every sequence counts as long, and a block has nine queries."""
    monkeypatch.setattr(attention, "_MOST_SCORES", 0)
    monkeypatch.setattr(long_attention, "_BLOCK", 9)


def plain(query, key, value, window: int | None):
    """Attention of each response over its own row ``[P | y]``, written out; (1, T, heads, e)."""
    outputs, start = [], 0
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    for g in GROUPS:
        prompt = list(range(start, start + len(g.prompt)))
        start += len(prompt)
        rows = [(prompt, 0)]
        for response in g.responses:
            rows.append((prompt + list(range(start, start + len(response))), len(prompt)))
            start += len(response)
        for places, before in rows:
            q, k, v = (x[0, :, places] for x in (query, key, value))
            scores = q @ k.transpose(-1, -2) * query.shape[-1] ** -0.5
            at = torch.arange(len(places))
            distance = at[:, None] - at
            seen = (distance >= 0) & (distance < (window or len(places)))
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            outputs.append((weights @ v)[:, before:].transpose(0, 1))
    return torch.cat(outputs)[None]


@pytest.mark.parametrize("window", [None, 2, 3, 20, 1000])
@pytest.mark.parametrize(("heads", "key_heads", "size", "width"), [(4, 2, 8, 8), (3, 1, 12, 8)])
def test_values_and_gradients_are_those_of_plain_attention(
    long, window, heads, key_heads, size, width
):
    """In float32, to 2e-6, of what is written out in float64; also with values of another size."""
    draw = torch.Generator().manual_seed(0)
    plan = AttentionPlan(batch_of([*GROUPS]))
    count = len(plan.batch.input_ids)
    shapes = [(1, n, count, d) for n, d in ((heads, size), (key_heads, size), (key_heads, width))]
    inputs = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    weights = torch.randn(1, count, heads, width, generator=draw, dtype=torch.float64)
    exact = [x.clone().requires_grad_() for x in inputs]
    expected = plain(*exact, window)
    own = [x.float().requires_grad_() for x in inputs]
    found, _ = group_attention(
        torch.nn.Identity(), *own, None, sliding_window=window, group_plan=plan
    )
    wanted = [expected, *torch.autograd.grad((expected * weights).sum(), exact)]
    got = [found, *torch.autograd.grad((found * weights.float()).sum(), own)]
    for one, other in zip(got, wanted, strict=True):
        assert relative(one.double(), other) <= 2e-6


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3-text", "gpt2"])
def test_a_model_scores_the_same_on_both_ways(long, monkeypatch, family: str):
    groups = make_groups()
    found = []
    for most, checkpointing in ((1 << 24, False), (0, False), (0, True)):
        monkeypatch.setattr(attention, "_MOST_SCORES", most)
        model = make_model(family)
        scorer = Scorer("flat")
        scorer.prepare(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        logps = scorer.logps(model, batch_of(groups))
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        found.append((logps.detach(), gradients(model)))
    for logps, gradient in found[1:]:
        torch.testing.assert_close(logps, found[0][0], rtol=1e-5, atol=0)
        assert relative(gradient, found[0][1]) <= 1e-5


def test_no_mask_is_made_but_that_of_a_block(long, monkeypatch):
    """A block of 9 queries under a window of 20 meets its own 9 keys and 19 before them."""
    monkeypatch.setattr(AttentionPlan, "mask", None)
    plan = AttentionPlan(batch_of([*GROUPS]))
    query = torch.randn(1, 2, len(plan.batch.input_ids), 8, requires_grad=True)
    for window in (None, 20):
        output, _ = group_attention(
            torch.nn.Identity(), query, query, query, None, sliding_window=window, group_plan=plan
        )
        output.sum().backward()
    shapes = [tuple(bias.shape) for bias in plan.block_biases.values()]
    assert max(queries for queries, _ in shapes) == 9
    assert max(keys for _, keys in shapes) == 9 + 19


def test_it_begins_where_plain_products_would_hold_too_many_scores():
    """2,048 queries by 2,048 keys are 2^22 scores a head: four heads come to the limit of 2^24."""
    plan = AttentionPlan(batch_of([group(2048, 1, 1)]))
    assert not plan.is_long(torch.empty(2050, 4, 8))
    assert plan.is_long(torch.empty(2050, 5, 8))
    # A GPU has its own ways.
    assert not plan.is_long(torch.empty(2050, 5, 8, device="meta"))


def test_the_spans_of_a_row():
    """Two groups: a prompt of 3 with responses of 1 and 2, and one of 2 with one of 4."""
    found = [(s.start, s.length, s.prompt, s.before) for s in spans_of([(3, 1, 2), (2, 4)])]
    assert found == [(0, 3, 0, 0), (3, 1, 0, 3), (4, 2, 0, 3), (6, 2, 6, 0), (8, 4, 6, 2)]


def test_autocast_decides_the_type(long):
    plan = AttentionPlan(batch_of([*GROUPS]))
    query = torch.randn(1, 2, len(plan.batch.input_ids), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = group_attention(
            torch.nn.Identity(), query, query, query.bfloat16(), None, group_plan=plan
        )
    assert output.dtype == torch.bfloat16


@pytest.mark.long
@pytest.mark.parametrize("window", [None, pytest.param(4096, marks=pytest.mark.long)])
def test_a_prompt_of_32k_tokens_takes_less_than_2_gib(window: int | None):
    """With four responses, forward and backward, above the model, in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "long_prompts.py"), "--prompt", "32768"]
    command += [] if window is None else ["--window", str(window)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1])["peak_bytes"] < 2 * GIB
