"""Training steps of the module itself: a small model, groups of token ids, one Trainer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.evaluations import HeldOut
from dpo_lightning.data.packing import epoch_order
from dpo_lightning.data.tokens import Mismatched, TokenGroup
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.objectives.betas import BetaPlan
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.reference.kinds import CachedReference
from dpo_lightning.tracking.loggers import JsonlLogger
from dpo_lightning.training.loss_scale import Float16Precision
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.optimizers import OptimizerSettings
from dpo_lightning.training.step_settings import StepSettings
from tests.support.models import make_model

SEED = 1
PLAIN = ObjectiveSettings(terms={"sigmoid": 1.0})


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def plain_logps(model: Any, group: TokenGroup) -> list[torch.Tensor]:
    """Log-probability of each response, by the model's own forward pass and nothing shared."""
    found = []
    for response in group.responses:
        row = torch.tensor(np.concatenate([group.prompt, response])[None].astype(np.int64))
        logps = model(input_ids=row).logits[0, len(group.prompt) - 1 : -1].float().log_softmax(-1)
        found.append(logps.gather(1, row[0, len(group.prompt) :, None]).sum())
    return found


def with_logratios(model: Any, group: TokenGroup, *logratios: float) -> TokenGroup:
    """The group with a reference by which the model's log-ratios are the given ones."""
    with torch.no_grad():
        own = [logp.item() for logp in plain_logps(model, group)]
    values = [logp - ratio for logp, ratio in zip(own, logratios, strict=True)]
    return replace(group, reference_logps=np.array(values, dtype=np.float32))


def pair(number: int, **changes: Any) -> TokenGroup:
    """A pair of different ids for each number, of unequal lengths."""
    draw = np.random.default_rng(number)
    responses = tuple(ids(*draw.integers(3, 97, size).tolist()) for size in (2, 4))
    group = TokenGroup(
        ids(*draw.integers(3, 97, 3).tolist()), responses, (1, 2), 1.0, f"rows:{number}", "key"
    )
    return replace(group, **changes)


def single(number: int, *, desirable: bool, **changes: Any) -> TokenGroup:
    """One response with a label, of other ids and another length for each number."""
    group = pair(number)
    response = group.responses[number % 2]
    return replace(group, responses=(response,), ranks=(1,), label=desirable, **changes)


def with_mismatched(model: Any, group: TokenGroup, response: np.ndarray, ratio: float) -> Any:
    """The group with a mismatched response of which the model's log-ratio is the given one."""
    alone = replace(group, responses=(response,), ranks=(1,))
    with torch.no_grad():
        [own] = [logp.item() for logp in plain_logps(model, alone)]
    return replace(group, mismatched=Mismatched(response, own - ratio))


def in_turn(*groups: TokenGroup) -> list[TokenGroup]:
    """The groups in such places that the first epoch meets them in the given order."""
    placed: list[Any] = [None] * len(groups)
    for group, place in zip(groups, epoch_order(len(groups), seed=SEED, epoch=0), strict=True):
        placed[place] = group
    return placed


@dataclass
class Taken:
    """Results of some training steps."""

    folder: Path
    trainer: pl.Trainer
    module: DPOModule

    @property
    def rows(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.module.policy.named_parameters()}

    @property
    def moments(self) -> dict[str, list[torch.Tensor]]:
        """Moments of the optimizer, as in a checkpoint: each kind in the order of its weights."""
        states = self.trainer.optimizers[0].state_dict()["state"]
        return {
            kind: [states[number][kind] for number in sorted(states)]
            for kind in ("exp_avg", "exp_avg_sq")
        }


def take_steps(
    folder: Path,
    groups: Sequence[TokenGroup],
    *,
    model: Any = None,
    reference: Any = None,
    eval_groups: Sequence[TokenGroup] = (),
    eval_every: int | None = None,
    held_out: HeldOut | None = None,
    steps: int = 1,
    batch_size: int = 1,
    micro_batch_tokens: int = 1000,
    ranks: int = 1,
    equal_counts: bool = False,
    strategy: Any = None,
    beta: float = 0.1,
    objective: ObjectiveSettings = PLAIN,
    plan: dict[str, Any] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    scaled: Float16Precision | None = None,
    checkpoint: Path | None = None,
    **settings: Any,
) -> Taken:
    """Trains on groups that bring their reference along, in the order of the seed.

    Args:
        folder: Folder for metrics.jsonl.
        groups: Training groups.
        model: The policy; a small Llama where none is given.
        reference: The reference; None: the groups bring theirs along.
        eval_groups: Evaluation groups.
        eval_every: Steps between two evaluations; None: none but one at the end.
        held_out: Sets of the evaluation groups and their sample; None: one set, seen whole.
        steps: Of the run.
        batch_size: Groups of a step.
        micro_batch_tokens: Most tokens of a micro-batch.
        ranks: Processes that share each step; this is one of them (see :func:`on_ranks`).
        equal_counts: True if all ranks take as many micro-batches.
        strategy: Lightning's; None: DDP on several ranks.
        beta: Of the first step.
        objective: What is minimised.
        plan: Further arguments of the plan of betas.
        callbacks: Lightning's.
        scaled: Plugin of a run in float16; None computes in float32.
        checkpoint: What to go on from.
        **settings: Further arguments of the module, its optimizer and its steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model("llama") if model is None else model
    scorer = Scorer("flat")
    scorer.prepare(model)
    values: dict[str, Any] = {
        **{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        **{"max_grad_norm": None, "schedule": "constant", "warmup_steps": 0},
        **{"log_every_n_steps": 1, "starts_from_reference": False},
        **settings,
    }

    def own(kind: Any) -> dict[str, Any]:
        return {item.name: values.pop(item.name) for item in fields(kind) if item.name in values}

    if "optimizer" in values:
        values["name"] = values.pop("optimizer")
    module = DPOModule(
        policy=model,
        reference=reference or CachedReference(rows=len(groups), computed=0),
        scorer=scorer,
        objective=objective,
        beta_plan=BetaPlan(start=beta, total_steps=steps, **(plan or {})),
        optimizer=OptimizerSettings(**own(OptimizerSettings)),
        steps=StepSettings(total_steps=steps, **own(StepSettings)),
        **values,
    )
    datamodule = PreferenceDataModule(
        train_groups=groups,
        eval_groups=eval_groups,
        batch_size=batch_size,
        micro_batch_tokens=micro_batch_tokens,
        total_steps=steps,
        seed=SEED,
        shared=True,
        num_workers=0,
        equal_counts=equal_counts,
        held_out=held_out,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy or ("ddp" if ranks > 1 else "auto"),
        max_steps=steps,
        max_epochs=-1,
        logger=[JsonlLogger(folder)],
        callbacks=[*callbacks],
        log_every_n_steps=1,
        val_check_interval=eval_every or steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
        default_root_dir=folder,
    )
    if scaled is not None:
        trainer.strategy.precision_plugin = scaled
    trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    return Taken(folder, trainer, module)
