"""Models and data from the settings, made ready before a session begins.

The settings end here and in ``plan``: every class below takes plain values.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.data.controlled import MAX_LENGTH, ControlledTask
from dpo_lightning.data.density import add_density_weights
from dpo_lightning.data.labels import imbalance
from dpo_lightning.data.mismatched import add_mismatched
from dpo_lightning.data.records import write_quarantine
from dpo_lightning.data.refused import Refuse, stop
from dpo_lightning.data.splits import (
    PreparedData,
    data_hash,
    digest_of,
    prepare_rows,
)
from dpo_lightning.evaluation.judges import Judge, SilentJudge
from dpo_lightning.evaluation.named_judge import make_judge
from dpo_lightning.evaluation.scorers import RewardModel
from dpo_lightning.memory.estimate import (
    check_fits,
    estimate_of,
    may_not_load,
    memory_settings,
    step_memory_of,
)
from dpo_lightning.memory.hardware import Hardware
from dpo_lightning.memory.step_memory import StepMemory
from dpo_lightning.models.adapters import count_parameters
from dpo_lightning.models.config_numbers import config_numbers, numbers_hash
from dpo_lightning.models.fetching import fetch_weights
from dpo_lightning.models.loading import max_positions
from dpo_lightning.models.quantization import nf4_config
from dpo_lightning.models.source import ModelSource, resolve_model
from dpo_lightning.models.vocabulary import check_ids
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.reference.moving import Movement
from dpo_lightning.reference.pair import Models, ReferenceSettings, load_models
from dpo_lightning.run.adapter_start import adapter_settings
from dpo_lightning.run.chat import ChatTemplate, choose_template
from dpo_lightning.run.folder import RunFolder
from dpo_lightning.run.identity import basis_of, config_hash, identity_of
from dpo_lightning.run.inputs import QUARANTINE_FILE, SourceRows
from dpo_lightning.run.record import RunRecord
from dpo_lightning.run.rounds.asking import RoundMarker
from dpo_lightning.run.rounds.marking import make_marker
from dpo_lightning.settings.folders import cache_folder
from dpo_lightning.settings.judging import judge_settings
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.material import DataConfig
from dpo_lightning.settings.schema import Config
from dpo_lightning.training.checkpoints.files import run_of
from dpo_lightning.training.ranks import Ranks
from dpo_lightning.training.schedule import make_schedule
from dpo_lightning.training.traced import traced_optimizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Models, data and steps of a session.

    Attributes:
        source: The model, its tokenizer and limits.
        memory: Of the steps of such a policy.
        models: Policy, reference and scorer.
        data: The groups.
        identity: What a checkpoint to resume from must agree with.
        task: The controlled task, if that is trained on.
        reference_outcome_logps: Log-probabilities of its outcomes under the reference, (8, 4681).
        judge: Judges answers, if the settings name one.
        threads: CPU threads of one operation in the reference pass.
        ranks: The processes that share the models' weights; None where each has its own.
        chat: The chat template; None where no rows go through one.
        marker: Has the judge mark the answers of rounds; None where there are none, or no judge.
    """

    source: ModelSource
    memory: StepMemory
    models: Models
    data: PreparedData
    identity: dict[str, Any]
    task: ControlledTask | None
    reference_outcome_logps: Tensor | None
    judge: Judge | None
    threads: int
    ranks: Ranks | None = None
    chat: ChatTemplate | None = None
    marker: RoundMarker | None = None


def prepare(
    config: Config,
    rows: SourceRows | None,
    *,
    hardware: Hardware,
    ranks: Ranks | None,
    threads: int,
    tokens: Path,
    resolved: dict[str, Any],
    record: RunRecord,
    folder: RunFolder | None,
    show: ShowPhase,
) -> Prepared:
    """Loads models and data, as far as a session needs them before it begins.

    Args:
        config: The validated settings.
        rows: The rows that were read, or None for the controlled task.
        hardware: Devices and precision.
        ranks: The processes that share the models' weights; None where each has its own.
        threads: CPU threads that this process began with.
        tokens: Where token ids of rows are kept.
        resolved: The settings as plain values.
        record: What is known of the run; filled.
        folder: The run's folder, for the rows that are set aside; None: they go nowhere.
        show: Shows how far long phases are.
    """
    source = resolve_source(config, hardware)
    threads = set_threads(config, source) or threads
    task = ControlledTask() if rows is None else None
    data = chat = reference_logps = None
    if rows is not None:
        data, chat = prepare_groups(config, rows, source, tokens, show=show)
        _set_aside(rows, data, folder)
    memory = _checked_memory(config, source, hardware)
    models = _load_models(config, source, ranks, show)
    if task is not None:
        reference_logps = outcome_logps(task, models, ranks)
        data = controlled_data(config, task, reference_logps)
    assert data is not None
    data.choose_evaluated(config.evaluation.max_prompts)
    hashes = _hashes(source, models, data)
    _fill(record, config, source, models, data, hashes)
    record.config_hash = config_hash(resolved, hashes)
    identity = (chat.identity() if chat else {}) | _identity(config, source, data, hashes)
    return Prepared(
        source=source,
        memory=memory,
        models=models,
        data=data,
        identity=identity,
        task=task,
        reference_outcome_logps=reference_logps,
        judge=choose_judge(config, hardware, judges=ranks is None or ranks.is_first, show=show),
        threads=threads,
        ranks=ranks,
        chat=chat,
        marker=choose_marker(config, hardware, folder, show=show),
    )


def _identity(
    config: Config, source: ModelSource, data: PreparedData, hashes: dict[str, str]
) -> dict[str, Any]:
    schedule = make_schedule(config, groups=len(data.train), bundled=source.bundled)
    numbers = config_numbers(source.config)
    return identity_of(config, hashes, numbers=numbers, round_steps=schedule.round_steps)


def _checked_memory(config: Config, source: ModelSource, hardware: Hardware) -> StepMemory:
    """Memory of the steps; a run without room for them ends before anything large is loaded."""
    settings = memory_settings(config)
    memory = step_memory_of(settings, source.config, make_optimizer=traced_optimizer)
    if may_not_load(memory, settings, hardware):
        check_fits(estimate_of(settings, hardware, memory), settings.check)
    return memory


def set_threads(config: Config, source: ModelSource) -> int | None:
    """Sets the CPU threads of one operation, and returns them, where the run has a say in it."""
    # The bundled model is too small to share out: threads would only wait for each other.
    threads = config.trainer.threads or (1 if source.bundled else None)
    if threads is not None:
        torch.set_num_threads(threads)
    return threads


def _set_aside(rows: SourceRows, data: PreparedData, folder: RunFolder | None) -> None:
    """Has the rows written that could not be read, and those that could not be rendered."""
    if not data.set_aside:
        return
    if folder is None:
        log.info(
            "rows that the chat template does not take: %d, they are left out", len(data.set_aside)
        )
        return
    bad = [row for source in rows.all for row in source.bad]
    path = folder.path / QUARANTINE_FILE
    folder.when_begun(lambda: write_quarantine(path, [*bad, *data.set_aside]))
    log.info(
        "rows that the chat template does not take: %d, they go to %s", len(data.set_aside), path
    )


def _hashes(source: ModelSource, models: Models, data: PreparedData) -> dict[str, str]:
    """Hashes of all that decides a run's numbers beside its settings."""
    return {
        "data": data_hash(data.train, data.eval),
        "weights": models.weights,
        "config": numbers_hash(source.config),
        "reference": models.reference_weights,
        "reference_config": models.reference_config,
    }


def outcome_logps(task: ControlledTask, models: Models, ranks: Ranks | None) -> Tensor:
    """Log-probabilities of the controlled task's outcomes under the reference, (8, 4681)."""

    def enumerated() -> Tensor:
        start = models.policy if models.adapters is None else models.adapters.reference
        with models.scorer.plain(start) as reference:
            return task.outcome_logps(reference)

    return enumerated() if ranks is None else ranks.from_first(enumerated)


def _fill(
    record: RunRecord,
    config: Config,
    source: ModelSource,
    models: Models,
    data: PreparedData,
    hashes: dict[str, str],
) -> None:
    """The entries of model and data, and what its numbers are of."""
    record.basis = basis_of(config, held_out=digest_of(data.evaluated_groups()))
    parameters, trainable = count_parameters(models.policy)
    record.data = data.counts() | {"hash": hashes["data"]}
    record.model = {"name": source.name, "parameters": parameters, "trainable": trainable}


# Building ---------------------------------------------------------------------------------------


def resolve_source(config: Config, hardware: Hardware) -> ModelSource:
    """Tokenizer and config of the policy's start, and the types of its weights."""
    model = config.model
    source = resolve_model(
        pretrained=model.pretrained,
        revision=model.revision,
        tokenizer=model.tokenizer,
        config=model.config,
        config_overrides=model.config_overrides,
        dtype=model.dtype,
        max_length=config.data.max_length,
    )
    if config.peft.quantization == "nf4":
        # What is not held in 4 bits is held in what is computed in.
        half = source.dtype == torch.bfloat16 or hardware.mixed
        dtype = torch.bfloat16 if half else torch.float32
        dtype = torch.float16 if hardware.float16 else dtype
        source = replace(source, dtype=dtype, quantization=nf4_config(dtype, hardware.beside))
    if source.tokenizer.pad_token_id is None:
        log.info("the tokenizer has no pad token: EOS pads answers")
    return source


def prepare_groups(
    config: Config,
    rows: SourceRows,
    source: ModelSource,
    tokens: Path,
    *,
    key: str = "data.train",
    refuse: Refuse = stop,
    keep_tokens: bool = True,
    show: ShowPhase = unshown,
) -> tuple[PreparedData, ChatTemplate | None]:
    """Token groups of the rows, and the chat template that they went through.

    Args:
        config: The settings.
        rows: The rows that were read.
        source: The model.
        tokens: Where token ids of rows are kept.
        key: The setting by which the user named ``rows.train``, for errors.
        refuse: Takes each reason to stop that lies in the rows.
        keep_tokens: False writes nothing there.
        show: Shows how far the tokenizer is.
    """
    chat = choose_template(source.tokenizer, rows, config.data)
    for note in chat.notes if chat else ():
        log.info(note)
    data = prepare_rows(
        rows.train,
        rows.held_out,
        source.tokenizer,
        max_length=source.max_length,
        truncation=config.data.truncation,
        eval_fraction=config.data.eval_fraction,
        split_seed=config.data.split_seed,
        max_dropped=config.data.max_dropped,
        cache=tokens,
        options=None if chat is None else chat.options,
        on_bad_row=config.data.on_bad_row,
        positions=max_positions(source.config),
        key=key,
        refuse=refuse,
        keep_tokens=keep_tokens,
        show=show,
    )
    data.overfit(config.data.overfit_groups)
    _suit_loss(config, data, max_length=source.max_length)
    name = f"{source.key}={source.source}"
    groups = [*data.train, *data.eval]
    check_ids(groups, source.config, source.tokenizer, name=name, source=source.source)
    objective = objective_settings(config.loss)
    data.notes += _of_loss(rows, data, objective, key)
    for note in data.notes:
        log.info(note)
    return data, chat


def all_evaluated(data: DataConfig) -> DataConfig:
    """The section for rows that are evaluated, all and as they are, instead of trained on.

    Args:
        data: The section of a run.
    """
    return replace(data, eval_fraction=0.0, overfit_groups=None, density_ratio=None)


def _of_loss(
    rows: SourceRows, data: PreparedData, objective: ObjectiveSettings, key: str
) -> list[str]:
    """Lines about rows whose margins or labels do not suit the loss."""
    notes = []
    with_margin = sum(group.target_margin is not None for group in rows.train.groups)
    uses_margin = "odpo" in objective.terms
    if with_margin and not uses_margin:
        notes.append(f"{with_margin} rows have a target_margin, which this loss does not use")
    elif uses_margin and with_margin < len(rows.train.groups):
        missing = len(rows.train.groups) - with_margin
        notes.append(f"{missing} rows have no target_margin: it counts as 0 for loss=odpo")
    labels = data.labels()
    if labels and key == "data.train":
        names = ("desirable_weight", "undesirable_weight")
        known = [float(objective.options[name]) for name in names if name in objective.options]
        pairs = sum(group.pairs for group in data.train)
        weights = known if len(known) == len(names) else None
        line = imbalance(labels["train"], weights, pairs=pairs)
        notes += [line] if line else []
    return notes


def _load_models(
    config: Config, source: ModelSource, ranks: Ranks | None, show: ShowPhase = unshown
) -> Models:
    reference = config.reference
    return load_models(
        source,
        ReferenceSettings(
            kind=reference.kind,
            pretrained=reference.pretrained,
            revision=reference.revision,
            needed=objective_settings(config.loss).uses_reference,
            movement=movement_of(config),
        ),
        seed=config.seed,
        adapters=adapter_settings(config, source),
        from_first=None if ranks is None else ranks.from_first,
        show=show,
    )


def movement_of(config: Config) -> Movement | None:
    """The way in which the reference follows the policy; None where it stays as it is."""
    every, alpha = config.reference.sync_every, config.reference.sync_alpha
    return None if every is None else Movement(every, alpha)


def choose_judge(
    config: Config,
    hardware: Hardware,
    *,
    judges: bool,
    may_miss: bool = False,
    show: ShowPhase = unshown,
) -> Judge | None:
    """The judge, before the training: what is wrong with it need not cost one.

    Args:
        config: The settings.
        hardware: Devices; a reward model takes the one that a policy is on.
        judges: False on a rank that leaves it to the first.
        may_miss: True if it may leave answers without a mark.
        show: Shows how far a download is.
    """
    settings = judge_settings(config, cache=cache_folder(config.reference.cache_dir))
    if settings is None:
        return None
    if not judges:
        return SilentJudge()

    def reward_model(source: str) -> RewardModel:
        fetch_weights(source, None, show)
        return RewardModel(source, device=hardware.beside, batch_size=settings.batch_size)

    return make_judge(settings, reward_model=reward_model, may_miss=may_miss)


def choose_marker(
    config: Config, hardware: Hardware, folder: RunFolder | None, *, show: ShowPhase = unshown
) -> RoundMarker | None:
    """The one who has the judge mark a round's answers; None where there is nobody to ask.

    Args:
        config: The settings.
        hardware: Devices; a reward model takes the one that a policy is on.
        folder: The run's folder, which keeps marks.
        show: Shows how far a download is.
    """
    settings = judge_settings(config, cache=cache_folder(config.reference.cache_dir))
    if settings is None or not config.rounds.count or folder is None:
        return None
    judge = choose_judge(config, hardware, judges=True, may_miss=True, show=show)
    assert judge is not None
    return make_marker(
        judge,
        settings,
        folder.path,
        # Before the first checkpoint there is nothing to resume, and the marks are there.
        go_on=f"resume=auto hydra.run.dir={folder.path} goes on once the judge answers",
        resumed=_resumed_folder(config.resume),
    )


def _resumed_folder(resume: str | None) -> Path | None:
    """The folder of the run that is named to go on from; None for none, or this one's own."""
    if resume is None or resume == "auto":
        return None
    path = Path(resume).expanduser()
    return run_of(path) if path.suffix == ".ckpt" else path


def controlled_groups(config: Config, source: ModelSource) -> PreparedData:
    """The groups of the controlled task, drawn from the reference, which is loaded for it.

    Args:
        config: The settings.
        source: The model.
    """
    task = ControlledTask()
    logps = outcome_logps(task, _load_models(config, source, None), None)
    return controlled_data(config, task, logps)


def controlled_data(
    config: Config, task: ControlledTask, reference_logps: torch.Tensor
) -> PreparedData:
    """The groups of the controlled task.

    Args:
        config: The settings.
        task: The task.
        reference_logps: Log-probabilities of its outcomes under the reference, (8, 4681).
    """
    sizes = config.data.controlled
    # The evaluation rows are the same for every seed, so that seeds can be compared.
    train, evaluation = (sizes.train_groups, config.seed + 1), (sizes.eval_groups, 0)
    if sizes.form == "unpaired":
        sides = [
            task.labelled(count, seed=seed, reference_logps=reference_logps)
            for count, seed in (train, evaluation)
        ]
    else:
        sides = [
            task.groups(count, seed=seed, reference_logps=reference_logps, population=population)
            for (count, seed), population in ((train, sizes.population), (evaluation, False))
        ]
    data = PreparedData(train=sides[0], eval=sides[1])
    data.overfit(config.data.overfit_groups)
    _suit_loss(config, data, max_length=MAX_LENGTH)
    for note in data.notes:
        log.info(note)
    return data


def _suit_loss(config: Config, data: PreparedData, *, max_length: int) -> None:
    """Gives the groups what a loss on single responses needs of all of them."""
    if objective_settings(config.loss).anchor == "mismatched":
        add_mismatched(data, max_length=max_length, batch_size=config.data.batch_size)
    if config.data.density_ratio is not None:
        add_density_weights(data, config.data.density_ratio)
