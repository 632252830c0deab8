"""Check that a run fits its devices, before any weights are loaded.

``dpo-lightning preflight <settings of a run>``, or ``python -m dpo_lightning.preflight`` with them,
prints the estimate of a run without running it; ``--gib 80`` compares it with a GPU that this
machine need not have.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dpo_lightning.errors import UserError
from dpo_lightning.memory.estimate import (
    MemoryEstimate,
    check_fits,
)
from dpo_lightning.memory.footprint import GIB, in_gib
from dpo_lightning.run.framed import said_help
from dpo_lightning.run.guard import guarded
from dpo_lightning.run.needs import estimate_for
from dpo_lightning.run.words import Grammar, read_words
from dpo_lightning.settings.compose import compose_one
from dpo_lightning.settings.schema import Config

_HELP = """\
usage: {program} [--gib N] [settings of a run]

Prints how much memory each device would take, before anything is downloaded or loaded.

  --gib N  compare with a GPU of N GiB, which this machine need not have

The settings are those of `{train}`. Exit code 2: they are wrong, or the run would not fit."""

GRAMMAR = Grammar("preflight", flags=("--gib",), switches=(), settings=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the memory that a run would take.

    Args:
        argv: The settings, and ``--gib N``; None takes the process's own.

    Returns:
        0, or 2 where the settings are wrong or the run would be refused.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    if said_help(argv, _HELP, "preflight", train="train"):
        return 0
    words = read_words(argv, GRAMMAR)
    gib = _gib(words.one("--gib"))
    config = compose_one([*words.settings])
    estimate = estimate_for(
        config,
        None if gib is None else "cuda",
        device_bytes=None if gib is None else round(gib * GIB),
    )
    _show(estimate, config)
    check_fits(estimate, config.trainer.memory_check)
    return 0


def _gib(text: str | None) -> float | None:
    """Memory of the GPU to compare with; None: those of this machine."""
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"--gib {text}: needs the memory of a GPU in GiB, such as --gib 80")
    return number


def _show(estimate: MemoryEstimate, config: Config) -> None:
    from rich.console import Console
    from rich.table import Table

    memory, training, found = estimate.memory, estimate.training, estimate.footprint
    console = Console()
    trained = memory.trained(training)
    table = Table(title="memory of each device", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, size in found.parts().items():
        if size:
            table.add_row(name, in_gib(size))
    table.add_section()
    table.add_row("total", in_gib(found.total))
    if estimate.device_bytes is not None:
        table.add_row("available", in_gib(estimate.device_bytes))
    again = ", activation checkpointing" if training.checkpointing else ""
    facts = (
        f"{config.model.name}: {memory.parameters:,} parameters, {trained:,} trainable",
        f"{estimate.devices} x {training.kind}, strategy {config.strategy.name}, weights in "
        f"{config.model.dtype}, optimizer {training.optimizer}",
        f"micro-batches of up to {training.tokens:,} tokens{again}",
    )
    for fact in facts:
        console.print(fact, highlight=False, soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
