"""A policy that answers, in memory: its tokenizer, its models, and what draws."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_lightning.data.controlled import MAX_TOKENS, WORDS
from dpo_lightning.data.questions import Question, encode_questions
from dpo_lightning.data.templates import TemplateOptions, check_kwargs, template_facts
from dpo_lightning.data.tokens import Ids
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.backends import checked_answers, find_sampler
from dpo_lightning.evaluation.interpolated import Pair
from dpo_lightning.evaluation.keyed import DrawnFrom, Sampling, answer_limit, draw_keyed
from dpo_lightning.evaluation.sampling import end_ids
from dpo_lightning.memory.hardware import decide_hardware
from dpo_lightning.models.devices import settle_attention
from dpo_lightning.models.loading import max_positions, stated_ends
from dpo_lightning.models.source import set_chat_template
from dpo_lightning.plugins import SampleRequest
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.run.answering.subject import AnsweringPolicy
from dpo_lightning.run.inputs import prefer_cache_without_network
from dpo_lightning.run.interpolate.experiment import precision_of
from dpo_lightning.run.loaded import load_opened
from dpo_lightning.run.prepare import resolve_source, set_threads
from dpo_lightning.tracking.quiet import quiet_transformers
from dpo_lightning.training.devices import take_device

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DrawnAnswer:
    """An answer.

    Attributes:
        text: Its text, without special tokens and the space around it.
        tokens: Tokens that were drawn, with that which ended it.
        cut_off: True if it ended at a limit and not by itself.
    """

    text: str
    tokens: int
    cut_off: bool


class Answerer:
    """Answers prompts by a policy, its reference, or a place on the way between.

    Args:
        subject: The policy.

    Raises:
        UserError: If its model or tokenizer cannot be used.
    """

    def __init__(self, subject: AnsweringPolicy) -> None:
        config = subject.config
        quiet_transformers()
        take_device(config.trainer.accelerator, config.trainer.devices)
        self._subject = subject
        self._hardware = decide_hardware(
            config.trainer, half_weights=config.model.dtype == "bfloat16"
        )
        settle_attention(self._hardware.beside)
        prefer_cache_without_network(config)
        self._source = resolve_source(config, self._hardware)
        set_threads(config, self._source)
        self.tokenizer: Any = self._source.tokenizer
        self._pair: Pair | None = None

    @property
    def has_template(self) -> bool:
        """True if there is a chat template that strings could go through."""
        data = self._subject.config.data
        return bool(self.tokenizer.chat_template) or data.chat_template is not None

    def encode(self, questions: Sequence[Question]) -> list[Ids]:
        """Token ids of prompts, each of which leaves room for an answer.

        Raises:
            UserError: If the template does not take one, or it is too long for the model.
        """
        if self._subject.speaks_of_weather:
            for question in questions:
                _check_words(question)
        prompts = encode_questions(questions, self.tokenizer, self._template_options(questions))
        positions, size = self._positions, self._source.config.get_text_config().vocab_size
        for question, ids in zip(questions, prompts, strict=True):
            if positions is not None and len(ids) >= positions:
                raise UserError(
                    f"{question.place}: the prompt has {len(ids):,} tokens, and the model's "
                    f"{positions:,} positions leave no room for an answer; shorten it"
                )
            if ids.max() >= size:
                token = self.tokenizer.convert_ids_to_tokens(int(ids.max()))
                raise UserError(
                    f"{question.place}: the model has no embedding of the token {token}; name the "
                    "tokenizer that belongs to it with model.tokenizer="
                )
        return prompts

    def _template_options(self, questions: Sequence[Question]) -> TemplateOptions:
        """Gives the tokenizer its chat template, and says what that is told."""
        data = self._subject.config.data
        needed = any(not question.is_text for question in questions)
        note = set_chat_template(self.tokenizer, data.chat_template, needed=needed)
        if note is not None:
            log.info(note)
        if not needed:
            return TemplateOptions()
        facts = template_facts(self.tokenizer.chat_template)
        check_kwargs(data.chat_template_kwargs, facts, key="data.chat_template_kwargs")
        return TemplateOptions(
            kwargs=dict(data.chat_template_kwargs),
            date=data.template_date,
            ignored=frozenset(data.ignore_fields),
        )

    @property
    def _positions(self) -> int | None:
        return max_positions(self._source.config)

    def bounded(self, sampling: Sampling) -> Sampling:
        """The settings of draws, within what the embedded task allows."""
        if not self._subject.speaks_of_weather:
            return sampling
        longest = min(sampling.max_new_tokens, MAX_TOKENS)
        return Sampling(sampling.temperature, sampling.top_p, longest, sampling.seed)

    def answer(
        self,
        prompts: Sequence[Ids],
        sampling: Sampling,
        *,
        lam: float,
        show: ShowPhase = unshown,
    ) -> list[DrawnAnswer]:
        """Answers prompts.

        Args:
            prompts: Token ids of each.
            sampling: How they are drawn.
            lam: Place of what answers: 0 is the reference, 1 the policy.
            show: Shows how far it is.

        Raises:
            UserError: If another backend than transformers fails.
        """
        sampling = self.bounded(sampling)
        if not self._subject.backend.is_own:
            return self._by_backend(prompts, sampling)
        pair = self._models(show)
        ends = end_ids(pair.policy, self.tokenizer)
        drawn = draw_keyed(
            DrawnFrom(pair, lam),
            prompts,
            sampling,
            ends=ends,
            pad=self.tokenizer.eos_token_id,
            positions=self._positions,
            batch_size=self._subject.config.evaluation.batch_size,
            precision=precision_of(self._hardware),
            show=show,
        )
        return [self._answer(ids, ends) for ids in drawn]

    def _answer(self, ids: Ids, ends: Sequence[int]) -> DrawnAnswer:
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()
        return DrawnAnswer(text, len(ids), int(ids[-1]) not in ends)

    def _models(self, show: ShowPhase = unshown) -> Pair:
        """Policy and reference on the device, loaded when they are first asked."""
        if self._pair is None:
            subject, device = self._subject, self._hardware.beside
            models = load_opened(
                subject.opened,
                subject.config,
                self._source,
                kind="auto",
                needed=subject.needs_reference,
                show=show,
            )
            is_placed = self._source.quantization is not None
            policy = models.policy if is_placed else models.policy.to(device)
            policy.requires_grad_(False).eval()
            reference = policy
            if subject.needs_reference:
                reference = models.make_reference().to(device)
            self._pair = Pair(policy, reference, models.scorer)
        return self._pair

    # Another backend ----------------------------------------------------------------------------

    def _by_backend(self, prompts: Sequence[Ids], sampling: Sampling) -> list[DrawnAnswer]:
        backend, opened = self._subject.backend, self._subject.opened
        ends = _ends(self._source.source, self._source.config, self.tokenizer)
        limits = [answer_limit(ids, sampling, self._positions) for ids in prompts]
        with contextlib.ExitStack() as stack:

            def model() -> Any:
                pair = self._models()
                return stack.enter_context(pair.scorer.plain(pair.policy))

            request = SampleRequest(
                prompts=[ids.tolist() for ids in prompts],
                limits=limits,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                ends=ends,
                who="policy",
                tokenizer=self.tokenizer,
                model=model,
                weights=lambda: (opened.weights or self._source.source, opened.adapter),
                options=dict(backend.options or {}),
            )
            drawn = checked_answers(backend, find_sampler(backend), request)
        return [self._answer(ids, ends) for ids in drawn]


@contextlib.contextmanager
def answering(subject: AnsweringPolicy) -> Iterator[Answerer]:
    """A policy that answers, whose memory is free again behind the context."""
    try:
        yield Answerer(subject)
    except torch.OutOfMemoryError as error:
        from dpo_lightning.errors import OutOfMemoryError

        raise OutOfMemoryError(
            "not enough memory on the device: lower evaluation.batch_size= or "
            "--max-new-tokens, or compute on a CPU with trainer.accelerator=cpu"
        ) from error
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _check_words(question: Question) -> None:
    text = question.group.prompt
    words = text.split() if isinstance(text, str) else []
    unknown = [word for word in words if word not in WORDS]
    if unknown or not words:
        said = unknown[0] if unknown else "no word" if isinstance(text, str) else "messages"
        raise UserError(
            f"{question.place}: {said[:40]}: the bundled model speaks of the embedded task alone, "
            f"whose words are {', '.join(WORDS)}; ask it such as 'sun snow'"
        )


def _ends(source: str, config: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, of a model that is not loaded here."""
    found = {tokenizer.eos_token_id, *stated_ends(source)}
    stated = config.get_text_config().eos_token_id
    found |= set(stated) if isinstance(stated, list) else {stated}
    return sorted(found - {None})
