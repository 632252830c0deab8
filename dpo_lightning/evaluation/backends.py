"""Answers drawn by another engine than transformers: vLLM, a server, a plugin's sampler.

An engine gives token ids and nothing else: log-probabilities are computed here, whoever drew.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_lightning.data.tokens import Ids
from dpo_lightning.errors import UserError
from dpo_lightning.plugins import SAMPLERS, Sampler, SampleRequest
from dpo_lightning.settings.generation import Backend

WeightFiles = tuple[str, str | None]
"""Folder or hub id of weights, and of an adapter on top of them or None."""


def find_sampler(backend: Backend) -> Sampler:
    """The function that draws for a backend; of ``hf`` there is none.

    Args:
        backend: Who draws.

    Raises:
        UserError: If no plugin registered one of its name.
    """
    if backend.name == "vllm":
        from dpo_lightning.evaluation.vllm_engine import sample

        return sample
    if backend.is_server:
        from dpo_lightning.evaluation.completions import CompletionServer

        return CompletionServer(backend)
    if backend.name not in SAMPLERS:
        known = ", ".join(sorted(SAMPLERS)) or "none"
        raise UserError(
            f"generation.backend={backend.name}: no plugin registers it (registered: {known}); "
            "name the module that does with plugins=[<module>]"
        )
    return SAMPLERS[backend.name]


def checked_answers(backend: Backend, sampler: Sampler, request: SampleRequest) -> list[Ids]:
    """Answers of a sampler, cut behind the first token that ends one and at their limits.

    Args:
        backend: Whose it is, for messages.
        sampler: The function.
        request: What is asked.

    Raises:
        UserError: If it fails, or gives something else.
    """
    key = f"generation.backend={backend.name}"
    try:
        found = [[int(token) for token in answer] for answer in sampler(request)]
    except UserError:
        raise
    except Exception as error:  # an engine's, or the user's own code
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{key}: {type(error).__name__}: {said}") from error
    if len(found) != len(request.prompts):
        raise UserError(f"{key}: {len(found)} answers to {len(request.prompts)} prompts")
    size = len(request.tokenizer)
    answers = []
    for ids, limit in zip(found, request.limits, strict=True):
        if not ids or min(ids) < 0 or max(ids) >= size:
            raise UserError(
                f"{key}: an answer has the token ids {ids[:8]}; it needs at least one, each "
                f"from 0 to {size - 1} (an empty answer is the EOS token alone)"
            )
        end = next((n for n, token in enumerate(ids, 1) if token in request.ends), len(ids))
        answers.append(np.asarray(ids[: min(end, limit)], dtype=np.int32))
    return answers


@dataclass(frozen=True, slots=True)
class BackendDrawer:
    """Draws a run's answers by a backend.

    Attributes:
        backend: Who draws.
        tokenizer: The policy's.
        files: Weights of policy or reference, as they are now, for as long as they are needed.
        plain: Context in which a model generates as transformers made it.
    """

    backend: Backend
    tokenizer: Any
    files: Callable[[str, Any], contextlib.AbstractContextManager[WeightFiles]]
    plain: Callable[[Any], contextlib.AbstractContextManager[Any]]

    def draws(self, who: str) -> bool:
        """True for those that it answers for: a server has loaded the policy alone."""
        return who == "policy" or not self.backend.is_server

    @property
    def starts_each_time(self) -> bool:
        """True where each request starts an engine: few large ones are better than many."""
        return self.backend.name == "vllm"

    def answers(
        self,
        who: str,
        model: Any,
        prompts: Sequence[Ids],
        *,
        ends: Sequence[int],
        max_new_tokens: int,
        seed: int,
    ) -> list[Ids]:
        """Answers at temperature 1, nothing cut off.

        Args:
            who: ``policy`` or ``reference``.
            model: That model.
            prompts: Token ids of each prompt.
            ends: Tokens that end an answer.
            max_new_tokens: Longest answer.
            seed: Of all draws; the same prompt is drawn for anew each time it is there.
        """
        return self.asked(
            who, model, prompts, ends=ends, limits=[max_new_tokens] * len(prompts), seed=seed
        )

    def asked(
        self,
        who: str,
        model: Any,
        prompts: Sequence[Ids],
        *,
        ends: Sequence[int],
        limits: Sequence[int],
        seed: int,
        temperature: float = 1.0,
        seeds: Sequence[int] | None = None,
    ) -> list[Ids]:
        """Answers to prompts, each with its limit, nothing cut off.

        Args:
            who: ``policy`` or ``reference``.
            model: That model.
            prompts: Token ids of each prompt.
            ends: Tokens that end an answer.
            limits: Tokens of the longest answer to each.
            seed: Of all draws.
            temperature: Of the next-token distribution.
            seeds: One for each prompt, for backends that take them; None: those of ``seed``.

        Raises:
            UserError: If the backend fails, or gives something else.
        """
        with contextlib.ExitStack() as stack:
            request = SampleRequest(
                prompts=[ids.tolist() for ids in prompts],
                limits=[*limits],
                temperature=temperature,
                top_p=1.0,
                seed=seed,
                ends=list(ends),
                who=who,
                tokenizer=self.tokenizer,
                model=lambda: stack.enter_context(self.plain(model)),
                weights=lambda: stack.enter_context(self.files(who, model)),
                options=dict(self.backend.options or {}),
                seeds=seeds,
            )
            return checked_answers(self.backend, find_sampler(self.backend), request)


@contextlib.contextmanager
def written_weights(
    model: Any, tokenizer: Any, *, adapters: Any, base: str
) -> Iterator[WeightFiles]:
    """Weights of a model in memory, in a folder that lasts as long as the context.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        adapters: What is trained beside frozen weights, if only that is to be written.
        base: Folder or hub id of those frozen weights.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-lightning-weights-") as name:
        if adapters is not None:
            adapters.save(Path(name), base=base, revision=None)
            yield base, name
            return
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        yield name, None
