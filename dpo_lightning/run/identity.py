"""Identity of a run: hashes of the inputs that decide its numbers; a resume compares them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import transformers

from dpo_lightning.data.source_names import eval_sets
from dpo_lightning.errors import (
    UserError,
)
from dpo_lightning.settings.fingerprint import hashed_settings
from dpo_lightning.settings.judging import judge_label
from dpo_lightning.settings.loss_group import own_loss_settings
from dpo_lightning.settings.messages import shown
from dpo_lightning.settings.optimizer_group import optimizer_options
from dpo_lightning.settings.rounds import round_settings
from dpo_lightning.settings.schema import Config
from dpo_lightning.training.checkpoints.files import changed_settings

log = logging.getLogger(__name__)

# Entries that are hashes, and the material that they are of.
_HASHED = {"data": "rows", "model": "model weights"}


def reference_facts(
    *, weights: str, config: str, dtype: str, precision: str, device: str, kernel: str
) -> dict[str, str]:
    """Facts that a reference's log-probabilities depend on, beside the token ids.

    Args:
        weights: Hash of its weights.
        config: Hash of what its config says of its numbers.
        dtype: In which they are loaded.
        precision: In which it is computed.
        device: From :func:`device_facts`.
        kernel: How a micro-batch is scored.
    """
    return {
        "weights": weights,
        "config": config,
        "dtype": dtype,
        "precision": precision,
        "device": device,
        "kernel": kernel,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def device_facts(device: torch.device, *, threads: int) -> str:
    """The kind of a device, with what its last bits depend on.

    Args:
        device: The device.
        threads: CPU threads of one operation.
    """
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}, {threads} threads"
    return device.type


def allowed_changes(
    saved: dict[str, Any], identity: dict[str, Any], *, may_change: bool
) -> dict[str, Any]:
    """Returns the allowed differences between a checkpoint's experiment and this one.

    Raises:
        UserError: Where one is not, naming all that differs.
    """
    changed = changed_settings(saved, identity)
    if changed and not may_change:
        before = " ".join(_words(key, values["from"]) for key, values in changed.items())
        now = " ".join(_words(key, values["to"]) for key, values in changed.items())
        others = [f"other {_HASHED[key]}" for key in changed if key in _HASHED]
        said = f" ({' and '.join(others)} than it saw)" if others else ""
        raise UserError(
            f"resume: the checkpoint was made with {before}, this run has {now}{said}; resume with "
            "the same, start a new run, or say resume_changed=true"
        )
    for key, values in changed.items():
        if key in _HASHED:
            log.info("resume: other %s than the checkpoint saw", _HASHED[key])
        else:
            log.info("resume: %s was %s and is now %s", key, values["from"], values["to"])
    return changed


def _words(key: str, value: Any) -> str:
    """A setting as it is typed; of a hash the beginning, which tells two apart."""
    return f"{key}={shown(value)[:8]}…" if key in _HASHED else f"{key}={shown(value)}"


def config_hash(resolved: dict[str, Any], hashes: dict[str, str]) -> str:
    """A hash of what decides a run's numbers, with those of its data and weights."""
    text = json.dumps([hashed_settings(resolved), hashes], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def identity_of(
    config: Config,
    hashes: dict[str, str],
    *,
    numbers: Mapping[str, Any],
    round_steps: int | None = None,
) -> dict[str, Any]:
    """Settings and hashes that a checkpoint to resume from must agree with.

    Args:
        config: The settings.
        hashes: Of data, weights and the reference.
        numbers: Entries of the model's config that decide its numbers.
        round_steps: Steps of a round; None where there are no rounds.
    """
    rounds = round_settings(config)
    # More rounds behind those that there were change none of them.
    facts = {} if rounds is None else asdict(config.rounds) | {"steps": round_steps}
    facts.pop("count", None)
    peft = asdict(config.peft)
    # Of a stored adapter the content counts, which is in the hash of the weights.
    for name in ("adapter", "revision", "merge"):
        del peft[name]
    return {
        "beta": config.beta,
        **{f"loss.{k}": v for k, v in own_loss_settings(asdict(config.loss)).items()},
        "reference.kind": config.reference.kind,
        **_movement(config),
        **{f"peft.{name}": value for name, value in peft.items()},
        "seed": config.seed,
        "data.batch_size": config.data.batch_size,
        "optimizer.name": config.optimizer.name,
        **{f"optimizer.{k}": v for k, v in optimizer_options(config.optimizer).items()},
        "data": hashes["data"],
        "model": hashes["weights"],
        **{f"config.json.{name}": value for name, value in numbers.items()},
        "reference": hashes["reference"],
        "reference.config": hashes["reference_config"],
        **{f"rounds.{name}": value for name, value in facts.items()},
    }


def _movement(config: Config) -> dict[str, Any]:
    """Settings of a reference that moves; null for one that does not, whatever else is set."""
    every, alpha = config.reference.sync_every, config.reference.sync_alpha
    return {
        "reference.sync_every": every,
        "reference.sync_alpha": None if every is None else alpha,
    }


def basis_of(config: Config, *, held_out: str) -> dict[str, Any]:
    """Model, reference, rows and judge of a run, by which a report knows what it may compare.

    Args:
        config: The settings.
        held_out: Digest of the held-out groups.
    """
    model, reference, data = config.model, config.reference, config.data
    # Other sets than the first one rank nothing.
    ranking = next(iter(eval_sets(data.eval).values()), None)
    return {
        "model": [model.pretrained or model.config, model.revision],
        "reference": [reference.pretrained, reference.revision, reference.adapter],
        "data.train": data.train and [data.train, data.train_split, data.subset, data.revision],
        "data.eval": data.train and [ranking, data.eval_split],
        "held_out": held_out,
        "judge": judge_label(config.evaluation),
    }
