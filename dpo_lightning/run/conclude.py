"""The end of a run: what is exactly true, what answers say, the export, and the files of these."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_lightning.data.splits import group_id
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.answers import Answering
from dpo_lightning.evaluation.drawn import Sampled, evaluate_samples
from dpo_lightning.evaluation.exact import ExactCurve
from dpo_lightning.evaluation.signs import find_signs
from dpo_lightning.files import METRICS_FILE, write_json
from dpo_lightning.models.adapters import Adapters
from dpo_lightning.models.sharding import is_sharded, whole_model
from dpo_lightning.objectives.closed_form import fit_tabular_policy
from dpo_lightning.processes.phases import ShowPhase
from dpo_lightning.run.card import CardFacts, model_card
from dpo_lightning.run.export import export_adapter, export_model
from dpo_lightning.run.findings import gather_facts
from dpo_lightning.run.plan import RunPlan
from dpo_lightning.run.prepare import Prepared
from dpo_lightning.run.record import RunRecord
from dpo_lightning.settings.credentials import redact
from dpo_lightning.settings.program import typed
from dpo_lightning.training.module import DPOModule

log = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.json"

# Responses to each prompt that a tabular policy is fitted over: all their pairs are enumerated.
_TABULAR_RESPONSES = 400


@dataclass(frozen=True, slots=True)
class Trained:
    """A session whose training is over.

    Attributes:
        plan: The run's.
        prepared: What it worked on.
        module: The trained module.
        groups: Whose prompts are answered.
        answering: How.
        curve: What is exactly true of the policy at its evaluations; None but for the controlled
            task.
        device: Where to compute.
        show: Shows how far long phases are.
    """

    plan: RunPlan
    prepared: Prepared
    module: DPOModule
    groups: Sequence[TokenGroup]
    answering: Answering
    curve: ExactCurve | None
    device: torch.device
    show: ShowPhase


def conclude(
    trained: Trained,
    *,
    answers: Sequence[dict[str, str]],
    record: RunRecord,
    metrics: dict[str, float],
) -> dict[str, float]:
    """Measures the trained policy, exports it and writes ``evaluation.json``.

    On rank 0 alone, or with a model that ranks share on all of them, of which the first writes.
    What takes long comes before what can fail, such as a terminal that went away.

    Args:
        trained: The session.
        answers: Greedy answers that were collected on the way.
        record: What is known of the run; its metrics are added to.
        metrics: The last metrics of the training and of its evaluation.

    Returns:
        The metrics that were measured here.

    Raises:
        UserError: If no answers could be drawn; the export is written all the same.
    """
    plan, prepared, module = trained.plan, trained.prepared, trained.module
    alone = prepared.models.adapters is None and prepared.ranks is None
    _make_room(trained, alone=alone)
    evaluation: dict[str, Any] = {"answers": list(answers), "judge": plan.evaluation.judge}
    evaluation |= _by_group(trained)
    failure: UserError | None = None
    sampled = Sampled()
    try:
        sampled = draw_answers(plan, prepared, trained.groups, trained.answering, trained.device)
    except UserError as error:  # a model that cannot answer is trained all the same
        failure = error
    measured = sampled.metrics
    evaluation |= _of_samples(sampled, plan.folders.run)
    # What was drawn is of the policy as it computed; what is exact, and exported, of its weights.
    as_evaluated = not module.restore_weights() and alone
    whole = _whole(prepared, merge=plan.evaluation.merge)
    if whole is None:
        return measured
    policy, adapters = whole
    if prepared.task is not None and prepared.reference_outcome_logps is not None:
        curve = trained.curve if as_evaluated else None
        known = None if curve is None else curve.at(module.global_step)
        exact, entries = exact_metrics(plan, prepared, policy, known)
        measured |= exact
        evaluation |= entries
    evaluation["kl"] = kl_facts(plan, trained.answering, measured)
    record.metrics |= measured
    metrics = metrics | record.metrics
    record.signs = _signs(trained, metrics, greedy=answers, samples=evaluation["samples"])
    _export(trained, policy, adapters, record=record, metrics=metrics)
    write_json(plan.folders.run / EVALUATION_FILE, evaluation)
    if failure is not None:
        raise failure
    return measured


def _make_room(trained: Trained, *, alone: bool) -> None:
    """Has the policy on the device, and of two references the start."""
    models = trained.prepared.models
    # Lightning takes a model off its device when it is done with it.
    models.policy.to(trained.device)
    if alone and models.movement is not None:
        # Answers are measured from the start, which is loaded for them.
        trained.module.reference.to(torch.device("cpu"))


def _of_samples(sampled: Sampled, run: Path) -> dict[str, Any]:
    """Entries of ``evaluation.json``; of a judge that failed it is said how its marks are had."""
    entries: dict[str, Any] = {"samples": sampled.rows, "judged": sampled.judged}
    if sampled.failure is None:
        return entries
    line = redact(" ".join(sampled.failure.split()))
    log.warning(
        "the answers were not judged: %s; all else is finished, and `%s` judges them later",
        *(line, shlex.join([*typed("judge"), "--answers", str(run)])),
    )
    return entries | {"judge": None, "judge_failed": line}


def draw_answers(
    plan: RunPlan,
    prepared: Prepared,
    groups: Sequence[TokenGroup],
    answering: Answering,
    device: torch.device,
) -> Sampled:
    """Rows and metrics of answers that are drawn.

    Args:
        plan: The run's.
        prepared: Models and data.
        groups: Whose prompts are answered.
        answering: How.
        device: Where to compute.
    """
    return evaluate_samples(
        prepared.models,
        groups,
        count=plan.evaluation.samples,
        seed=plan.seed,
        answering=answering,
        judge=prepared.judge,
        device=device,
        beta=plan.beta,
        partition_samples=plan.evaluation.partition_samples,
    )


def _by_group(trained: Trained) -> dict[str, Any]:
    """Results of each held-out group, with the groups' names; empty without an evaluation."""
    accuracies = _accuracies(trained)
    if not accuracies:
        return {}
    groups = trained.prepared.data.evaluated_groups()
    return {"accuracies": accuracies, "groups": list(map(group_id, groups))}


def _accuracies(trained: Trained) -> list[float]:
    """Accuracies of the groups that rank trials, the first of all; none without an evaluation."""
    if trained.plan.learning.objective.is_unpaired:
        return []  # single responses are not ranked
    found = trained.module.eval_accuracies
    groups = trained.prepared.data.evaluated_groups()
    return [] if found is None else found[: len(groups)].tolist()


def kl_facts(
    plan: RunPlan, answering: Answering, measured: dict[str, float]
) -> dict[str, Any] | None:
    """Origin of the KL that was measured on answers; None where none were drawn.

    Args:
        plan: The run's.
        answering: How answers were drawn.
        measured: Metrics of them.
    """
    if "samples/kl" not in measured:
        return None
    return {
        "direction": "policy || reference",
        "per_answer": measured["samples/kl"],
        "per_token": measured["samples/kl_per_token"],
        "answers": plan.evaluation.samples,
        "temperature": 1.0,
        "max_new_tokens": answering.max_new_tokens,
        "cut_off": measured["samples/cut_off"],
    }


def _signs(
    trained: Trained,
    metrics: dict[str, float],
    *,
    greedy: Sequence[dict[str, str]],
    samples: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Signs of a training that went wrong, as entries of ``result.json``."""
    plan, module = trained.plan, trained.module
    if plan.batches.overfit:
        return []  # which is what it looks like, on purpose
    facts = gather_facts(
        metrics=metrics,
        metrics_file=plan.folders.run / METRICS_FILE,
        steps=module.global_step,
        learning_rate=plan.learning.optimizer.lr,
        greedy=greedy,
        samples=samples,
        longest=trained.answering.max_new_tokens,
        groups=trained.prepared.data.evaluated_groups(),
        accuracies=_accuracies(trained),
    )
    return [sign.entry() for sign in find_signs(facts)]


def _whole(prepared: Prepared, *, merge: bool) -> tuple[Any, Adapters | None] | None:
    """The policy with its weights, and its adapters; None on a rank that only helps.

    Of an adapter alone the base is not needed, and is not there where ranks share it.
    """
    models, ranks = prepared.models, prepared.ranks
    if ranks is not None:
        # Rank 0 alone judges answers, which may take long.
        ranks.meet()
    keep = ranks is None or ranks.is_first
    with_base = prepared.task is not None or merge
    if models.adapters is not None and is_sharded(models.policy):
        own = models.adapters.gathered(keep=keep, with_base=with_base)
        return None if own is None else (own.policy, own)
    policy = whole_model(models.policy, keep=keep)
    if policy is None:
        return None
    if models.adapters is not None and with_base:
        models.adapters.restore_base()
    return policy, models.adapters


def exact_metrics(
    plan: RunPlan, prepared: Prepared, policy: Any, known: dict[str, float] | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Exact quantities of the policy on the controlled task: metrics, and entries of a file.

    Args:
        plan: The run's.
        prepared: What it worked on.
        policy: The policy.
        known: Its report, if that was made already.
    """
    task, reference_logps = prepared.task, prepared.reference_outcome_logps
    assert task is not None
    assert reference_logps is not None
    exact = known
    if exact is None:
        with prepared.models.scorer.plain(policy) as plain:
            policy_logps = task.outcome_logps(plain)
        exact = task.report(policy_logps, reference_logps, beta=plan.beta)
    exact["bayes_accuracy"] = task.bayes_accuracy(prepared.data.evaluated_groups())
    measured = {f"controlled/{name}": value for name, value in exact.items()}
    entries: dict[str, Any] = {"optimum": task.frontier(reference_logps)}
    if plan.evaluation.population:
        space = task.likeliest(reference_logps, count=_TABULAR_RESPONSES)
        fit = fit_tabular_policy(*space, plan.beta)
        kl = fit.kl.mean(1).clamp(min=0).tolist()
        measured["controlled/tabular_kl_optimum_policy"] = kl[-1]
        entries["tabular"] = {"loss": fit.losses.tolist(), "kl_optimum_policy": kl}
    return measured, entries


def _export(
    trained: Trained,
    policy: Any,
    adapters: Adapters | None,
    *,
    record: RunRecord,
    metrics: dict[str, float],
) -> None:
    """The whole policy as ``model``; an adapter as that, and merged as ``model-merged``."""
    plan, source = trained.plan, trained.prepared.source
    result = record.content() | {"step": trained.module.global_step, "metrics": metrics}
    facts = CardFacts(plan.folders.run.name, result, plan.names.settings)
    card = model_card(facts, adapter=False)
    folder = plan.folders.run / "model"
    if adapters is not None:
        export_adapter(
            adapters,
            source.tokenizer,
            folder,
            base=None if source.random else source.source,
            revision=source.revision,
            card=model_card(facts, adapter=True),
        )
        if not plan.evaluation.merge:
            return
        adapters.merge()
        folder = plan.folders.run / "model-merged"
    with trained.show("saving", total=1, unit="models") as say:
        export_model(policy, source.tokenizer, folder, config=source.config, card=card)
        say(1)
