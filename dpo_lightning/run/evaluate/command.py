"""The command ``evaluate``: its words, and what it prints of a policy on held-out rows."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_lightning.data.columns import column_values
from dpo_lightning.errors import OutOfMemoryError, UserError
from dpo_lightning.run.framed import (
    answer_alone,
    check_output,
    print_answer,
    said_help,
    write_answer,
)
from dpo_lightning.run.guard import guarded
from dpo_lightning.run.opened import Opened, compose_opened, key_of, names_rows, open_named
from dpo_lightning.run.words import (
    ANYWHERE,
    OF_A_MODEL,
    OF_ROWS,
    Grammar,
    Words,
    check_settings,
    read_words,
)
from dpo_lightning.settings.schema import Config

if TYPE_CHECKING:
    from dpo_lightning.run.evaluate.measure import Evaluation

_HELP = """\
usage: {program} RUN [--slice COLUMN]… [--json] [--output FILE] [settings]
       {program} MODEL --reference MODEL data.eval=ROWS [settings]

Measures a trained policy on held-out rows: the metrics of its run, on the rows that the run held
out or on others. RUN is a run's folder. MODEL is a folder with a model (such as a run's model/) or
a LoRA adapter, or a hub id; a model alone has no reference, so --reference names one.

  --slice COLUMN   metrics by the values of a column of the rows too; may be there several times.
                   Those by the length of prompt and response are always there
  --reference      what a model is compared with; of an adapter it is the base model
  --json           print one object, {{"metrics": …, "slices": …}}, and all else on stderr
  --output FILE    write that object to a file; nothing is written anywhere else

Settings may be data.eval= and what says how its rows are read, those of evaluation, and of trainer
accelerator, devices, precision and threads."""

_GRAMMAR = Grammar(
    "evaluate",
    flags=("--slice", "--reference", "--output"),
    switches=("--json",),
    settings=(*OF_ROWS, *ANYWHERE, *OF_A_MODEL),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the metrics of a policy on held-out rows.

    Args:
        argv: The policy, flags and settings; None takes the process's own.

    Returns:
        0, or 2 where the words, the policy or its rows are wrong.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    if said_help(argv, _HELP, "evaluate"):
        return 0
    words = read_words(argv, _GRAMMAR)
    name, output = words.only_name("evaluate"), words.one("--output")
    with answer_alone():
        opened = open_named(name, reference=words.one("--reference"))
        if output is not None:
            check_output(Path(output), opened)
        found = _evaluate(opened, words)
        if output is not None:
            write_answer(Path(output), found)
    print_answer(found, as_json="--json" in words.switches, show=_show)
    return 0


def check_devices(config: Config, settings: Sequence[str]) -> None:
    """Refuses several devices that were typed: this is one process.

    Raises:
        UserError: If they were.
    """
    devices = config.trainer.devices
    count = len(devices) if isinstance(devices, list) else devices
    if any(key_of(word) == "trainer.devices" for word in settings) and count not in (1, "auto"):
        raise UserError(
            f"trainer.devices={devices}: an evaluation is computed on one device; name one, such "
            "as trainer.devices=[0]"
        )


def checked(opened: Opened, settings: Sequence[str]) -> Config:
    """The settings of a policy.

    Args:
        opened: The policy.
        settings: As they were typed beside it.

    Raises:
        UserError: If one is wrong.
    """
    check_settings(opened, settings)
    config = compose_opened(opened, settings)
    check_devices(config, settings)
    return config


def measured(opened: Opened, config: Config, settings: Sequence[str]) -> Evaluation:
    """The measurements of a policy.

    Args:
        opened: The policy.
        config: Its settings.
        settings: As they were typed beside it.

    Raises:
        UserError: If data and models are gone.
    """
    # Here, because they import torch: by now every setting is checked.
    import torch

    from dpo_lightning.run.evaluate.measure import evaluate
    from dpo_lightning.tracking.phases import Phases

    try:
        return evaluate(opened, config, rows_named=names_rows(settings), show=Phases.on_stderr())
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            "not enough memory on the device: lower evaluation.batch_size= or "
            "data.micro_batch_tokens=, or compute on a CPU with trainer.accelerator=cpu"
        ) from error


def _evaluate(opened: Opened, words: Words) -> dict[str, Any]:
    config = checked(opened, words.settings)
    columns = words.flags.get("--slice", ())
    by_column = _column_values(config, columns, names_rows(words.settings))
    found = measured(opened, config, words.settings)
    return answer(opened, config, found, by_column, words.settings)


def _column_values(
    config: Config, columns: Sequence[str], rows_named: bool
) -> dict[str, dict[str, Any]]:
    """Values of each column that is asked for, by the place of their row."""
    data = config.data
    if columns and data.train is None:
        raise UserError(f"--slice {columns[0]}: the controlled task has no columns; leave it out")
    key = "data.eval" if rows_named or data.eval is not None else "data.train"
    held_out = data.eval is not None or data.eval_split is not None
    return {
        column: column_values(
            data.eval or data.train,
            column,
            key=key,
            split=(data.eval_split or data.train_split) if held_out else data.train_split,
            subset=data.subset,
            revision=data.revision,
        )
        for column in columns
    }


def answer(
    opened: Opened,
    config: Config,
    found: Evaluation,
    by_column: Mapping[str, Mapping[str, Any]],
    settings: Sequence[str],
) -> dict[str, Any]:
    """The object that is printed.

    Args:
        opened: The policy.
        config: Its settings.
        found: Its measurements.
        by_column: Values of each column to slice by, by the place of their row.
        settings: As they were typed.
    """
    import numpy as np

    from dpo_lightning.run.evaluate.samples import sample_intervals
    from dpo_lightning.run.evaluate.slices import (
        entry_of,
        prompts_of,
        slices_by_column,
        slices_by_length,
    )

    prompts = prompts_of(found.groups)
    whole = entry_of(found.items, prompts, np.arange(len(found.groups)))
    slices = slices_by_length(found.groups)
    for column, values in by_column.items():
        slices += slices_by_column(found.groups, column, values)
    result: dict[str, Any] = {
        "run": opened.name,
        "metrics": found.metrics,
        "intervals": whole["intervals"] | sample_intervals(found.samples),
        "groups": whole["groups"],
        "prompts": whole["prompts"],
        "beta": found.beta,
        "device": found.device,
        "kl": found.kl,
        "notes": _notes(opened, config, settings),
        "slices": [
            {"by": own.by, "value": own.value} | entry_of(found.items, prompts, own.groups)
            for own in slices
        ],
        "samples": list(found.samples),
    }
    if not opened.trained_beta and "beta" not in map(key_of, settings):
        result["beta"] = None
        _take_out(result)
        for own in result["slices"]:
            _take_out(own)
    return result


def _take_out(entry: dict[str, Any]) -> None:
    """Takes out what depends on a beta that nobody named."""
    for name in ("metrics", "intervals"):
        entry[name] = {key: value for key, value in entry[name].items() if not _is_of_beta(key)}


def _is_of_beta(metric: str) -> bool:
    of_rewards = metric.startswith(("eval/rewards/", "eval/partition/", "samples/log_z"))
    free = metric == "eval/rewards/accuracies"
    return metric in ("eval/loss", "eval/bco/delta") or (of_rewards and not free)


def _notes(opened: Opened, config: Config, settings: Sequence[str]) -> list[str]:
    """Facts that a reader of the numbers needs, a sentence each."""
    from dpo_lightning.evaluation.uncertainty import RESAMPLES, SEED

    notes = [
        "Intervals are of 95%: for accuracies of pairs with a prompt each Wilson's binomial one, "
        f"else percentiles of {RESAMPLES} bootstrap draws over prompts (seed {SEED})."
    ]
    if not opened.trained_beta and "beta" not in map(key_of, settings):
        notes.append(
            "It is not known at which beta this model was trained, so loss, rewards and partition "
            "function are left out; beta= names one."
        )
    if opened.run is not None and not settings:
        notes.append("Rows, limits and draws are those of the run.")
    if config.evaluation.max_prompts is not None:
        notes.append(
            f"At most {config.evaluation.max_prompts:,} held-out rows are seen "
            "(evaluation.max_prompts)."
        )
    return notes


# Shown ------------------------------------------------------------------------------------------


def _show(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)
    rows = f"{found['groups']:,} held-out rows, {found['prompts']:,} prompts"
    table = Table(title=f"{found['run']} on {rows}", title_justify="left")
    for name in ("metric", "value", "95% interval"):
        justify: Any = "left" if name == "metric" else "right"
        table.add_column(name, justify=justify, overflow="fold")
    for name, value in found["metrics"].items():
        table.add_row(name, _number(value), _range(found["intervals"].get(name)))
    console.print(table)
    shown, heads = ("eval/rewards/accuracies", "eval/logratios/margins"), ("accuracy", "margin")
    if "eval/label_gain" in found["metrics"]:
        shown, heads = ("eval/label_gain", "eval/logratios/separation"), ("gain", "separation")
    table = Table(title="slices", title_justify="left")
    for name in ("by", "value", "rows", heads[0], "95% interval", heads[1], "95% interval"):
        justify = "left" if name in ("by", "value") else "right"
        table.add_column(name, justify=justify, overflow="fold")
    for own in found["slices"]:
        cells = [own["by"], own["value"], f"{own['groups']:,}"]
        for name in shown:
            cells += [_number(own["metrics"][name]), _range(own["intervals"][name])]
        table.add_row(*cells)
    console.print(table)
    for note in found["notes"]:
        print(note)


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _range(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"
