"""Training steps of KTO against TRL 1.16's own trainer: the same batches, losses and KL terms."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_lightning.data.tokens import Mismatched, TokenGroup
from dpo_lightning.objectives.objective import ObjectiveSettings
from tests.support.models import byte_tokenizer, make_model
from tests.support.steps import in_turn, plain_logps, single, take_steps

BETA, RATE, SIZE, STEPS = 0.3, 3e-3, 4, 3
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.75}


def policy_and_reference() -> tuple[Any, Any]:
    """Two models, so that the KL term is not that of equal ones."""
    policy, reference = make_model("llama"), make_model("llama")
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return policy, reference


def groups() -> list[TokenGroup]:
    """Three steps of four rows; each has the response of the one before it in its step."""
    rows = [single(number, desirable=number % 3 != 1) for number in range(STEPS * SIZE)]
    found = []
    for number, own in enumerate(rows):
        step = number // SIZE * SIZE
        other = rows[step + (number - step - 1) % SIZE]
        found.append(replace(own, mismatched=Mismatched(other.responses[0])))
    return found


def with_reference(rows: Sequence[TokenGroup], model: Any) -> list[TokenGroup]:
    """The rows with what the reference gives their responses and their mismatched ones."""
    found = []
    for own in rows:
        both = replace(own, responses=(own.responses[0], own.mismatched.ids))
        with torch.no_grad():
            logps = torch.stack(plain_logps(model, both))
        found.append(
            replace(
                own,
                reference_logps=logps[:1].numpy(),
                mismatched=replace(own.mismatched, reference_logp=logps[1].item()),
            )
        )
    return found


def of_trl(folder: Path, rows: Sequence[TokenGroup], kind: str) -> tuple[list[float], list[float]]:
    """Losses and KL terms of the steps, by ``KTOTrainer`` itself."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    policy, reference = policy_and_reference()
    text = {"prompt": ["a", "b"] * SIZE, "completion": ["c", "d"] * SIZE}
    losses: list[float] = []
    kl: list[float] = []

    class Watched(KTOTrainer):
        def compute_loss(self, *positional: Any, **named: Any) -> Any:
            loss = super().compute_loss(*positional, **named)
            losses.append(loss.item())
            kl.append(self._metrics["train"]["kl"][-1])
            return loss

    trainer = Watched(
        model=policy,
        ref_model=reference,
        args=KTOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=SIZE,
            max_steps=STEPS,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            beta=BETA,
            loss_type=kind,
            **WEIGHTS,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_dict(text | {"label": [True, False] * SIZE}),
        processing_class=byte_tokenizer(),
    )
    # The rows as token ids, in their order, each with its mismatched response.
    trainer.train_dataset = Dataset.from_list(
        [
            {
                "prompt_ids": own.prompt.tolist(),
                "completion_ids": own.responses[0].tolist(),
                "KL_completion_ids": own.mismatched.ids.tolist(),
                "label": own.label,
            }
            for own in rows
        ]
    )
    trainer.train()
    return losses, kl


@pytest.mark.slow  # imports TRL's trainer, accelerate and datasets
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_three_steps_of_trls_trainer(tmp_path, kind: str):
    """To 1e-5, the KL term included; the weights have moved in between."""
    rows = groups()
    theirs, kl = of_trl(tmp_path / "trl", rows, kind)
    policy, reference = policy_and_reference()
    taken = take_steps(
        tmp_path / "ours",
        in_turn(*with_reference(rows, reference)),
        model=policy,
        objective=ObjectiveSettings(terms={kind: 1.0}, options=WEIGHTS),
        beta=BETA,
        lr=RATE,
        steps=STEPS,
        batch_size=SIZE,
    )
    assert len(theirs) == STEPS
    assert taken.values("train/loss") == pytest.approx(theirs, rel=1e-5)
    assert len({round(loss, 4) for loss in theirs}) == STEPS
    if kind == "kto":
        assert taken.values("train/kto/z0") == pytest.approx(kl, rel=1e-4)
        # A mean below 0 counts as 0.
        assert kl[0] == 0 < 0.2 < kl[1] < kl[2]
