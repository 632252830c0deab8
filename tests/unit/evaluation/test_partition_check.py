"""The check that the policy's partition function is 1: faults that it finds, and others.

Both are shown with four planted faults: a prompt token that is scored too, labels shifted by
one, the first token of each response dropped, and its last one, the EOS, dropped.
"""

import dataclasses
import logging

import numpy as np
import pytest
import torch

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.data.packing import collate_groups
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.evaluation.partition_check import check_partition
from dpo_lightning.evaluation.sampling import answer_prompts
from dpo_lightning.models.probe import choose_path


class Faulty:
    """A scorer with a fault in the tokens that it scores."""

    def __init__(self, scorer, fault):
        self._scorer = scorer
        self._fault = fault

    def plan(self, batch):
        return self._scorer.plan(batch)

    def token_logps(self, model, batch, plan):
        return self._fault(self._scorer, model, batch, plan)


def right(scorer, model, batch, plan):
    return scorer.token_logps(model, batch, plan)


def prompt_token(scorer, model, batch, plan):
    """Counts the first token of each response together with the prompt's last one."""
    values = scorer.token_logps(model, batch, plan)
    first = batch.lengths.cumsum(0) - batch.lengths
    last_of_prompt = batch.score_from[first]
    other = dataclasses.replace(
        batch,
        score_from=batch.score_from.index_copy(0, first, last_of_prompt - 1),
        targets=batch.targets.index_copy(0, first, batch.input_ids[last_of_prompt]),
    )
    prompt_values = scorer.token_logps(model, other, plan)
    return values.index_add(0, first, prompt_values[first])


def shifted(scorer, model, batch, plan):
    """Asks each place for the token behind the next one."""
    return scorer.token_logps(
        model, dataclasses.replace(batch, targets=batch.targets.roll(-1)), plan
    )


def without_first(scorer, model, batch, plan):
    values = scorer.token_logps(model, batch, plan)
    first = batch.lengths.cumsum(0) - batch.lengths
    return values.index_fill(0, first, 0.0)


def without_eos(scorer, model, batch, plan):
    values = scorer.token_logps(model, batch, plan)
    return torch.where(batch.targets == 0, 0.0, values)


@pytest.fixture(scope="module")
def models():
    """Policy and reference of a short training on the controlled task, and their scorer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    task = ControlledTask()
    policy, reference = (AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL) for _ in range(2))
    scorer, reason = choose_path(policy, max_length=8)
    assert reason is None
    scorer.prepare(reference)
    with scorer.plain(reference) as plain:
        groups = task.groups(256, seed=3, reference_logps=task.outcome_logps(plain))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    batch = collate_groups(groups, range(256))
    for _ in range(25):
        logps = scorer.logps(policy, batch)
        margins = logps[batch.chosen] - logps[batch.rejected]
        torch.nn.functional.softplus(-0.05 * margins).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    return task, policy.eval(), reference.eval(), scorer, tokenizer


@pytest.fixture(scope="module")
def drawn(models):
    task, _, reference, scorer, tokenizer = models
    prompts = [ids.numpy().astype(np.int32) for ids in task.prompt_ids for _ in range(512)]
    answers = answer_prompts(
        reference, scorer, tokenizer, prompts, max_new_tokens=4, batch_size=4096, seed=5
    )
    return prompts, answers


def estimate(models, drawn, fault):
    _, policy, reference, scorer, _ = models
    return check_partition(policy, reference, Faulty(scorer, fault), *drawn)


def total(models, fault) -> float:
    """The sum of the probabilities of all outcomes of a prompt, as the fault has them."""
    task, policy, _, scorer, _ = models
    prompt = task.prompt_ids[0].numpy().astype(np.int32)
    outcomes = tuple(np.array(outcome, dtype=np.int32) for outcome in task.outcomes)
    group = TokenGroup(prompt, outcomes, (1,) * len(outcomes), 1.0, "all", "")
    batch = collate_groups([group], [0])
    with torch.no_grad():
        values = fault(scorer, policy, batch, scorer.plan(batch)).double()
    logps = torch.zeros(len(outcomes), dtype=torch.float64)
    return logps.index_add(0, batch.response, values).exp().sum().item()


def test_right_log_probabilities_pass(models, drawn, caplog):
    found = estimate(models, drawn, right)
    assert abs(found["partition/self_check"]) < 4 * found["partition/self_check_stderr"] + 0.01
    assert found["partition/self_check_ess"] >= 0.5
    assert 1 <= found["partition/self_check_tokens"] <= 4
    assert not caplog.records
    assert total(models, right) == pytest.approx(1, abs=1e-4)


def test_as_much_is_looked_at_as_half_of_the_sample_counts_for(models, drawn):
    """All weights of a model over itself are 1: whole answers count, of up to four tokens."""
    _, _, reference, scorer, _ = models
    prompts, answers = drawn[0][::64], drawn[1][::64]
    assert max(map(len, answers)) == 4
    found = check_partition(reference, reference, scorer, prompts, answers)
    assert found == {
        "partition/self_check": 0.0,
        "partition/self_check_stderr": 0.0,
        "partition/self_check_ess": 1.0,
        "partition/self_check_tokens": 4.0,
    }


@pytest.mark.parametrize("fault", [prompt_token, shifted])
def test_faults_that_the_check_sees(models, drawn, caplog, fault):
    caplog.set_level(logging.WARNING)
    found = estimate(models, drawn, fault)
    limit = 5 * found["partition/self_check_stderr"] + 0.05
    assert abs(found["partition/self_check"]) > limit
    assert "are not those of the models" in caplog.text


@pytest.mark.parametrize("fault", [without_first, without_eos])
def test_faults_that_only_the_sum_to_one_sees(models, drawn, caplog, fault):
    """The rest after the first token is a distribution too, given that token.

    So is a response without its end, nearly: what ends early gains what its end had lost.
    """
    caplog.set_level(logging.WARNING)
    estimate(models, drawn, fault)
    assert not caplog.records
    assert abs(total(models, fault) - 1) > 0.05


@pytest.mark.parametrize("fault", [prompt_token, shifted])
def test_the_sum_to_one_sees_the_others_too(models, fault):
    assert abs(total(models, fault) - 1) > 0.01
