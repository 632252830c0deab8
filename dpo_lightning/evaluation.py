"""Sample answers of the policy and the reference, before and after training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from transformers import GenerationConfig

from dpo_lightning.data.tokens import Ids, TokenGroup
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.reference import LiveReference

COLUMNS = ("prompt", "preferred", "reference", "before", "after")


@torch.no_grad()
def generate_answers(
    model: Any,
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Answers prompts by greedy decoding, in one batch.

    Args:
        model: A transformers causal language model.
        scorer: The scorer that prepared it.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt, shapes (P,).
        max_new_tokens: Longest answer, in tokens.

    Returns:
        The text of each answer.
    """
    width = max(map(len, prompts))
    eos = tokenizer.eos_token_id
    # Behind the attention mask any id will do; a model without a pad token has this one.
    ids = torch.full((len(prompts), width), eos, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    own_eos = model.generation_config.eos_token_id
    ends = {eos, *(own_eos if isinstance(own_eos, list) else [own_eos])} - {None}
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=eos,
        bos_token_id=tokenizer.bos_token_id,
    )
    with scorer.plain(model):
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
        )
    answers: list[str] = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def choose_prompts(
    groups: Sequence[TokenGroup], *, count: int, max_tokens: int
) -> list[TokenGroup]:
    """The first groups with different prompts that leave room for an answer."""
    chosen: dict[str, TokenGroup] = {}
    for group in groups:
        if len(chosen) == count:
            break
        if len(group.prompt) < max_tokens:
            chosen.setdefault(group.prompt_key, group)
    return list(chosen.values())


class SampleAnswers(Callback):
    """Collects answers at both ends of the training, on rank 0.

    Args:
        groups: Whose prompts are answered.
        tokenizer: The policy's tokenizer.
        max_new_tokens: Longest answer, in tokens.
        max_positions: Longest sequence of the model, or None.

    Attributes:
        rows: One row per prompt, in the order of ``COLUMNS``.
    """

    def __init__(
        self,
        groups: Sequence[TokenGroup],
        tokenizer: Any,
        *,
        max_new_tokens: int,
        max_positions: int | None,
    ) -> None:
        self._groups = groups
        self._tokenizer = tokenizer
        longest = max((len(group.prompt) for group in groups), default=0)
        room = math.inf if max_positions is None else max_positions - longest
        self._max_new_tokens = int(min(max_new_tokens, room))
        self._before: list[str] = []
        self._reference: list[str] = []
        self.rows: list[tuple[str, ...]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The first answers, of the reference and of the policy as it starts."""
        if not trainer.is_global_zero or not self._groups:
            return
        self._before = self._answers(pl_module, pl_module.policy)
        if isinstance(pl_module.reference, LiveReference):
            same = pl_module.starts_from_reference and trainer.global_step == 0
            self._reference = (
                self._before if same else self._answers(pl_module, pl_module.reference.model)
            )
        else:
            self._reference = [""] * len(self._groups)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The same prompts again, and the table of all."""
        if not trainer.is_global_zero or not self._groups:
            return
        after = self._answers(pl_module, pl_module.policy)
        prompts = [self._text(group.prompt) for group in self._groups]
        preferred = [self._text(group.responses[0]) for group in self._groups]
        self.rows = list(zip(prompts, preferred, self._reference, self._before, after, strict=True))

    def _answers(self, module: Any, model: Any) -> list[str]:
        return generate_answers(
            model,
            module.scorer,
            self._tokenizer,
            [group.prompt for group in self._groups],
            max_new_tokens=self._max_new_tokens,
        )

    def _text(self, ids: Ids) -> str:
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text.strip()
