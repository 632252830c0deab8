"""Output on the terminal: a header, the final table, the sample answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


def show_header(console: Console, facts: Mapping[str, str]) -> None:
    """Shows the run that is about to start, a line per fact."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(name, Text(value))
    console.print(Panel(grid, title="dpo-lightning", title_align="left", expand=False))


def show_metrics(console: Console, metrics: Mapping[str, float]) -> None:
    """The last value of every metric, train beside eval."""
    names: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        prefix, _, rest = name.partition("/")
        names.setdefault(rest or prefix, {})[prefix] = value
    table = Table(title="result", title_justify="left")
    table.add_column("metric")
    for prefix in ("train", "eval"):
        table.add_column(prefix, justify="right")
    for name, values in names.items():
        if {"train", "eval"} & set(values):
            table.add_row(name, *(_number(values.get(prefix)) for prefix in ("train", "eval")))
    console.print(table)


def show_measured(console: Console, report: Mapping[str, float]) -> None:
    """Shows the measurements of the trained policy at the end."""
    table = Table(title="final evaluation", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in report.items():
        table.add_row(name, _number(value))
    console.print(table)


def show_samples(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], *, longest: int = 300
) -> None:
    """Answers under each other, prompt by prompt; long ones are cut."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for number, row in enumerate(rows):
        if number:
            grid.add_row("", "")
        for column, cell in zip(columns, row, strict=True):
            # The end of a prompt says more than its beginning.
            cut = cell[-longest:] if column == "prompt" else cell[:longest]
            grid.add_row(column, Text(" ".join(cut.split())))
    console.print(Panel(grid, title="answers", title_align="left", expand=False))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
