"""The command ``interpolate``: its words, the run's own settings, and what is printed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpo_lightning.errors import OutOfMemoryError, UserError
from dpo_lightning.files import INTERPOLATION_FILE
from dpo_lightning.objectives.optimum import MOST_LAMBDA
from dpo_lightning.objectives.registry import PAIRWISE_LOSSES
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
    OF_A_MODEL,
    OF_ROWS,
    Grammar,
    Words,
    check_settings,
    read_words,
)
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.recorded import SETTINGS_FILE, read_recorded
from dpo_lightning.settings.schema import Config

_HELP = """\
usage: {program} RUN [--betas B,B,…] [--lambdas L,L,…] [--json] [settings]
       {program} MODEL --reference MODEL data.eval=ROWS [--lambdas L,L,…] [settings]

The frontier of one policy: reward and KL at other values of beta than the run's own, without
training. RUN is the folder of a run that finished; its interpolation.json keeps the answer, and
the report of a sweep shows it. MODEL is a folder with a model or a LoRA adapter, or a hub id; of a
model alone, and on other rows, nothing is kept but by --output.

  --betas    values of beta, such as 0.05,0.1,0.5; for losses whose optimum has one
  --lambdas  the same by their place: 0 is the reference, 1 the policy, beta is the run's over it
  --json     print one object, {{"points": [...]}}, and all else on stderr
  --output FILE  write that object to a file
  --reference    what a model is compared with; of an adapter it is the base model

Settings may be plugins= and those of evaluation: judge, max_new_tokens, batch_size; data.eval=
and what says how its rows are read; of a model alone also beta=, that it was trained at."""

_SETTINGS = (
    *("plugins", "evaluation.judge", "evaluation.max_new_tokens", "evaluation.batch_size"),
    *("trainer.accelerator", "trainer.threads", *OF_ROWS, *OF_A_MODEL),
)
_GRAMMAR = Grammar(
    "interpolate",
    flags=("--betas", "--lambdas", "--output", "--reference"),
    switches=("--json",),
    settings=_SETTINGS,
)
# With another one the points are of other marks, or other answers, than the run's own metrics.
_CHANGES = ("evaluation.judge=", "evaluation.max_new_tokens=", "data.")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the frontier of one policy, and keeps it in the run's folder.

    Args:
        argv: The run's folder, flags and settings; None takes the process's own.

    Returns:
        0, or 2 where the words, the run or its loss are wrong.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    if said_help(argv, _HELP, "interpolate"):
        return 0
    words = read_words(argv, _GRAMMAR)
    name = words.only_name("interpolate", wanted="the folder of one run")
    with answer_alone():
        found = _interpolate(words)
    print_answer(found, as_json="--json" in words.switches, show=partial(_show, name))
    return 0


def _numbers(flag: str, text: str | None, *, least: float | None) -> tuple[float, ...]:
    """The numbers behind a flag; above 0, or from ``least`` on."""
    if text is None:
        return ()
    numbers = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        most = math.inf if least is None else MOST_LAMBDA
        if not math.isfinite(number) or not (number > 0 or number == least) or number > most:
            bound = "> 0" if least is None else f">= {least:g} and <= {most:g}"
            raise UserError(f"{flag}={text}: needs finite numbers {bound}, such as {flag} 0.1,0.5")
        numbers.append(number)
    return tuple(numbers)


def _interpolate(words: Words) -> dict[str, Any]:
    betas = _numbers("--betas", words.one("--betas"), least=None)
    lambdas = _numbers("--lambdas", words.one("--lambdas"), least=0.0)
    opened = open_named(words.names[0], reference=words.one("--reference"))
    named = words.one("--output")
    output = None if named is None else Path(named)
    if output is not None:
        check_output(output, opened)
    check_settings(opened, words.settings)
    # Answers are drawn here whatever the run itself drew, and there may be a judge of them.
    drawing = ["evaluation.samples=16", *_without_endpoint(words, opened)]
    config = compose_opened(opened, [*drawing, *words.settings])
    _check_loss(config, words.names[0])
    # Here, because they import torch: by now every setting is checked.
    import torch

    from dpo_lightning.run.interpolate.experiment import interpolate
    from dpo_lightning.tracking.phases import Phases

    try:
        found = interpolate(
            config,
            opened,
            beta_known=opened.trained_beta or any(key_of(w) == "beta" for w in words.settings),
            rows_named=names_rows(words.settings),
            betas=betas,
            lambdas=lambdas,
            show=Phases.on_stderr(),
        )
        found["drawn"]["as_run"] = not any(w.startswith(_CHANGES) for w in words.settings)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            "not enough memory for policy and reference together: lower "
            "evaluation.batch_size=, or compute on a CPU with trainer.accelerator=cpu"
        ) from error
    own = opened.run is not None and not names_rows(words.settings)
    kept = [opened.run / INTERPOLATION_FILE] if own and opened.run is not None else []
    for path in [*kept, *([] if output is None else [output])]:
        write_answer(path, found)
        print(f"kept in {path}")
    return found


def _without_endpoint(words: Words, opened: Opened) -> list[str]:
    """The setting that leaves out the run's endpoint, if it has one and no judge is named.

    Raises:
        UserError: If an endpoint is named.
    """
    if "evaluation.judge=endpoint" in words.settings:
        raise UserError(
            "evaluation.judge=endpoint: it would be asked for a mark of each of some thousands of "
            "answers; name a function or a reward model"
        )
    named = any(word.startswith("evaluation.judge=") for word in words.settings)
    if named or opened.run is None or not (opened.run / SETTINGS_FILE).is_file():
        return []
    asked = read_recorded(opened.run / SETTINGS_FILE).values.get("evaluation.judge")
    return ["evaluation.judge=none"] if asked == "endpoint" else []


def _check_loss(config: Config, run: str) -> None:
    """Refuses losses that compare with nothing.

    Raises:
        UserError: If this is one.
    """
    objective = objective_settings(config.loss)
    names = ",".join(objective.terms)
    if not objective.uses_reference:
        others = [name for name, loss in PAIRWISE_LOSSES.items() if loss.uses_reference]
        raise UserError(
            f"run={run}: loss={names} compares with no reference, so there is no way between the "
            f"two that a beta could name; name a run of {', '.join(others)} or a loss on groups"
        )
    if config.reference.kind == "none":
        raise UserError(
            f"run={run}: it was trained with reference=none, so there is no way between policy and "
            "reference that a beta could name; name a run with one"
        )


def _show(run: str, found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    points = found["points"]
    table = Table(title=f"frontier of {run}", title_justify="left")
    exact = any(point.get("gain_ratio") is not None for point in points)
    columns = ["beta", "lambda"] if found["axis"] == "beta" else ["lambda"]
    for name in (*columns, "method", "reward", "KL", "answers worth"):
        table.add_column(name, justify="left" if name == "method" else "right")
    if exact:
        table.add_column("gain/closed form", justify="right")
    for point in points:
        cells = [_number(point[name]) for name in columns]
        cells += [point["method"], *(_mean(point, name) for name in ("reward", "kl"))]
        cells.append(_number(point["ess"]))
        table.add_row(*cells, *([_number(point.get("gain_ratio"))] if exact else []))
    console = Console()
    console.print(table)
    for hidden in found["not_shown"]:
        name = found["axis"]
        where = _number(hidden[name])
        print(f"not shown: {name} {where} by weights, as {hidden['why']}")
    for note in found["notes"]:
        print(note)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _mean(point: Mapping[str, Any], name: str) -> str:
    value, interval = point[name], point[f"{name}_interval"]
    if value is None:
        return "–"
    low, high = interval
    # Of one prompt nothing is known of others.
    return f"{value:.2f} ±{(high - low) / 2:.2f}" if math.isfinite(high - low) else f"{value:.2f}"
