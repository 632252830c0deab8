"""Flat = padded = a plain loop, in float32, for every family that the project names."""

import copy

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM

from dpo_lightning.data.packing import GroupBatch, collate_groups
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.models import attention
from dpo_lightning.models.attention import GROUP_ATTENTION, group_attention
from dpo_lightning.models.probe import choose_path
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.objectives.comparison import compare_responses
from dpo_lightning.objectives.registry import ObjectiveSettings

VOCABULARY = 97

# Two key heads for four query heads wherever the family has them; windows shorter than the texts.
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
FAMILIES = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", _LLAMA_LIKE | {"head_dim": 8}),
    "mistral": ("MistralConfig", _LLAMA_LIKE | {"sliding_window": None}),
    "mistral-window": ("MistralConfig", _LLAMA_LIKE | {"sliding_window": 5}),
    "gemma3-text": ("Gemma3TextConfig", _LLAMA_LIKE | {"head_dim": 8, "sliding_window": 5}),
    "gemma3-capped": (
        "Gemma3TextConfig",
        _LLAMA_LIKE | {"head_dim": 8, "final_logit_softcapping": 0.5},
    ),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt-neox": (
        "GPTNeoXConfig",
        _SMALL | {"num_attention_heads": 4, "intermediate_size": 64},
    ),
    "opt": (
        "OPTConfig",
        _SMALL
        | {"num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 16, "pad_token_id": 1},
    ),
    "phi3": ("Phi3Config", _LLAMA_LIKE),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE),
    "cohere": ("CohereConfig", _LLAMA_LIKE | {"logit_scale": 0.3}),
    "granite": ("GraniteConfig", _LLAMA_LIKE | {"logits_scaling": 3.0}),
}
PADDED_ONLY = {
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "falcon": ("FalconConfig", _SMALL | {"num_attention_heads": 4}),
    "gpt-oss": (
        "GptOssConfig",
        _LLAMA_LIKE | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "gemma2": ("Gemma2Config", _LLAMA_LIKE | {"head_dim": 8}),
    "mamba": ("MambaConfig", _SMALL),
}


def make_model(family: str, seed: int = 0):
    """A tiny random model with weights large enough that every mask matters."""
    from dpo_lightning.models.loading import without_dropout

    name, values = (FAMILIES | PADDED_ONLY)[family]
    torch.manual_seed(seed)
    config = without_dropout(getattr(transformers, name)(**values))
    model = AutoModelForCausalLM.from_config(config).float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model


def make_groups() -> list[TokenGroup]:
    """K = 2, 3 and 5, prompts from one token on, ties, unequal lengths and weights."""
    draw = np.random.default_rng(7)

    def ids(n: int) -> np.ndarray:
        return draw.integers(3, VOCABULARY, n).astype(np.int32)

    return [
        TokenGroup(ids(7), (ids(5), ids(9)), (1, 2), 1.0, "a", "a"),
        TokenGroup(ids(1), (ids(1), ids(4), ids(6)), (1, 2, 2), 0.5, "b", "b"),
        TokenGroup(
            ids(12), (ids(6), ids(2), ids(3), ids(3), ids(8)), (1, 1, 2, 3, 4), 2.0, "c", "c"
        ),
    ]


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


def gradients(model) -> torch.Tensor:
    grads = [
        (p.grad if p.grad is not None else torch.zeros_like(p)).flatten()
        for p in model.parameters()
    ]
    return torch.cat(grads)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def batch_of(groups: list[TokenGroup]) -> GroupBatch:
    return collate_groups(groups, range(len(groups)))


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
        policy_logps=scorer.logps(policy, batch),
        reference_logps=reference_logps,
        lengths=batch.lengths,
        group=batch.group,
        rank=batch.rank,
        weight=batch.weight,
        chosen=batch.chosen,
        rejected=batch.rejected,
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
