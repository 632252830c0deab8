"""Models and data where they are needed: shards on their ranks, the reference in its place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dpo_lightning.data.controlled import MAX_TOKENS
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.evaluation.answers import (
    Answering,
    choose_prompts,
)
from dpo_lightning.memory.budget import Budget
from dpo_lightning.models.loading import max_positions
from dpo_lightning.models.sharding import shard_model
from dpo_lightning.reference.cache import ReferenceCache
from dpo_lightning.reference.fill import with_reference_logps
from dpo_lightning.reference.kinds import LiveReference
from dpo_lightning.run.identity import reference_facts
from dpo_lightning.run.prepare import Prepared
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.schema import Config
from dpo_lightning.training.precision import Computation


def choose_answering(
    config: Config, prepared: Prepared, computation: Computation
) -> tuple[list[TokenGroup], Answering]:
    """Whose prompts are answered, and how."""
    source, data, policy = prepared.source, prepared.data, prepared.models.policy
    positions = max_positions(source.config)
    groups = choose_prompts(
        data.eval or data.train,
        count=max(config.evaluation.samples, config.evaluation.partition_samples),
        max_tokens=min(source.max_length, positions or source.max_length),
    )
    longest = config.evaluation.max_new_tokens
    if prepared.task is not None:
        longest = min(longest, MAX_TOKENS)
    if positions is not None:
        longest = min(longest, positions - max((len(g.prompt) for g in groups), default=0))
    answering = Answering(
        tokenizer=source.tokenizer,
        max_new_tokens=longest,
        batch_size=config.evaluation.batch_size,
        precision=lambda: computation.context(policy.device),
    )
    return groups, answering


def with_shards(prepared: Prepared, computation: Computation) -> Prepared:
    """Models of which each rank has its share, where the strategy wants that."""
    ranks, models = prepared.ranks, prepared.models
    if ranks is None:
        return prepared

    def shard(model: Any) -> Any:
        return shard_model(model, ranks.mesh, ranks.device, compute_dtype=computation.weights)

    def make_reference() -> Any:
        return shard(models.make_reference()).requires_grad_(False).eval()

    reference = models.reference
    policy = shard(models.policy)
    if models.live:
        reference = LiveReference(make_reference(), models.scorer)
    sharded = replace(models, policy=policy, reference=reference, make_reference=make_reference)
    return replace(prepared, models=sharded)


def with_reference(
    config: Config,
    prepared: Prepared,
    device: torch.device,
    computation: Computation,
    budget: Budget,
) -> Prepared:
    """Models and data with the reference in the type that is computed in, or out of the cache."""
    models, data, source = prepared.models, prepared.data, prepared.source
    make_reference = models.make_reference
    models = replace(models, make_reference=lambda: computation.cast(make_reference()))
    if models.reference is not None:
        if isinstance(models.reference, LiveReference):
            computation.cast(models.reference.model)
        return replace(prepared, models=models)
    facts = reference_facts(
        weights=models.reference_weights,
        dtype=str(source.dtype),
        precision=computation.name,
        device=device.type,
        kernel=models.scorer.kernel,
    )
    cache = ReferenceCache(prepared.cache_dir, facts)

    def load() -> Any:
        # Before its first step the policy is the reference, and its shards are in memory already.
        shared = prepared.ranks is not None and models.starts_from_reference
        return models.policy if shared else models.make_reference()

    parts, reference = with_reference_logps(
        [data.train, data.eval],
        cache,
        load=load,
        scorer=models.scorer,
        device=device,
        precision=lambda: computation.context(device),
        micro_batch_tokens=budget.tokens,
        per_token=objective_settings(config.loss).desensitises,
        ranks=prepared.ranks,
    )
    train, evaluation = parts
    return replace(
        prepared,
        models=replace(models, reference=reference),
        data=replace(data, train=train, eval=evaluation),
    )
