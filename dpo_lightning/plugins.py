"""A user's own modules: imported because the settings name them; they register losses and more.

Only what a named plugin registers, or defines and the settings name in full, can be chosen by a
setting; nothing else is ever imported or called for one. Imports no torch.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from dpo_lightning.errors import UserError
from dpo_lightning.objectives.registry import register_loss

__all__ = [
    "load_plugins",
    "make_callbacks",
    "register_callback",
    "register_loss",
    "register_scorer",
]

Prompt: TypeAlias = str | list[dict[str, str]]
"""A prompt as its row has it: a string, or messages of ``role`` and ``content``."""

ScoreFunction: TypeAlias = Callable[[list[Prompt], list[str]], Sequence[float]]
"""From prompts and as many answers to as many numbers; more is better."""

_Function = TypeVar("_Function", bound=ScoreFunction)
_Maker = TypeVar("_Maker", bound=Callable[[], Any])

SCORERS: dict[str, ScoreFunction] = {}
"""Scorers that plugins registered, by name."""

CALLBACKS: dict[str, Callable[[], Any]] = {}
"""What makes a Lightning callback, as plugins registered it, by name."""


def register_scorer(name: str) -> Callable[[_Function], _Function]:
    """Makes a function known as ``evaluation.scorer=<name>``.

    Args:
        name: Value of the setting.

    Example:
        >>> @register_scorer("brevity")
        ... def brevity(prompts, responses):
        ...     return [-len(response) for response in responses]
    """

    def register(function: _Function) -> _Function:
        SCORERS[name] = function
        return function

    return register


def register_callback(name: str) -> Callable[[_Maker], _Maker]:
    """Makes a Lightning callback known as ``trainer.callbacks=[<name>]``.

    Args:
        name: Value in the setting's list.

    Example:
        >>> @register_callback("bell")
        ... class Bell:  # a lightning.pytorch.Callback
        ...     def on_fit_end(self, trainer, module):
        ...         print("done")
        >>> CALLBACKS.pop("bell").__name__
        'Bell'
    """

    def register(maker: _Maker) -> _Maker:
        CALLBACKS[name] = maker
        return maker

    return register


def make_callbacks(names: Sequence[str]) -> list[Any]:
    """The callbacks that ``trainer.callbacks`` names.

    Raises:
        UserError: If no plugin registered one of them.
    """
    for name in names:
        if name not in CALLBACKS:
            known = ", ".join(CALLBACKS) or "none"
            raise UserError(
                f"trainer.callbacks={name}: no plugin registered it (known: {known}); name the "
                "module that does with plugins=[<module>]"
            )
    return [CALLBACKS[name]() for name in names]


def load_plugins(names: Sequence[str]) -> None:
    """Imports modules, from wherever Python finds them or from the folder of the command.

    Raises:
        UserError: If there is no such module, or it fails.
    """
    here = str(Path.cwd())
    if names and here not in sys.path:
        sys.path.append(here)
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                raise UserError(
                    f"plugins={name}: no such module; it is looked for in {here} and among the "
                    "installed packages"
                ) from error
            raise UserError(f"plugins={name}: {error} ({_place(error)})") from error
        except Exception as error:
            raise UserError(
                f"plugins={name}: {type(error).__name__}: {error} ({_place(error)})"
            ) from error


def find_scorer(name: str, plugins: Sequence[str]) -> ScoreFunction | None:
    """The function that ``evaluation.scorer`` names; None if the name is of another kind.

    Args:
        name: A registered name, or ``module.function`` or ``module:function`` of a plugin.
        plugins: The modules that were loaded.

    Raises:
        UserError: If a plugin is named and has no such function.
    """
    if name in SCORERS:
        return SCORERS[name]
    for plugin in plugins:
        for separator in (":", "."):
            if name.startswith(f"{plugin}{separator}"):
                attribute = name[len(plugin) + 1 :]
                found: Any = getattr(sys.modules[plugin], attribute, None)
                if not callable(found):
                    raise UserError(
                        f"evaluation.scorer={name}: {plugin} has no function {attribute}"
                    )
                function: ScoreFunction = found
                return function
    return None


def _place(error: BaseException) -> str:
    """Returns the place that an exception came from, as ``file:line``."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"
