"""Rotary factors that depend on the length of a sequence: the same beside others as alone."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from dpo_lightning.data.packing import collate_groups
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.models.probe import choose_path
from dpo_lightning.models.rope import RopeLengths
from dpo_lightning.models.scoring import Scorer
from tests.support.batches import batch_of, gradients, relative
from tests.support.models import _LLAMA_LIKE, VOCABULARY

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 4.0, 7.0, 11.0],
    "original_max_position_embeddings": 12,
    "factor": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}

MODELS = {
    "phi3-longrope": ("Phi3Config", {"rope_parameters": LONG, "max_position_embeddings": 48}),
    "llama-longrope": ("LlamaConfig", {"rope_parameters": LONG, "max_position_embeddings": 48}),
    "llama-dynamic": ("LlamaConfig", {"rope_parameters": DYNAMIC, "max_position_embeddings": 12}),
}


def make(kind: str, seed: int = 0):
    name, values = MODELS[kind]
    original = {"original_max_position_embeddings": 12} if name == "Phi3Config" else {}
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**_LLAMA_LIKE, **values, **original)
    model = AutoModelForCausalLM.from_config(config).float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model


def group(prompt: int, *responses: int, seed: int = 0) -> TokenGroup:
    draw = np.random.default_rng([prompt, *responses, seed])

    def ids(n: int):
        return draw.integers(3, VOCABULARY, n).astype(np.int32)

    return TokenGroup(
        ids(prompt), tuple(map(ids, responses)), tuple(range(1, len(responses) + 1)), 1.0, "", ""
    )


# Short rows, long rows, and a group of both; 12 is the last length of the first factors.
GROUPS = [group(4, 3, 5), group(9, 8, 11), group(6, 2, 9, 6, 7), group(5, 7), group(20, 3, 4)]


def plain_logps(kind: str, groups, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """One row at a time through a model of its own, and the gradient of their weighted sum."""
    model, sums = make(kind, seed), []
    for one in groups:
        for response in one.responses:
            row = torch.tensor(np.concatenate([one.prompt, response])[None].astype(np.int64))
            # Nothing is left behind by the row before.
            fresh = make(kind, seed).model.rotary_emb
            model.model.rotary_emb = fresh
            p = len(one.prompt)
            logps = model(input_ids=row).logits[0].log_softmax(-1)[p - 1 : -1]
            sums.append(logps.gather(1, row[0, p:, None]).sum())
    values = torch.stack(sums)
    (values * torch.linspace(-1, 1, len(values))).sum().backward()
    return values.detach(), gradients(model)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("path", ["flat", "padded"])
def test_a_row_has_the_numbers_and_gradients_that_it_has_alone(kind, path):
    expected, gradient = plain_logps(kind, GROUPS)
    model = make(kind)
    scorer = Scorer(path, RopeLengths.of(model.config, max_length=48))
    scorer.prepare(model)
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        actual = scorer.logps(model, batch_of(GROUPS))
        (actual * torch.linspace(-1, 1, len(actual))).sum().backward()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert relative(gradients(model), gradient) <= 1e-5
    # The values depend on the factors: with those of the longest row they are others.
    blind = Scorer(path)
    blind.prepare(model)
    assert (blind.logps(model, batch_of(GROUPS)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", MODELS)
def test_values_per_token_come_in_the_order_of_the_data(kind):
    model = make(kind).eval()
    scorer, reason = choose_path(model, max_length=48)
    assert (scorer.path, reason) == ("flat", None)
    batch = batch_of(GROUPS)
    plan = scorer.plan(batch)
    tokens = scorer.token_logps(model, batch, plan)
    padded = Scorer("padded", scorer.lengths)
    scorer.release(model)
    torch.testing.assert_close(tokens, padded.token_logps(model, batch, None), atol=1e-5, rtol=1e-5)
    both = padded.token_scores(model, batch, None)
    scorer.prepare(model)
    again = scorer.token_scores(model, batch, plan)
    torch.testing.assert_close(again.logps, tokens)
    torch.testing.assert_close(again.collisions, both.collisions, atol=1e-5, rtol=1e-5)


def test_a_long_row_leaves_nothing_behind():
    """A dynamic module keeps the factors of the longest sequence that it has seen."""
    model = make("llama-dynamic").eval()
    scorer, _ = choose_path(model, max_length=48)
    # Within the first factors, and behind them.
    for shorter in (batch_of([group(5, 7)]), batch_of([group(9, 5)])):
        model = make("llama-dynamic").eval()
        scorer.prepare(model)
        before = scorer.logps(model, shorter)
        scorer.logps(model, batch_of([group(20, 8)]))
        torch.testing.assert_close(scorer.logps(model, shorter), before, rtol=0, atol=0)


def test_lengths_that_never_come_change_nothing():
    for kind in MODELS:
        lengths = RopeLengths.of(make(kind).config, max_length=12)
        assert not lengths
        assert lengths == RopeLengths()


def test_a_group_of_one_kind_stays_as_it_is_and_a_mixed_one_is_split():
    lengths = RopeLengths(steps=(12,))
    same = collate_groups([group(4, 3, 5), group(9, 8, 11)], [0, 1])
    assert lengths.lay_out(same) == (same, None)
    mixed = collate_groups([group(6, 2, 9, 6, 7)], [0])
    laid, order = lengths.lay_out(mixed)
    assert laid.segments == ((6, 2, 6), (6, 9, 7))
    assert laid.targets[order].tolist() == mixed.targets.tolist()
    assert [lengths.factors(n) for n in (12, 13)] == [(0,), (1,)]
    assert [RopeLengths(slopes=(12,)).factors(n) for n in (3, 12, 13)] == [(12,), (12,), (13,)]


def test_layers_of_several_kinds_are_all_asked():
    ropes = {"full_attention": LONG, "sliding_attention": {"rope_type": "default"}}
    config = transformers.LlamaConfig()
    config.rope_parameters = ropes
    assert RopeLengths.of(config, max_length=48) == RopeLengths(steps=(12,))
    assert RopeLengths(steps=(12,)) | RopeLengths(slopes=(9,)) == RopeLengths((12,), (9,))
