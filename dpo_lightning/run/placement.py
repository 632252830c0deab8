"""A run on its devices: precision and budget, shards on their ranks, the reference's place."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch

from dpo_lightning.data.controlled import MAX_TOKENS
from dpo_lightning.data.datamodule import rows_of_steps
from dpo_lightning.data.splits import PreparedData
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.answers import (
    Answering,
    choose_prompts,
)
from dpo_lightning.evaluation.backends import BackendDrawer, WeightFiles, written_weights
from dpo_lightning.memory.budget import Budget, Room, memory_of
from dpo_lightning.memory.estimate import MemoryEstimate, estimate_run, plan_training
from dpo_lightning.memory.footprint import Training
from dpo_lightning.memory.lengths import GroupLengths
from dpo_lightning.models.loading import max_positions
from dpo_lightning.models.master_weights import cast_frozen
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import is_sharded, shard_model
from dpo_lightning.reference.cache import ReferenceCache
from dpo_lightning.reference.fill import Watch, with_reference_logps
from dpo_lightning.reference.kinds import LiveReference
from dpo_lightning.reference.moving import MovingReference, make_moving
from dpo_lightning.reference.pair import Models
from dpo_lightning.reference.spot_check import check_stored
from dpo_lightning.run.identity import device_facts, reference_facts
from dpo_lightning.run.plan import RunPlan
from dpo_lightning.run.prepare import Prepared
from dpo_lightning.settings.generation import Backend
from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.training.precision import Computation, make_computation


@dataclass(frozen=True, slots=True)
class Placed:
    """A run on its devices, as the trainer found them.

    Attributes:
        device: Where this process computes.
        world_size: Processes that share a step.
        computation: What is computed in.
        budget: What the device holds at once.
        estimate: What the run takes with it.
    """

    device: torch.device
    world_size: int
    computation: Computation
    budget: Budget
    estimate: MemoryEstimate

    @property
    def sync_every_micro_batch(self) -> bool:
        """True if ranks that share weights reduce gradients in every backward pass."""
        return not self.estimate.training.whole_gradients

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a step, for what is computed outside of one."""
        return self.computation.context(self.device)


def place(plan: RunPlan, prepared: Prepared, trainer: pl.Trainer) -> Placed:
    """Decides what depends on the devices that the trainer has.

    The policy's frozen weights take the type that it computes in.

    Raises:
        UserError: If the loss needs a whole step at once and the settings allow less.
    """
    memory = plan.memory
    computation = make_computation(
        plan.hardware.precision,
        trainer,
        sharded=plan.trainer.sharded,
        half_weights=memory.half_weights,
        adapters=memory.adapters is not None,
    )
    # Beside an adapter most weights are frozen: half of their memory, before they are moved.
    computation.cast(prepared.models.policy)
    device, world_size = trainer.strategy.root_device, trainer.world_size
    training = plan_training(
        memory,
        cast(DeviceKind, device.type),
        devices=world_size,
        mixed=plan.hardware.mixed,
        float16=plan.hardware.float16,
    )
    budget, estimate = _make_budget(plan, prepared, training, device, world_size=world_size)
    return Placed(device, world_size, computation, budget, estimate)


def _make_budget(
    plan: RunPlan,
    prepared: Prepared,
    training: Training,
    device: torch.device,
    *,
    world_size: int,
) -> tuple[Budget, MemoryEstimate]:
    """Chooses the token budget, and estimates the memory that the run takes with it."""
    groups = [*prepared.data.train, *prepared.data.eval, *_longest_drawn(plan, prepared)]
    shared = prepared.models.scorer.shared
    costs = [group.tokens if shared else group.padded_tokens for group in groups]
    lengths = GroupLengths.of(groups, shared=shared)
    memory = prepared.memory.with_lengths(lengths, prepared.models.scorer.path)
    # Ranks that share the weights have to decide alike, whatever cards they have.
    ranks, device_bytes = prepared.ranks, memory_of(device)
    if ranks is not None:
        device_bytes = ranks.from_first(lambda: memory_of(device))
    return estimate_run(
        memory,
        training,
        Room(device_bytes, lengths.most, plan.memory.tokens, plan.memory.checkpointing),
        costs=costs[: len(prepared.data.train)],
        batch_size=plan.batches.size,
        coupling=plan.learning.coupling,
        devices=world_size,
        float16=plan.hardware.float16,
    )


def _longest_drawn(plan: RunPlan, prepared: Prepared) -> list[TokenGroup]:
    """A group as long as any that a round may draw; none without rounds."""
    rounds = plan.batches.rounds
    if rounds is None:
        return []
    settings = rounds.settings
    longest = settings.max_new_tokens if prepared.task is None else MAX_TOKENS
    prompt = max((group.prompt for group in prepared.data.train), key=len)
    responses = settings.num_generations if settings.groups == "ranking" else 2
    positions = max_positions(prepared.source.config) or prepared.source.max_length
    length = max(1, min(longest, positions - len(prompt)))
    ids = np.zeros(length, dtype=np.int32)
    return [TokenGroup(prompt, (ids,) * responses, (1,) * responses, 1.0, "", "")]


def choose_answering(
    plan: RunPlan, prepared: Prepared, computation: Computation
) -> tuple[list[TokenGroup], Answering]:
    """Chooses the prompts to answer, and the settings for answering them."""
    source, data, policy = prepared.source, prepared.data, prepared.models.policy
    evaluation = plan.evaluation
    positions = max_positions(source.config)
    groups = choose_prompts(
        data.ranking() or data.train,
        count=max(evaluation.samples, evaluation.partition_samples),
        max_tokens=min(source.max_length, positions or source.max_length),
    )
    longest = evaluation.max_new_tokens
    if prepared.task is not None:
        longest = min(longest, MAX_TOKENS)
    room = longest
    if positions is not None:
        room = min(longest, positions - max((len(g.prompt) for g in groups), default=0))
    answering = Answering(
        tokenizer=source.tokenizer,
        max_new_tokens=room,
        positions=positions if room < longest else None,
        cuts=prepared.task is None or room < MAX_TOKENS,
        batch_size=evaluation.batch_size,
        precision=lambda: computation.context(policy.device),
        drawer=_drawer(plan.evaluation.backend, prepared),
    )
    return groups, answering


def _drawer(backend: Backend, prepared: Prepared) -> BackendDrawer | None:
    """The one who draws the answers of a run; None where transformers does."""
    if backend.is_own:
        return None
    source, adapters = prepared.source, prepared.models.adapters

    def files(who: str, model: Any) -> contextlib.AbstractContextManager[WeightFiles]:
        if adapters is None:
            return written_weights(model, source.tokenizer, adapters=None, base=source.source)
        if who == "policy":
            return written_weights(model, source.tokenizer, adapters=adapters, base=source.source)
        if adapters.has_stored_reference:
            raise UserError(
                f"generation.backend={backend.name}: the reference is an adapter in the policy's "
                "own model, which only transformers has; draw by generation.backend=hf"
            )
        return contextlib.nullcontext((source.source, None))

    return BackendDrawer(backend, source.tokenizer, files, prepared.models.scorer.plain)


def with_shards(prepared: Prepared, computation: Computation) -> Prepared:
    """Models of which each rank has its share, where the strategy wants that."""
    ranks, models = prepared.ranks, prepared.models
    if ranks is None:
        return prepared

    def shard(model: Any) -> Any:
        return shard_model(model, ranks.mesh, ranks.device, compute_dtype=computation.weights)

    def make_reference() -> Any:
        made = models.make_reference()
        # An adapted policy is its own reference, and shared out with it.
        return made if is_sharded(made) else shard(made).requires_grad_(False).eval()

    if models.adapters is not None and computation.weights is not None:
        # As they are gathered they would be rounded to the same, and until then take the double.
        cast_frozen(models.policy, computation.weights)
    sharded = replace(models, policy=shard(models.policy), make_reference=make_reference)
    if sharded.live:
        reference = LiveReference(sharded.live_model(), sharded.scorer)
        sharded = replace(sharded, reference=reference)
    return replace(prepared, models=sharded)


def with_reference(plan: RunPlan, prepared: Prepared, placed: Placed, *, watch: Watch) -> Prepared:
    """Models and data with the reference in the type that is computed in, or out of the cache.

    Beside a reference that moves held-out groups alone get log-probabilities, those of the start.

    Args:
        plan: The run's.
        prepared: Models and data.
        placed: Their devices.
        watch: Looks on the reference pass; raises if another rank is gone.
    """
    models, data, computation = prepared.models, prepared.data, placed.computation
    make_reference = models.make_reference
    models = replace(models, make_reference=lambda: computation.cast(make_reference()))
    moving = _cast_live(models, computation)
    if models.reference is not None and moving is None:
        return replace(prepared, models=models)

    # A checkpoint is loaded later: by now the policy is what it started as, also on a resume.
    is_policy = models.starts_from_reference and models.adapters is None

    @functools.cache
    def load() -> Any:
        if moving is not None:
            return moving.model  # as it starts
        # Before its first step the policy is the reference, and its shards are in memory already.
        shared = is_policy and prepared.ranks is not None
        return models.policy if shared else models.make_reference()

    parts, reference = with_reference_logps(
        [data.train, data.eval],
        reference_cache(plan, prepared, placed),
        load=load,
        scorer=models.scorer,
        device=placed.device,
        precision=placed.context,
        micro_batch_tokens=placed.budget.tokens,
        per_token=plan.learning.objective.desensitises,
        ranks=prepared.ranks,
        needed=_needed(plan, data, trained=moving is None),
        watch=watch,
        threads=prepared.threads if placed.device.type == "cpu" else None,
    )
    groups = [group for part in parts for group in part]
    check_stored(
        [groups[number] for number in reference.read],
        reference.folder,
        load=(lambda: models.policy) if is_policy else load,
        scorer=models.scorer,
        device=placed.device,
        precision=placed.context,
        dtype=computation.dtype(prepared.source.dtype),
    )
    if moving is not None:
        moving.rows = moving.computed = reference.computed
    return replace(
        prepared,
        models=replace(models, reference=moving or reference),
        data=replace(data, train=parts[0], eval=parts[1]),
    )


def _cast_live(models: Models, computation: Computation) -> MovingReference | None:
    """Casts a live reference; one that moves keeps its float32 values, and is given back."""
    live = models.reference
    if not isinstance(live, LiveReference):
        return None
    if models.movement is None:
        computation.cast(live.model)
        return None
    return make_moving(
        live.model,
        models.scorer,
        policy=models.policy,
        adapters=models.adapters,
        movement=models.movement,
        cast=computation.cast,
    )


def reference_cache(
    plan: RunPlan,
    prepared: Prepared,
    placed: Placed,
    *,
    weights: str | None = None,
    folder: Path | None = None,
) -> ReferenceCache:
    """The stored values of the reference, as it is computed on this device.

    Args:
        plan: The run's.
        prepared: Models and data.
        placed: Their devices.
        weights: Hash of what the policy has trained, where it is the reference itself; None: the
            run's reference is meant.
        folder: Parent of the values' folder; None: the one that all runs share.
    """
    models = prepared.models
    trained = "" if weights is None else f" trained to {weights}"
    facts = reference_facts(
        weights=f"{models.reference_weights}{trained}",
        config=models.reference_config,
        dtype=str(prepared.source.dtype),
        precision=placed.computation.name,
        device=device_facts(placed.device, threads=prepared.threads),
        kernel=_kernel(models.scorer, sharded=prepared.ranks is not None),
    )
    return ReferenceCache(folder or plan.folders.references, facts)


def _needed(plan: RunPlan, data: PreparedData, *, trained: bool) -> npt.NDArray[np.bool_]:
    """True for the groups that a step or an evaluation sees, those of the training first.

    Args:
        plan: The run's.
        data: The groups.
        trained: False leaves those of the steps out.
    """
    seen = _seen(plan, len(data.train))
    evaluated = np.zeros(len(data.eval), dtype=bool)
    evaluated[slice(None) if data.evaluated is None else data.evaluated] = True
    return np.concatenate([seen & trained, evaluated])


def _seen(plan: RunPlan, groups: int) -> npt.NDArray[np.bool_]:
    """True for the training groups that a step sees, with their values from the beginning."""
    rounds = plan.batches.rounds
    if rounds is None:
        return rows_of_steps(
            groups,
            batch_size=plan.batches.size,
            steps=plan.schedule.total_steps,
            seed=plan.seed,
        )
    seen = np.zeros(groups, dtype=bool)
    if not rounds.settings.previous:
        for number in range(1, rounds.plan.count + 1):
            seen[rounds.plan.given_rows_of(number, groups)] = True
    return seen


def _kernel(scorer: Scorer, *, sharded: bool) -> str:
    """Name of the kernels of a reference pass.

    Ranks that share a model pad all rows of a micro-batch alike, others only those of like widths.
    """
    return f"{scorer.kernel}, one width" if sharded and scorer.path == "padded" else scorer.kernel
