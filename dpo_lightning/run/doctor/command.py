"""The command ``doctor``: all checks, one table, one exit code."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from dpo_lightning.errors import UserError
from dpo_lightning.run.doctor.checks import Check, Finding, run_checks
from dpo_lightning.run.framed import answer_alone, print_answer, said_help
from dpo_lightning.run.guard import guarded
from dpo_lightning.settings.program import typed

_HELP = """\
usage: {program} [--json]

Checks this machine: versions, devices and driver, bfloat16, the kernels against float32, a ring
between the cards, the folders of outputs and caches, the hub and the wandb server. It takes half
a minute. A server that does not answer is a warning. Nothing is uploaded, no secret is shown.

  --json  print one object, {{"checks": [{{"name", "ok", "detail"}}]}}, and all else on stderr

Exit code 0: a run can be expected to be right here; 2: a check has failed, and says what to do."""

FAILED = 2
"""Exit code where a check has failed."""

_STYLES = {"ok": "green", "warning": "yellow", "failed": "red"}


def main(argv: Sequence[str] | None = None) -> int:
    """Checks this machine.

    Args:
        argv: ``--json`` or nothing; None takes the process's own.

    Returns:
        0, or 2 where a check has failed or the words are wrong.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    if said_help(argv, _HELP, "doctor"):
        return 0
    unknown = [word for word in argv if word != "--json"]
    if unknown:
        program = " ".join(typed("doctor"))
        raise UserError(f"{unknown[0]}: `{program}` takes --json alone; it has no settings")
    with answer_alone():
        checks = list(run_checks(all_checks()))
    found = {"checks": [check.as_dict() for check in checks]}
    print_answer(found, as_json="--json" in argv, show=lambda _: _show(checks))
    return FAILED if any(check.state == "failed" for check in checks) else 0


def all_checks() -> list[tuple[str, Callable[[], Finding]]]:
    """All checks by name, in the order of the table."""
    # Here, because they import torch.
    from dpo_lightning.run.doctor import machine, numbers, ring
    from dpo_lightning.settings.folders import CACHE_VARIABLE, cache_folder

    bench = functools.cache(numbers.Bench.of_this_machine)
    elsewhere = "take another disk with hydra.run.dir=<folder>"
    cache_elsewhere = f"take another disk with {CACHE_VARIABLE}=<folder>"
    return [
        ("versions", machine.check_versions),
        ("devices", machine.check_devices),
        ("driver", machine.check_driver),
        ("bfloat16", machine.check_bfloat16),
        ("attention", lambda: numbers.check_attention(bench())),
        ("head", lambda: numbers.check_head(bench())),
        ("optimizer", lambda: numbers.check_optimizer(bench())),
        ("ring", ring.check_ring),
        ("outputs", lambda: machine.check_folder(machine.OUTPUTS, elsewhere, needs_locks=False)),
        (
            "cache disk",
            lambda: machine.check_folder(cache_folder(None), cache_elsewhere, needs_locks=True),
        ),
        ("cache", machine.check_cache),
        ("hub", machine.check_hub),
        ("wandb", machine.check_wandb),
    ]


def _show(checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="this machine", title_justify="left")
    table.add_column("check")
    table.add_column("")
    table.add_column("what was found", overflow="fold")
    for check in checks:
        table.add_row(check.name, Text(check.state, _STYLES[check.state]), Text(check.detail))
    Console().print(table)
    failed = [check.name for check in checks if check.state == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}")
