"""The end of a sweep: the table, the report, and the report's own run in wandb."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from dpo_lightning.errors import UserError
from dpo_lightning.settings.logger_group import chosen_loggers
from dpo_lightning.sweeps.trials import SweepFacts, Trial
from dpo_lightning.sweeps.view import show_end
from dpo_lightning.tracking.logger_settings import logger_settings
from dpo_lightning.tracking.wandb_runs import SYNC, report_sweep, sync_command, tag_pruned

log = logging.getLogger(__name__)

# What a trial's row in wandb's table holds: facts, then metrics.
_FACTS = ("name", "status", "beta", "loss", "seed", "step")
_METRICS = (
    *("controlled/expected_reward", "controlled/kl_policy_reference"),
    *("samples/judge", "samples/win_rate", "samples/kl"),
    *("eval/rewards/accuracies", "eval/logratios/chosen", "eval/logratios/rejected"),
)


def finish_sweep(sweep: SweepFacts, trials: Sequence[Trial]) -> bool:
    """Shows the outcome of each trial and writes the report.

    Args:
        sweep: The sweep.
        trials: The trials of this command; empty where they ran in this process.

    Returns:
        True if all of the trials finished and the report was written.
    """
    if trials:
        show_end(Console(), trials)
    if "wandb" in chosen_loggers(sweep.logger):
        for trial in trials:
            if trial.status == "pruned":
                tag_pruned(logger_settings(sweep.logger), trial.folder)
    finished = all(trial.status in ("finished", "pruned") for trial in trials)
    return _report(sweep) and finished


def show_stopped(sweep: SweepFacts, trials: Sequence[Trial]) -> None:
    """Shows the outcome of each trial of a sweep that was stopped, and how to go on with it."""
    if trials:
        show_end(Console(), trials)
        how = "the same command" if sweep.named else f"the same command with {_resume(sweep)}"
        print(f"stopped; {how} resumes it", flush=True)


def _resume(sweep: SweepFacts) -> str:
    return f"sweep.resume={sweep.folder}"


def _report(sweep: SweepFacts) -> bool:
    # Here, because drawing takes a second to import.
    from dpo_lightning.sweeps.report.content import report_command
    from dpo_lightning.sweeps.report.write import write_report

    rule = {"metric": sweep.metric, "margin": sweep.margin, "kl_budget": sweep.kl_budget}
    again = report_command(str(sweep.folder), rule)
    try:
        report = write_report(
            sweep.folder, metric=sweep.metric, margin=sweep.margin, kl_budget=sweep.kl_budget
        )
    except UserError as error:
        print(f"no report: {error}; `{again}` writes it again", flush=True)
        return True  # the trials are what they are
    except Exception:  # a sweep of days must not end in a traceback alone
        traceback.print_exc()
        print(f"no report; `{again}` writes it again", flush=True)
        return False
    print(f"report    {sweep.folder / 'report.html'}", flush=True)
    if report["configurations"]:
        print(f"pick      {report['reason']}", flush=True)
    for line in _to_wandb(sweep, report):
        print(f"wandb     {line}", flush=True)
    return True


def _to_wandb(sweep: SweepFacts, report: Mapping[str, Any]) -> list[str]:
    """Address of the report in wandb, and the command that uploads what is offline."""
    if "wandb" not in chosen_loggers(sweep.logger):
        return []
    where = None
    try:
        where = report_sweep(
            logger_settings(sweep.logger),
            sweep.folder,
            columns=(*_FACTS, *_METRICS),
            rows=[_row(trial) for trial in report["trials"]],
            picture=sweep.folder / "frontier.png",
            summary={} if report["pick"] is None else {"pick": report["pick"]["label"]},
        )
    except UserError as error:
        log.warning("the report is not in wandb: %s", error)
    recorded = sync_command(sweep.folder)
    if recorded is None:
        return [] if where is None else [where]
    # It has the report's run too, if that is offline.
    return [recorded] if where is None or where.startswith(SYNC) else [where, recorded]


def _row(trial: Mapping[str, Any]) -> list[Any]:
    return [*(trial[name] for name in _FACTS), *(trial["metrics"].get(name) for name in _METRICS)]
