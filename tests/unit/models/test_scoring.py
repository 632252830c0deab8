"""Flat = padded = a plain loop, in float32, for every family that the project names."""

import copy

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.models import attention
from dpo_lightning.models.attention import GROUP_ATTENTION, group_attention
from dpo_lightning.models.probe import choose_path
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.objectives.comparison import Logps, compare_responses
from dpo_lightning.objectives.objective import ObjectiveSettings
from tests.support.batches import batch_of, gradients, make_groups, relative
from tests.support.models import FAMILIES, PADDED_ONLY, VOCABULARY, make_model


def plain_logps(model, groups: list[TokenGroup]) -> torch.Tensor:
    """One unpadded row per response through the model's own forward pass and log_softmax."""
    sums = []
    for group in groups:
        for response in group.responses:
            row = torch.tensor(np.concatenate([group.prompt, response])[None].astype(np.int64))
            logits = model(input_ids=row).logits[0].float()
            p = len(group.prompt)
            logps = logits.log_softmax(-1)[p - 1 : -1]
            sums.append(logps.gather(1, row[0, p:, None]).sum())
    return torch.stack(sums)


def plain_dpo_loss(policy, reference, groups: list[TokenGroup], beta: float) -> torch.Tensor:
    """sum_g w_g mean_{ranked pairs of g} -log sigmoid(beta (margin)) / sum_g w_g, written out."""
    with torch.no_grad():
        fixed = plain_logps(reference, groups)
    ratios = (plain_logps(policy, groups) - fixed).split([len(g.responses) for g in groups])
    total = torch.zeros(())
    for group, ratio in zip(groups, ratios, strict=True):
        losses = [
            torch.log1p(torch.exp(-beta * (ratio[i] - ratio[j])))
            for i in range(len(ratio))
            for j in range(len(ratio))
            if group.ranks[i] < group.ranks[j]
        ]
        total = total + group.weight * sum(losses) / len(losses)
    return total / sum(group.weight for group in groups)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["flat", "padded"])
def test_logps_and_gradients_equal_a_plain_loop(family: str, path: str):
    groups = make_groups()
    plain = make_model(family)
    expected = plain_logps(plain, groups)
    weights = torch.linspace(-1.0, 1.0, len(expected))
    (expected * weights).sum().backward()

    for checkpointing in (False, True):
        model = make_model(family)
        scorer = Scorer(path)
        scorer.prepare(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        actual = scorer.logps(model, batch_of(groups))
        (actual * weights).sum().backward()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
        assert relative(gradients(model), gradients(plain)) <= 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, *PADDED_ONLY])
def test_the_path_is_chosen_by_trying(family: str):
    model = make_model(family)
    scorer, reason = choose_path(model, max_length=64)
    if family in FAMILIES:
        assert (scorer.path, reason) == ("flat", None)
    else:
        assert scorer.path == "padded"
        assert reason
    groups = make_groups()
    expected = plain_logps(make_model(family), groups)
    torch.testing.assert_close(
        scorer.logps(model, batch_of(groups)), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-window"])
@pytest.mark.parametrize("path", ["flat", "padded"])
def test_the_loss_of_different_models_equals_the_formula(family: str, path: str):
    """Policy = reference proves nothing about a mask: both would be wrong in the same way."""
    groups, beta = make_groups(), 0.3
    policy, reference = make_model(family, seed=1), make_model(family, seed=2)
    expected = plain_dpo_loss(policy, reference, groups, beta)
    assert abs(expected.item() - 0.6931) > 0.05
    expected.backward()
    expected_gradients = gradients(policy)

    policy.zero_grad()
    scorer = Scorer(path)
    scorer.prepare(policy)
    scorer.prepare(reference)
    batch = batch_of(groups)
    with torch.no_grad():
        reference_logps = scorer.logps(reference, batch)
    comparison = compare_responses(
        ObjectiveSettings(terms={"sigmoid": 1.0}),
        batch,
        Logps(policy=scorer.logps(policy, batch), reference=reference_logps),
        beta=beta,
    )
    loss = comparison.loss / batch.weight.sum()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert relative(gradients(policy), expected_gradients) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3-text", "opt"])
def test_no_response_sees_a_sibling_or_another_group(family: str):
    groups = make_groups()
    changed = copy.deepcopy(groups)
    changed[2].responses[0][:] = (changed[2].responses[0] + 11) % VOCABULARY
    model = make_model(family)
    scorer = Scorer("flat")
    scorer.prepare(model)
    before, after = (scorer.logps(model, batch_of(g)).detach() for g in (groups, changed))
    touched = 5  # the first response of the third group, after 2 + 3 others
    same = torch.arange(len(before)) != touched
    torch.testing.assert_close(before[same], after[same], rtol=0, atol=0)
    assert abs(before[touched] - after[touched]) > 1e-3

    # The gradient of the first two groups' log-probabilities does not see the change either.
    grads = []
    for case in (groups, changed):
        model.zero_grad()
        scorer.logps(model, batch_of(case))[:touched].sum().backward()
        grads.append(gradients(model))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-7)


def test_checkpointing_recomputes_attention_only_in_train_mode(monkeypatch):
    """transformers loads in eval mode, in which gradient checkpointing is silently off."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return group_attention(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, GROUP_ATTENTION, counted)
    layers = 2
    for training, checkpointing, expected in [
        (True, False, layers),
        (True, True, 2 * layers),
        (False, True, layers),
    ]:
        model = make_model("llama")
        scorer = Scorer("flat")
        scorer.prepare(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train(training)
        calls.clear()
        scorer.logps(model, batch_of(make_groups())).sum().backward()
        assert len(calls) == expected


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3-text", "gpt2"])
def test_small_and_large_attention_are_the_same(family, monkeypatch):
    """Plain products and torch's kernel, each on all calls of a model."""
    results = []
    for limit in (1 << 60, 0):
        monkeypatch.setattr(attention, "_MOST_SCORES", limit)
        model = make_model(family)
        scorer = Scorer("flat")
        scorer.prepare(model)
        logps = scorer.logps(model, batch_of(make_groups()))
        logps.sum().backward()
        results.append((logps.detach(), gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert relative(results[1][1], results[0][1]) <= 1e-5


def test_a_plain_forward_is_possible_inside_a_context():
    model = make_model("llama")
    expected = make_model("llama").eval()(input_ids=torch.tensor([[5, 6, 7]])).logits
    scorer = Scorer("flat")
    scorer.prepare(model)
    with pytest.raises(NotImplementedError, match="plan"):
        model(input_ids=torch.tensor([[5, 6, 7]]))
    with scorer.plain(model) as plain:
        torch.testing.assert_close(plain(input_ids=torch.tensor([[5, 6, 7]])).logits, expected)
        assert not plain.training
    assert model.training
    assert model.config._attn_implementation == GROUP_ATTENTION
    model.eval()
    with scorer.plain(model):
        pass
    assert not model.training
