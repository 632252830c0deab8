"""The commands: ``dpo-lightning train …``, or ``python -m dpo_lightning train …``.

A command is imported when it is asked for, and nothing here imports Hydra or torch.
"""

import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence

import dpo_lightning

# Hydra then raises its errors instead of printing several lines and exiting with 1.
os.environ["HYDRA_FULL_ERROR"] = "1"


def _train(argv: list[str]) -> int:
    from dpo_lightning.cli import main

    return main(argv)


def _inspect(argv: list[str]) -> int:
    from dpo_lightning.run.inspect.command import main

    return main(argv)


def _preflight(argv: list[str]) -> int:
    from dpo_lightning.preflight import main

    return main(argv)


def _evaluate(argv: list[str]) -> int:
    from dpo_lightning.run.evaluate.command import main

    return main(argv)


def _compare(argv: list[str]) -> int:
    from dpo_lightning.sweeps.compare.command import main

    return main(argv)


def _generate(argv: list[str]) -> int:
    from dpo_lightning.sweeps.generate.command import main

    return main(argv)


def _chat(argv: list[str]) -> int:
    from dpo_lightning.run.answering.chat import main

    return main(argv)


def _interpolate(argv: list[str]) -> int:
    from dpo_lightning.run.interpolate.command import main

    return main(argv)


def _judge(argv: list[str]) -> int:
    from dpo_lightning.run.judge.command import main

    return main(argv)


def _report(argv: list[str]) -> int:
    from dpo_lightning.sweeps.report.write import main

    return main(argv)


def _doctor(argv: list[str]) -> int:
    from dpo_lightning.run.doctor.command import main

    return main(argv)


def _export(argv: list[str]) -> int:
    from dpo_lightning.run.share.export_command import main

    return main(argv)


def _push(argv: list[str]) -> int:
    from dpo_lightning.run.share.push_command import main

    return main(argv)


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "train": ("one run, or a sweep with -m", _train),
    "inspect": ("check the rows and the plan of a run before starting it", _inspect),
    "preflight": ("how much memory a run would take", _preflight),
    "evaluate": ("a trained policy on held-out rows: metrics, slices, answers", _evaluate),
    "compare": ("trained policies on the same rows, tested row by row", _compare),
    "generate": (
        "draw answers of a policy, or of all trials of a sweep, for a judge or a benchmark",
        _generate,
    ),
    "chat": ("talk to a policy and its reference, side by side", _chat),
    "interpolate": ("the frontier of one policy: other betas without training", _interpolate),
    "judge": ("judge answers that exist already", _judge),
    "report": ("rewrite the report of a sweep, or the page of a run", _report),
    "export": (
        "write a folder that transformers, PEFT and vLLM load; --merge: one whole model",
        _export,
    ),
    "push": ("upload a policy to the hub; --dry-run shows what would be uploaded", _push),
    "doctor": ("check this machine: versions, devices, kernels, disk, servers", _doctor),
}
"""What each command does, and its function."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that is named first.

    Args:
        argv: The arguments, without the program's name; None takes the process's own.

    Returns:
        The exit code of the command; 2 where there is none of that name.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until a command listens, Ctrl-C ends it without a traceback of what is being imported.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"dpo-lightning {dpo_lightning.__version__}")
        return 0
    if words[0] in ("-sc", "--shell-completion"):
        return _complete(words)
    if words[0] in COMMANDS:
        return COMMANDS[words[0]][1](words[1:])
    print(f"error: {_unknown(words[0])}", file=sys.stderr)
    return 2


def _complete(words: list[str]) -> int:
    """Completion by Hydra, with the names of the commands ahead of settings."""
    from dpo_lightning.settings.program import completed

    if any(word.startswith("query=") for word in words):
        names, line = completed(os.environ.get("COMP_LINE", ""), COMMANDS)
        if line is None:
            print("\n".join(names))
            return 0
        os.environ["COMP_LINE"] = line
    return _train(words)


def _help() -> str:
    from dpo_lightning.settings.program import completion, typed

    lines = {" ".join(typed(name)): what for name, (what, _) in COMMANDS.items()}
    width = max(map(len, lines))
    return "\n".join(
        [
            "Direct Preference Optimization experiments.\n",
            *(f"  {line:{width}}  {what}" for line, what in lines.items()),
            f"\n`{' '.join(typed())} --help` lists the main settings, --version shows the version.",
            *([] if (line := completion()) is None else [f"Completion in bash: {line}"]),
        ]
    )


def _unknown(word: str) -> str:
    """The answer to a first word that is no command; a value is never shown."""
    from dpo_lightning.settings.credentials import redact
    from dpo_lightning.settings.messages import shown
    from dpo_lightning.settings.program import typed

    key, equals, _ = word.partition("=")
    word = redact(shown(f"{key}{equals}{'…' if equals else ''}"))
    there = f"available: {', '.join(COMMANDS)}"
    if equals or key.startswith("-"):
        return f"{word}: a command comes first, such as `{' '.join(typed())}`; {there}"
    close = difflib.get_close_matches(key.lower(), COMMANDS, n=1)
    return f"{word}: unknown command; " + (f"did you mean `{close[0]}`?" if close else there)


if __name__ == "__main__":
    sys.exit(main())
