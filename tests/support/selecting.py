"""Runs of the embedded task that select a checkpoint, and end early because of it."""

from dpo_lightning.settings.metric_names import direction
from tests.support.recovery import DRAWING
from tests.support.runs import TINY, Run

EVERY = 2

# Steps of such a size that held-out rows are soon predicted worse than before.
SELECTING = (
    *TINY,
    *("trainer.max_steps=40", "optimizer.lr=0.03", "optimizer.schedule=constant"),
    *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
    *("evaluation.partition_samples=0", "evaluation.on_start=true"),
    *(f"evaluation.every_n_steps={EVERY}", "checkpoint.monitor=eval/loss"),
    *("checkpoint.patience=5", "checkpoint.min_delta=0.001", "checkpoint.export=best"),
    *DRAWING,
)


def names_written(*runs: Run) -> set[str]:
    """Metrics in the rows and results of runs."""
    names = {name for run in runs for row in run.rows for name in row}
    names |= {name for run in runs for name in run.result["metrics"]}
    return names - {"step", "epoch", "time"}


def unknown(names: set[str]) -> set[str]:
    """Those of which the table does not say which way is better."""
    return {name for name in names if direction(name) is None}
