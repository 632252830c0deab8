"""A user's own modules: imported because the settings name them; they register losses and more.

Only what a named plugin registers, or defines and the settings name in full, can be chosen by a
setting; nothing else is ever imported or called for one. Imports no torch.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from dpo_lightning.errors import UserError
from dpo_lightning.objectives.registry import Option, is_same, read_options, register_loss

__all__ = [
    "SampleRequest",
    "load_plugins",
    "make_callbacks",
    "register_callback",
    "register_loss",
    "register_optimizer",
    "register_reader",
    "register_sampler",
    "register_scorer",
]

Prompt: TypeAlias = str | list[dict[str, str]]
"""A prompt as its row has it: a string, or messages of ``role`` and ``content``."""

ScoreFunction: TypeAlias = Callable[[list[Prompt], list[str]], Sequence[float]]
"""From prompts and as many answers to as many numbers; more is better."""

ReadRow: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]
"""From a row as its file has it to a row of ``prompt``, ``chosen`` and ``rejected``, or another of
the forms that are known."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Prompts that a sampler answers, and how.

    Attributes:
        prompts: Token ids of each prompt.
        limits: Most tokens of the answer to each.
        temperature: Of the next-token distribution; 0 takes the likeliest token.
        top_p: Share of it that is drawn from; 1 is all of it.
        seed: Of all draws.
        ends: Tokens that end an answer.
        who: ``policy`` or ``reference``.
        tokenizer: The tokenizer of both.
        model: Gives the transformers model, loaded when it is first asked for.
        weights: Gives folder or hub id of its weights, and of an adapter on top of them or None.
        options: ``generation.options`` of the settings.
        seeds: A seed for each prompt, where each answer is to depend on its own alone; None: what
            ``seed`` gives will do. Of 63 bits.
    """

    prompts: Sequence[Sequence[int]]
    limits: Sequence[int]
    temperature: float
    top_p: float
    seed: int
    ends: Sequence[int]
    who: str
    tokenizer: Any
    model: Callable[[], Any]
    weights: Callable[[], tuple[str, str | None]]
    options: Mapping[str, Any]
    seeds: Sequence[int] | None = None


Sampler: TypeAlias = Callable[[SampleRequest], Sequence[Sequence[int]]]
"""From prompts to token ids of as many answers, each with the token that ended it, if one did."""

_Reader = TypeVar("_Reader", bound=ReadRow)
_Function = TypeVar("_Function", bound=ScoreFunction)
_Drawer = TypeVar("_Drawer", bound=Sampler)
_Maker = TypeVar("_Maker", bound=Callable[..., Any])
_Builder = TypeVar("_Builder", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class PluginOptimizer:
    """An optimizer that a plugin registered.

    Attributes:
        build: Makes it of groups of parameters.
        shared: Those of ``SHARED_SETTINGS`` that it asks for.
        schema: Its own options.
    """

    build: Callable[..., Any]
    shared: tuple[str, ...]
    schema: Mapping[str, Option]


SCORERS: dict[str, ScoreFunction] = {}
"""Scorers that plugins registered, by name."""

READERS: dict[str, ReadRow] = {}
"""Readers of rows that plugins registered, by name."""

SAMPLERS: dict[str, Sampler] = {}
"""Samplers of answers that plugins registered, by name."""

OWN_SAMPLERS = ("hf", "vllm")
"""Names of the package's own."""

CALLBACKS: dict[str, Callable[..., Any]] = {}
"""What makes a Lightning callback, as plugins registered it, by name."""

OPTIMIZERS: dict[str, PluginOptimizer] = {}
"""Optimizers that plugins registered, by name."""

OWN_OPTIMIZERS = ("adamw", "adamw_8bit")
"""Names of the package's own."""

SHARED_SETTINGS = ("lr", "betas", "eps", "weight_decay", "seed")
"""Settings that a plugin's optimizer may ask for by naming them."""

_NO_JUDGES = ("none", "endpoint")
_NO_OPTIONS = ("name", "stochastic_rounding", "max_grad_norm", "schedule", "warmup")


def register_scorer(name: str) -> Callable[[_Function], _Function]:
    """Makes a function known as ``evaluation.judge=<name>``.

    Args:
        name: Value of the setting.

    Raises:
        ValueError: If the setting gives the name another meaning.

    Example:
        >>> @register_scorer("brevity")
        ... def brevity(prompts, responses):
        ...     return [-len(response) for response in responses]
    """
    if name in _NO_JUDGES:
        raise ValueError(f"evaluation.judge={name} has a meaning of its own: choose another name")

    def register(function: _Function) -> _Function:
        SCORERS[name] = function
        return function

    return register


def register_reader(name: str) -> Callable[[_Reader], _Reader]:
    """Makes a function known as ``data.format=<name>``.

    It is given each row of a file as a dict, and returns a new one in a form that is read without
    it. Columns that it never looks at are named as unread, or refused, like those of any row.

    Args:
        name: Value of the setting.

    Example:
        >>> @register_reader("verdicts")
        ... def verdicts(row):
        ...     pair = [row["first"], row["second"]]
        ...     best = row["verdict"] == "second"
        ...     return {"prompt": row["ask"], "chosen": pair[best], "rejected": pair[not best]}
        >>> READERS.pop("verdicts").__name__
        'verdicts'
    """

    def register(function: _Reader) -> _Reader:
        READERS[name] = function
        return function

    return register


def register_sampler(name: str) -> Callable[[_Drawer], _Drawer]:
    """Makes a function known as ``generation.backend=<name>``.

    It answers prompts for evaluation and for ``generate``: with an engine of the user's, say. Of
    its answers log-probabilities are computed as of any other's.

    Args:
        name: Value of the setting.

    Raises:
        ValueError: If the setting gives the name another meaning.

    Example:
        >>> @register_sampler("mute")
        ... def mute(request):
        ...     return [[request.ends[0]] for _ in request.prompts]
        >>> SAMPLERS.pop("mute").__name__
        'mute'
    """
    if name in OWN_SAMPLERS or "://" in name:
        raise ValueError(f"generation.backend={name} has a meaning of its own: choose another name")

    def register(function: _Drawer) -> _Drawer:
        SAMPLERS[name] = function
        return function

    return register


def register_callback(name: str) -> Callable[[_Maker], _Maker]:
    """Makes a Lightning callback known as ``trainer.callbacks=[<name>]``.

    Arguments of the class, or of the function that makes it, are given with the name:
    ``trainer.callbacks=[{<name>: {<argument>: <value>}}]``.

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


def register_optimizer(
    name: str, build: _Builder | None = None
) -> _Builder | Callable[[_Builder], _Builder]:
    """Makes a function known as ``optimizer=<name>``.

    It is given the groups of parameters as ``torch.optim`` takes them, each with its
    ``weight_decay``: that of the settings for matrices, 0 for vectors. Of ``lr``, ``betas``,
    ``eps``, ``weight_decay`` and ``seed`` it gets what it names. Its other keyword-only parameters
    are options, ``optimizer.<option>``: each has a default and a type, as those of a loss do.

    Args:
        name: Value of the setting.
        build: The function; None registers what stands below, as a decorator.

    Raises:
        ValueError: If the name is taken, or a parameter can be no option.

    Example:
        >>> @register_optimizer("sgd")
        ... def sgd(groups, *, lr, momentum: float = 0.9):
        ...     import torch
        ...     return torch.optim.SGD(groups, lr=lr, momentum=momentum)
        >>> entry = OPTIMIZERS.pop("sgd")
        >>> entry.shared, {name: option.default for name, option in entry.schema.items()}
        (('lr',), {'momentum': 0.9})
    """

    def register(function: _Builder) -> _Builder:
        known = OPTIMIZERS.get(name)
        if name in OWN_OPTIMIZERS or (known is not None and not is_same(known.build, function)):
            raise ValueError(f"optimizer {name!r} is registered already: choose another name")
        what = f"optimizer {name!r}"
        _, *parameters = inspect.signature(function).parameters.values()
        if any(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in parameters):
            raise ValueError(f"{what}: its function is called as build(groups, *, lr, ...)")
        shared = tuple(p.name for p in parameters if p.name in SHARED_SETTINGS)
        own = [p for p in parameters if p.name not in SHARED_SETTINGS]
        for parameter in own:
            if parameter.name in _NO_OPTIONS:
                raise ValueError(
                    f"{what}: {parameter.name!r} is a setting of every optimizer, and no option"
                )
        schema = dict(read_options(what, own, function))
        for option, entry in schema.items():
            for other, theirs in OPTIMIZERS.items():
                kind = theirs.schema[option].kind if option in theirs.schema else entry.kind
                if other != name and kind is not entry.kind:
                    raise ValueError(
                        f"{what}: the option {option!r} is a {kind.__name__} of optimizer {other!r}"
                    )
        OPTIMIZERS[name] = PluginOptimizer(function, shared, schema)
        return function

    return register if build is None else register(build)


def known_optimizers() -> tuple[str, ...]:
    """Names of all optimizers."""
    return (*OWN_OPTIMIZERS, *OPTIMIZERS)


def callback_entry(entry: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments of an entry of ``trainer.callbacks``.

    Raises:
        UserError: If it is neither a name nor a mapping of one to its arguments.
    """
    [(name, arguments)] = entry.items() if _is_pair(entry) else [(entry, {})]
    if isinstance(name, str) and isinstance(arguments, Mapping):
        return name, {str(key): value for key, value in arguments.items()}
    raise UserError(
        f"trainer.callbacks={str(entry)[:60]}: needs names, such as [bell], or a name with its "
        "arguments, such as [{bell: {volume: 3}}]"
    )


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, Mapping) and len(entry) == 1


def make_callbacks(entries: Sequence[Any], *, others: Sequence[str] = ()) -> list[Any]:
    """The callbacks of plugins that ``trainer.callbacks`` names; ``others`` are known elsewhere.

    Raises:
        UserError: If no plugin registered one of them, or it does not take its arguments.
    """
    pairs = [callback_entry(entry) for entry in entries]
    for name, arguments in pairs:
        if name not in CALLBACKS:
            known = ", ".join([*CALLBACKS, *others]) or "none"
            raise UserError(
                f"trainer.callbacks={name}: unknown callback (known: {known}); name the module "
                "that registers it with plugins=[<module>]"
            )
        try:
            inspect.signature(CALLBACKS[name]).bind(**arguments)
        except TypeError as error:
            raise UserError(f"trainer.callbacks={name}: {error}; fix its arguments") from error
    return [CALLBACKS[name](**arguments) for name, arguments in pairs]


def load_plugins(names: Sequence[str]) -> None:
    """Imports modules, from wherever Python finds them or from the folder of the command.

    Raises:
        UserError: If there is no such module, or it fails.
    """
    here = str(Path.cwd())
    if names and here not in sys.path:
        sys.path.append(here)
    for name in names:
        if name.partition(".")[0] in sys.stdlib_module_names:
            raise UserError(
                f"plugins={name}: a module of Python itself; name one of your own, which registers "
                "or defines what the settings name"
            )
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
    """The function that ``evaluation.judge`` names; None if the name is of another kind.

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
                        f"evaluation.judge={name}: {plugin} has no function {attribute}"
                    )
                where = str(getattr(found, "__module__", None) or type(found).__module__)
                if where.partition(".")[0] != plugin.partition(".")[0]:
                    raise UserError(
                        f"evaluation.judge={name}: {plugin} only imports it from {where}; a "
                        "plugin offers what it defines, or registers with @register_scorer"
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
