"""Callbacks that ``trainer.callbacks`` names: those of plugins, and Lightning's by an allowlist.

Lightning is imported once one of its own is named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.plugins import CALLBACKS, callback_entry, make_callbacks
from dpo_lightning.settings.metric_names import direction

LIBRARY = (
    *("DeviceStatsMonitor", "EarlyStopping", "LearningRateMonitor", "ModelSummary"),
    "RichModelSummary",
)
"""Classes of ``lightning.pytorch.callbacks`` that do in a run what they are for."""

_KEPT = "checkpoints are kept by checkpoint.every_n_steps=, .keep= and .monitor="
_STEPS = "a step takes data.batch_size= groups, in micro-batches that fit"
_BAR = "progress is shown by trainer.enable_progress_bar=true"
_MANUAL = "it does not work with manual optimization, by which a step takes its micro-batches"
_OWN = "it needs code of yours: register a callback of your own with plugins=[<module>]"

REFUSED = {
    "BackboneFinetuning": "peft=lora trains few weights",
    "BaseFinetuning": _OWN,
    "BasePredictionWriter": "`generate` writes answers",
    "BatchSizeFinder": _STEPS,
    "Callback": _OWN,
    "Checkpoint": _KEPT,
    "EMAWeightAveraging": _MANUAL,
    "GradientAccumulationScheduler": _STEPS,
    "LambdaCallback": _OWN,
    "LearningRateFinder": _MANUAL,
    "ModelCheckpoint": _KEPT,
    "ModelPruning": "the exported model would not be the one that was trained",
    "OnExceptionCheckpoint": "a run that is stopped saves itself; for others " + _KEPT,
    "ProgressBar": _BAR,
    "RichProgressBar": _BAR,
    "SpikeDetection": "a loss that is not finite is found in each step",
    "StochasticWeightAveraging": _MANUAL,
    "ThroughputMonitor": "result.json has the throughput",
    "Timer": "trainer.max_time= ends a run in time",
    "TQDMProgressBar": _BAR,
    "WeightAveraging": _MANUAL,
}
"""The other ones, each with what does it here."""


def make_all_callbacks(entries: Sequence[Any]) -> list[Any]:
    """The callbacks that ``trainer.callbacks`` names.

    Args:
        entries: Names, or mappings of one name to arguments. A plugin's name counts before
            Lightning's.

    Raises:
        UserError: If a name is unknown, or an argument is wrong.

    Example:
        >>> make_all_callbacks([{"LearningRateMonitor": {"logging_interval": "step"}}])
        ... # doctest: +ELLIPSIS
        [<lightning.pytorch.callbacks.lr_monitor.LearningRateMonitor object at ...>]
    """
    made = []
    for entry in entries:
        name, arguments = callback_entry(entry)
        if name in CALLBACKS or name not in (*LIBRARY, *REFUSED):
            made += make_callbacks([entry], others=LIBRARY)
        elif name in REFUSED:
            raise UserError(f"trainer.callbacks={name}: {REFUSED[name]}")
        else:
            from lightning.pytorch import callbacks

            made.append(_called(name, getattr(callbacks, name), arguments))
    return made


def _called(name: str, maker: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """A callback of Lightning's, with arguments that it takes."""
    taken = list(inspect.signature(maker).parameters)
    for argument in arguments:
        if argument not in taken:
            raise UserError(
                f"trainer.callbacks={name}: it takes no {argument}; there are {', '.join(taken)}"
            )
    if name == "EarlyStopping" and "monitor" in arguments:
        _check_monitor(str(arguments["monitor"]))
    try:
        return maker(**arguments)
    except Exception as error:  # of several kinds, Lightning's own among them
        said = " ".join(str(error).split())
        raise UserError(f"trainer.callbacks={name}: {said}; fix its arguments") from error


def _check_monitor(metric: str) -> None:
    """Refuses a metric that no evaluation of a run logs, by which Lightning would end it.

    Raises:
        UserError: If it is such a one.
    """
    if not metric.startswith("eval/") or direction(metric) is None:
        raise UserError(
            f"trainer.callbacks=EarlyStopping: monitor={metric} is no metric of the evaluations; "
            "use eval/loss or another one, or checkpoint.monitor= with checkpoint.patience="
        )
