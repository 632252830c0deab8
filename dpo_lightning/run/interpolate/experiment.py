"""The frontier of one policy, from its run's settings: models, prompts, answers, points."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from dpo_lightning.data.controlled import MAX_TOKENS, PROMPTS, ControlledTask, word_values
from dpo_lightning.data.rows import prompt_of_key
from dpo_lightning.data.tokens import Ids
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.answers import choose_prompts
from dpo_lightning.evaluation.interpolated import Pair, draw_mixed, score_mixed
from dpo_lightning.evaluation.one_policy import (
    LAMBDAS,
    MOST_PROMPTS,
    Axis,
    Drawn,
    ExactGains,
    Mixture,
    decoded_point,
    gather,
    plan_mixtures,
    weighted_point,
)
from dpo_lightning.evaluation.sampling import Precision, answer_prompts, end_ids
from dpo_lightning.memory.hardware import Hardware, decide_hardware
from dpo_lightning.models.adapter_files import read_adapter
from dpo_lightning.models.loading import load_config, load_model, max_positions
from dpo_lightning.models.source import ModelSource
from dpo_lightning.objectives.betas import BetaPlan
from dpo_lightning.objectives.optimum import why_no_beta
from dpo_lightning.plugins import Prompt
from dpo_lightning.reference.pair import Models, ReferenceSettings, load_models
from dpo_lightning.run.inputs import prefer_cache_without_network, read_sources
from dpo_lightning.run.plan import cache_folder
from dpo_lightning.run.prepare import (
    adapter_settings,
    make_score,
    prepare_groups,
    resolve_source,
    set_threads,
)
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.schema import Config

# Answers of each mixture that are kept to be read.
_KEPT = 4


@dataclass(frozen=True, slots=True)
class _Questions:
    """Prompts, and how answers to them are marked.

    Attributes:
        ids: Token ids of each.
        texts: As their rows have them.
        task: The controlled task, if they are its own.
        score: The judge, of rows.
    """

    ids: Sequence[Ids]
    texts: Sequence[Prompt]
    task: ControlledTask | None
    score: Callable[[list[Prompt], list[str]], list[float]] | None

    def judge(
        self, text: Callable[[Ids], str], owners: Sequence[int]
    ) -> Callable[[Sequence[Ids]], Sequence[float]] | None:
        """What marks answers; None where nothing does.

        Args:
            text: Token ids as text.
            owners: The prompt of each answer.
        """
        if self.task is not None:
            values = [[0.0, *row] for row in word_values()]
            return lambda answers: [
                sum(values[prompt][token] for token in ids.tolist())
                for prompt, ids in zip(owners, answers, strict=True)
            ]
        score = self.score
        if score is None:
            return None
        questions = [self.texts[prompt] for prompt in owners]
        return lambda answers: score(questions, [text(ids) for ids in answers])


def interpolate(
    config: Config, export: Path, *, betas: Sequence[float], lambdas: Sequence[float]
) -> dict[str, Any]:
    """The frontier of one policy, as plain values.

    Args:
        config: The run's settings.
        export: The policy that it left, or its adapter.
        betas: Values of beta that are asked for.
        lambdas: The same by their place.

    Raises:
        UserError: If a beta is asked of a loss that has none, or data and models are gone.
    """
    no_beta = _why_no_beta(config)
    if betas and no_beta is not None:
        raise UserError(
            f"--betas={','.join(f'{b:g}' for b in betas)}: {no_beta}, so that no place on the way "
            "is that of a beta; give --lambdas, where 0 is the reference and 1 the policy"
        )
    asked = [config.beta / beta for beta in betas] + list(lambdas)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hardware = decide_hardware(config.trainer, half_weights=config.model.dtype == "bfloat16")
    prefer_cache_without_network(config)
    source = resolve_source(config, hardware)
    set_threads(config, source)
    questions = _questions(config, source, hardware, export)
    with _pair(config, source, export, hardware.beside) as pair:
        drawer = _Drawer(config, source, pair, questions, _precision(hardware))
        mixtures = plan_mixtures(asked or LAMBDAS, prompts=len(questions.ids), seed=config.seed)
        drawn = drawer.draw(mixtures)
        axis = Axis(config.beta if no_beta is None else None, questions.task is not None)
        points, hidden = _points(drawn, sorted({*(asked or LAMBDAS)}), axis)
        if questions.task is not None:
            gains = ExactGains.of(questions.task, pair)
            for point in points:
                point["gain_ratio"] = gains.gain_ratio(point["lambda"], point["method"])
    for number, mixture in enumerate(mixtures):
        for point in points:
            if point["method"] == "decoded" and point["lambda"] == mixture.lam:
                point["samples"] = drawer.samples(drawn, number)
    return {
        "axis": "lambda" if no_beta is not None else "beta",
        "loss": ",".join(objective_settings(config.loss).terms),
        "beta": config.beta,
        "points": points,
        "not_shown": hidden,
        "notes": _notes(config, no_beta, questions),
        "drawn": drawer.facts(drawn),
    }


def _why_no_beta(config: Config) -> str | None:
    loss = config.loss
    plan = BetaPlan(
        start=config.beta,
        end=loss.beta_end,
        schedule=loss.beta_schedule,
        adaptive=loss.adaptive_beta,
    )
    return why_no_beta(objective_settings(loss), changes=plan.changes)


def _points(
    drawn: Drawn, lambdas: Sequence[float], axis: Axis
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Points that are shown, in the order of their places, and those that are not."""
    points, hidden = [], []
    for number, mixture in enumerate(drawn.mixtures):
        if mixture.lam in (0.0, *lambdas):
            points.append(decoded_point(drawn, number, axis))
    for lam in lambdas:
        if lam == 0:
            continue  # its own answers say all
        point, why = weighted_point(drawn, lam, axis)
        if why is None:
            points.append(point)
        else:
            hidden.append(point | {"why": why})
    return sorted(points, key=lambda p: (p["lambda"], p["method"])), hidden


def _notes(config: Config, no_beta: str | None, questions: _Questions) -> list[str]:
    """What has to be known to read the points, a sentence each."""
    notes = []
    if no_beta is None:
        notes.append(
            f"β is {config.beta:g}/λ. It is exact only if the policy is the optimum "
            f"π_ref·exp(r/β)/Z at β = {config.beta:g}, and training comes close to it at best."
        )
    else:
        notes.append(f"The axis is λ, not β: {no_beta}. 0 is the reference, 1 the policy.")
    if questions.task is None:
        notes.append("Intervals are of prompts like these; those within are of these alone.")
    else:
        notes.append("There are no other prompts than these, so intervals are of answers alone.")
        notes.append("The gain is of the exact policies, over the closed form's at the same KL.")
    if questions.task is None and questions.score is None:
        notes.append("No judge: evaluation.scorer= names one, and the points have a reward.")
    return notes


# Models and prompts -----------------------------------------------------------------------------


def _precision(hardware: Hardware) -> Precision:
    """The context that the run computed in, on the device that is here."""
    if not hardware.mixed or hardware.precision == "bf16-true":
        return contextlib.nullcontext
    half = torch.float16 if hardware.float16 else torch.bfloat16
    return lambda: torch.autocast(hardware.beside.type, dtype=half)


@contextlib.contextmanager
def _pair(
    config: Config, source: ModelSource, export: Path, device: torch.device
) -> Iterator[Pair]:
    """Policy and reference on the device; of an adapter both are one model."""
    reference = config.reference
    adapters = adapter_settings(config, source)
    if adapters is not None:
        trained = read_adapter(str(export), key="run")
        adapters = replace(adapters, start=trained, dropout=0.0)
    models = load_models(
        source,
        ReferenceSettings(
            kind="auto",
            pretrained=reference.pretrained,
            revision=reference.revision,
            needed=True,
        ),
        seed=config.seed,
        adapters=adapters,
    )
    policy = models.policy if adapters is not None else _exported(models, source, export)
    policy = policy if source.quantization is not None else policy.to(device)
    policy.requires_grad_(False).eval()
    if adapters is None and reference.pretrained is None:
        # What it started as is loaded already.
        yield Pair(policy, models.policy.requires_grad_(False).eval().to(device), models.scorer)
        return
    with models.reference_model(device) as frozen:
        yield Pair(policy, frozen, models.scorer)


def _exported(models: Models, source: ModelSource, export: Path) -> Any:
    loaded = load_model(
        str(export), load_config(str(export), key="run"), key="run", dtype=source.dtype
    )
    models.scorer.prepare(loaded)
    return loaded


def _questions(config: Config, source: ModelSource, hardware: Hardware, export: Path) -> _Questions:
    """Held-out prompts, each once, and their judge."""
    score = make_score(config, hardware, judges=True)
    # Rows that cannot be read were named, and set aside, when the run read them.
    rows = read_sources(config, export.parent, when_begun=lambda write: None)
    if rows is None:
        task = ControlledTask()
        ids = [row.numpy().astype("int32") for row in task.prompt_ids]
        return _Questions(ids, list(PROMPTS), task, None)
    data, _ = prepare_groups(
        config, rows, source, cache_folder(config.reference.cache_dir) / "tokens"
    )
    positions = max_positions(source.config)
    groups = choose_prompts(
        data.eval or data.train,
        count=MOST_PROMPTS,
        max_tokens=min(source.max_length, positions or source.max_length),
    )
    if not groups:
        raise UserError(f"run={export.parent}: no prompt of its data leaves room for an answer")
    texts = [prompt_of_key(group.prompt_key) for group in groups]
    return _Questions([group.prompt for group in groups], texts, None, score)


# Answers ----------------------------------------------------------------------------------------


class _Drawer:
    """Draws and scores the answers.

    Args:
        config: The run's settings.
        source: Its model's source.
        pair: Policy and reference.
        questions: The prompts.
        precision: The context to compute in.
    """

    def __init__(
        self,
        config: Config,
        source: ModelSource,
        pair: Pair,
        questions: _Questions,
        precision: Precision,
    ) -> None:
        longest = config.evaluation.max_new_tokens
        if questions.task is not None:
            longest = min(longest, MAX_TOKENS)
        positions = max_positions(source.config)
        if positions is not None:
            longest = min(longest, positions - max(map(len, questions.ids)))
        self._longest = longest
        self._batch_size = config.evaluation.batch_size
        self._scorer_name = config.evaluation.scorer
        self._tokenizer = source.tokenizer
        self._pair = pair
        self._questions = questions
        self._precision = precision

    def draw(self, mixtures: Sequence[Mixture]) -> Drawn:
        """All answers, with their log-probabilities and marks."""
        prompts = self._questions.ids
        answers = [self._answers(mixture) for mixture in mixtures]
        owners = [
            prompt
            for mixture in mixtures
            for prompt in range(len(prompts))
            for _ in range(mixture.count)
        ]
        _say(f"scoring {len(owners)} answers")
        return gather(
            mixtures,
            answers,
            score=lambda ids, own: score_mixed(
                self._pair,
                [prompts[i] for i in owners],
                ids,
                own=own,
                lambdas=[mixture.lam for mixture in mixtures],
                pad=self._tokenizer.eos_token_id,
                precision=self._precision,
            ),
            judge=self._questions.judge(self._text, owners),
            prompts=len(prompts),
        )

    def _answers(self, mixture: Mixture) -> list[Ids]:
        """Answers of one mixture, all of one prompt together."""
        prompts = [ids for ids in self._questions.ids for _ in range(mixture.count)]
        names = {0.0: "the reference", 1.0: "the policy"}
        _say(f"drawing {len(prompts)} answers of {names.get(mixture.lam, f'λ {mixture.lam:g}')}")
        asked: dict[str, Any] = {
            "max_new_tokens": self._longest,
            "batch_size": self._batch_size,
            "seed": mixture.seed,
            "precision": self._precision,
        }
        pair = self._pair
        if mixture.lam in (0.0, 1.0):  # one of the models alone
            model = pair.policy if mixture.lam else pair.reference
            return answer_prompts(model, pair.scorer, self._tokenizer, prompts, **asked)
        return draw_mixed(pair, self._tokenizer, prompts, mixture.lam, **asked)

    def _text(self, ids: Ids) -> str:
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text

    def samples(self, drawn: Drawn, number: int) -> list[dict[str, Any]]:
        """A few answers of a mixture, to different prompts."""
        first = drawn.of(number).start
        asked = zip(self._questions.ids, drawn.answers, strict=True)
        return [
            {"prompt": self._text(prompt).strip(), "response": self._text(answers[first]).strip()}
            for prompt, answers in list(asked)[:_KEPT]
        ]

    def facts(self, drawn: Drawn) -> dict[str, Any]:
        """How the answers were drawn, and how many were cut off."""
        ends = end_ids(self._pair.policy, self._tokenizer)
        own = [drawn.answers[p][drawn.of(1)] for p in range(len(drawn.answers))]
        cut = [
            len(ids) >= self._longest and int(ids[-1]) not in ends for part in own for ids in part
        ]
        return {
            "prompts": len(drawn.answers),
            "answers": {f"{mixture.lam:g}": mixture.count for mixture in drawn.mixtures},
            "temperature": 1.0,
            "max_new_tokens": self._longest,
            "policy_cut_off": sum(cut) / len(cut),
            "judge": "true reward" if self._questions.task is not None else self._scorer_name,
        }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
