"""The end of a run: what is exactly true, what answers say, the export, and the files of these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.answers import Answering, evaluate_samples
from dpo_lightning.evaluation.exact import ExactCurve
from dpo_lightning.files import write_json
from dpo_lightning.models.sharding import whole_model
from dpo_lightning.objectives.closed_form import fit_tabular_policy
from dpo_lightning.run.export import export_adapter, export_model
from dpo_lightning.run.prepare import Prepared
from dpo_lightning.settings.schema import Config
from dpo_lightning.training.module import DPOModule

EVALUATION_FILE = "evaluation.json"

# Responses to each prompt that a tabular policy is fitted over: all their pairs are enumerated.
_TABULAR_RESPONSES = 400


def conclude(
    config: Config,
    prepared: Prepared,
    module: DPOModule,
    *,
    groups: Sequence[TokenGroup],
    answering: Answering,
    answers: Sequence[dict[str, str]],
    curve: ExactCurve | None,
    device: torch.device,
    run_dir: Path,
    result: dict[str, Any],
    metrics: dict[str, float],
) -> dict[str, float]:
    """Measures the trained policy, exports it and writes ``evaluation.json``.

    On rank 0 alone, or with a model that ranks share on all of them, of which the first writes.
    What takes long comes before what can fail, such as a terminal that went away.

    Args:
        config: The settings.
        prepared: What the session worked on.
        module: The trained module.
        groups: Whose prompts are answered.
        answering: How.
        answers: Greedy answers that were collected on the way.
        curve: What is exactly true of the policy at its evaluations; None but for the controlled
            task.
        device: Where to compute.
        run_dir: The run's folder.
        result: The content of result.json; its metrics are added to.
        metrics: The last metrics of the training and of its evaluation.

    Returns:
        The metrics that were measured here.

    Raises:
        UserError: If the scorer failed; the export is written all the same.
    """
    policy = prepared.models.policy
    # Lightning takes a model off its device when it is done with it.
    policy.to(device)
    evaluation: dict[str, Any] = {"answers": list(answers), "scorer": config.evaluation.scorer}
    if module.eval_accuracies is not None:
        evaluation["accuracies"] = module.eval_accuracies.tolist()
    measured: dict[str, float] = {}
    failure: UserError | None = None
    rows: list[dict[str, Any]] = []
    try:
        rows, sampled = evaluate_samples(
            prepared.models,
            groups,
            count=config.evaluation.samples,
            seed=config.seed,
            answering=answering,
            score=prepared.score,
            device=device,
            beta=config.beta,
            partition_samples=config.evaluation.partition_samples,
        )
        measured |= sampled
    except UserError as error:  # a scorer that fails must not cost the trained model
        failure = error
    evaluation["samples"] = rows
    # What was drawn is of the policy as it computed; what is exact, and exported, of its weights.
    adapters = prepared.models.adapters
    alone = adapters is None and prepared.ranks is None
    as_evaluated = not module.restore_weights() and alone
    policy = whole_model(policy, keep=prepared.ranks is None or prepared.ranks.is_first)
    if policy is None:
        return measured
    if adapters is not None and (prepared.task is not None or config.peft.merge):
        adapters.restore_base()
    if prepared.task is not None and prepared.reference_outcome_logps is not None:
        reference_logps = prepared.reference_outcome_logps
        exact = curve.at(module.global_step) if curve is not None and as_evaluated else None
        if exact is None:
            with prepared.models.scorer.plain(policy) as plain:
                policy_logps = prepared.task.outcome_logps(plain)
            exact = prepared.task.report(policy_logps, reference_logps, beta=config.beta)
        exact["bayes_accuracy"] = prepared.task.bayes_accuracy(prepared.data.eval)
        measured |= {f"controlled/{name}": value for name, value in exact.items()}
        evaluation["optimum"] = prepared.task.frontier(reference_logps)
        if config.data.controlled.population:
            space = prepared.task.likeliest(reference_logps, count=_TABULAR_RESPONSES)
            fit = fit_tabular_policy(*space, config.beta)
            kl = fit.kl.mean(1).clamp(min=0).tolist()
            measured["controlled/tabular_kl_optimum_policy"] = kl[-1]
            evaluation["tabular"] = {"loss": fit.losses.tolist(), "kl_optimum_policy": kl}
    result["metrics"] |= measured
    facts = {
        "name": run_dir.name,
        "base_model": prepared.source.name,
        "beta": config.beta,
        "loss": config.loss.name,
        "command": result["command"],
        "metrics": metrics | result["metrics"],
    }
    _export(prepared, policy, run_dir, merge=config.peft.merge, facts=facts)
    write_json(run_dir / EVALUATION_FILE, evaluation)
    if failure is not None:
        raise failure
    return measured


def _export(
    prepared: Prepared, policy: Any, run_dir: Path, *, merge: bool, facts: dict[str, Any]
) -> None:
    """The whole policy as ``model``; an adapter as that, and merged as ``model-merged``."""
    source, models = prepared.source, prepared.models
    folder = run_dir / "model"
    if models.adapters is not None:
        export_adapter(
            models.adapters,
            source.tokenizer,
            folder,
            base=None if source.random else source.source,
            revision=source.revision,
            facts=facts,
        )
        if not merge:
            return
        models.adapters.merge()
        folder = run_dir / "model-merged"
    export_model(policy, source.tokenizer, folder, config=source.config, facts=facts)
