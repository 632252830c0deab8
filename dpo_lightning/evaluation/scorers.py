"""Reward models as judges of answers."""

from __future__ import annotations

from typing import Any

import torch

from dpo_lightning.data.limits import OutOfBounds, bounded
from dpo_lightning.data.templates import render_chat
from dpo_lightning.errors import UserError
from dpo_lightning.models.loading import (
    check_reward_model,
    load_reward_model,
    load_tokenizer,
    max_positions,
)
from dpo_lightning.plugins import Prompt


class RewardModel:
    """A sequence-classification model with one output, which is the score.

    Args:
        source: A folder or a hub id.
        device: Device that it runs on.
        batch_size: Number of answers that it reads at once.
    """

    def __init__(self, source: str, *, device: torch.device, batch_size: int) -> None:
        self._source = source
        self._device = device
        self._batch_size = batch_size
        # What is wrong with it is better known before the training than behind it.
        self._config = check_reward_model(source, key="evaluation.judge")
        self._tokenizer = load_tokenizer(source, key="evaluation.judge", needs_eos=False)

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt], answers: list[str]) -> list[float]:
        """The score of each answer; the model is in memory only for as long."""
        model = load_reward_model(self._source, self._config, key="evaluation.judge")
        model.to(self._device).eval()
        texts = [self._text(p, a) for p, a in zip(prompts, answers, strict=True)]
        ids = [self._tokenizer(t, add_special_tokens=special)["input_ids"] for t, special in texts]
        limit = max_positions(self._config) or max(map(len, ids))
        # Of what is too long the end, which holds the answer, counts.
        ids = [i[-limit:] for i in ids]
        if model.config.pad_token_id is None:
            # The model looks for the last token that is none of these: any unused one will do.
            used = {token for i in ids for token in i}
            model.config.pad_token_id = next(n for n in range(len(used) + 1) if n not in used)
        scores = [0.0] * len(ids)
        # Answers of like lengths together: little padding.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            width = max(len(ids[i]) for i in part)
            batch = torch.full((len(part), width), model.config.pad_token_id, dtype=torch.int64)
            mask = torch.zeros_like(batch)
            for row, i in enumerate(part):
                batch[row, : len(ids[i])] = torch.tensor(ids[i])
                mask[row, : len(ids[i])] = 1
            logits = model(
                input_ids=batch.to(self._device), attention_mask=mask.to(self._device)
            ).logits
            for i, value in zip(part, logits[:, 0].float().tolist(), strict=True):
                scores[i] = value
        return scores

    def _text(self, prompt: Prompt, answer: str) -> tuple[str, bool]:
        """Prompt and answer as the model was taught to read them, and whether to add BOS."""
        if self._tokenizer.chat_template:
            messages: list[Any] = (
                [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            )
            messages.append({"role": "assistant", "content": answer.strip()})
            try:
                with bounded():
                    text = render_chat(self._tokenizer, messages)
            except OutOfBounds as error:
                raise UserError(
                    f"evaluation.judge={self._source}: its chat template took {error} for one "
                    "answer, so it was stopped; name another reward model"
                ) from error
            return text, False
        if isinstance(prompt, str):
            return prompt + answer, True
        turns = [f"{m['role'].capitalize()}: {m['content']}" for m in prompt]
        return "\n\n".join([*turns, f"Assistant: {answer.strip()}"]), True
