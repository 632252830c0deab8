"""What a session works on, made ready before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.data.splits import PreparedData
from dpo_lightning.evaluation.answers import Score
from dpo_lightning.memory.footprint import ModelShape
from dpo_lightning.models.source import Models, ModelSource
from dpo_lightning.training.ranks import Ranks
from dpo_lightning.training.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a session works on.

    Attributes:
        source: The model, its tokenizer and limits.
        shape: The policy's shape, as far as its memory goes.
        models: Policy, reference and scorer.
        data: The groups.
        schedule: The steps.
        identity: What a checkpoint to resume from must agree with.
        task: The controlled task, if that is trained on.
        reference_outcome_logps: Log-probabilities of its outcomes under the reference, (8, 4681).
        score: Judges answers, if the settings name a scorer.
        cache_dir: Where reference log-probabilities are kept.
        ranks: The processes that share the models' weights; None where each has its own.
    """

    source: ModelSource
    shape: ModelShape
    models: Models
    data: PreparedData
    schedule: Schedule
    identity: dict[str, Any]
    task: ControlledTask | None
    reference_outcome_logps: Tensor | None
    score: Score | None
    cache_dir: Path
    ranks: Ranks | None = None
