"""A scorer's values per token, on both paths, against a plain log_softmax per response."""

import numpy as np
import pytest
import torch

from dpo_lightning.models import scoring
from dpo_lightning.models.scoring import Scorer, TokenScores
from tests.support.batches import batch_of, gradients, make_groups, relative
from tests.support.models import make_model

# A plain head, one with a bias or none tied to it, and scores that are capped or scaled behind it.
FAMILIES = ["llama", "gpt2", "gemma3-capped", "cohere", "granite"]


def plain_scores(model, groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token and log sum_v p_v^2, one unpadded row per response."""
    logps, collisions = [], []
    for group in groups:
        for response in group.responses:
            row = torch.tensor(np.concatenate([group.prompt, response])[None].astype(np.int64))
            p = len(group.prompt)
            scores = model(input_ids=row).logits[0, p - 1 : -1].float().log_softmax(-1)
            logps.append(scores.gather(1, row[0, p:, None])[:, 0])
            collisions.append(scores.detach().double().exp().square().sum(1).log().float())
    return torch.cat(logps), torch.cat(collisions)


def scores_of(model, path: str, groups) -> TokenScores:
    scorer = Scorer(path)
    scorer.prepare(model)
    batch = batch_of(groups)
    return scorer.token_scores(model, batch, scorer.plan(batch))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["flat", "padded"])
def test_scores_and_gradients_equal_a_plain_loop(family: str, path: str):
    groups = make_groups()
    plain = make_model(family)
    expected, expected_collisions = plain_scores(plain, groups)
    weights = torch.linspace(-1.0, 1.0, len(expected))
    (expected * weights).sum().backward()

    model = make_model(family)
    found = scores_of(model, path, groups)
    assert found.logps.dtype == found.collisions.dtype == torch.float32
    torch.testing.assert_close(found.logps, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.collisions, expected_collisions, rtol=1e-4, atol=1e-5)
    # Tokens of one response differ, so that an order mixed up is seen.
    assert found.collisions.unique().numel() > len(expected) // 2
    assert not found.collisions.requires_grad
    (found.logps * weights).sum().backward()
    assert relative(gradients(model), gradients(plain)) <= 1e-5


@pytest.mark.parametrize("path", ["flat", "padded"])
def test_the_log_probabilities_are_those_without_collisions(path: str, monkeypatch):
    model = make_model("llama")
    found = scores_of(model, path, make_groups())
    scorer, batch = Scorer(path), batch_of(make_groups())
    monkeypatch.setattr(scoring, "collision_logps", None)
    assert torch.equal(scorer.token_logps(model, batch, scorer.plan(batch)), found.logps)


@pytest.mark.parametrize("path", ["flat", "padded"])
def test_a_model_in_bfloat16_is_close(path: str):
    groups = make_groups()
    expected = scores_of(make_model("llama"), path, groups)
    found = scores_of(make_model("llama").to(torch.bfloat16), path, groups)
    assert found.collisions.dtype == torch.float32
    # Weights were enlarged for these tests, so scores are large and rounded coarsely.
    difference = (found.collisions - expected.collisions).abs()
    assert difference.mean() <= 0.03
    assert difference.max() <= 0.2
