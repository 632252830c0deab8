"""Registry of the losses and of the options that each takes. Imports no torch.

A loss is a function `fn(pairs, *, beta, **options) -> Tensor (B,)`; registering it is all that it
takes: its options, their types and defaults are read off its signature, and settings are checked
against them before torch is imported.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, get_args, get_origin

Value = float | int | bool | str

_KINDS = (float, int, bool, str)
_RULES = ("least", "above", "most", "below", "choices", "help")

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a loss.

    Attributes:
        kind: Type of its value: float, int, bool or str.
        default: Its value when nothing is said.
        rule: The bounds `least`, `above`, `most`, `below`, or `choices`; and `help`, a sentence.
    """

    kind: type
    default: Value
    rule: Mapping[str, Any]

    def accepts(self, value: Any) -> bool:
        """True if a value is of the type and within the bounds; a whole number is a float too."""
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind:
            return False
        if "choices" in self.rule and value not in self.rule["choices"]:
            return False
        if self.kind in (float, int):
            number: float = value  # type: ignore[assignment]
            return (
                math.isfinite(number)
                and number >= self.rule.get("least", -math.inf)
                and number > self.rule.get("above", -math.inf)
                and number <= self.rule.get("most", math.inf)
                and number < self.rule.get("below", math.inf)
            )
        return True

    def expected(self) -> str:
        """Describes the accepted values in words."""
        if "choices" in self.rule:
            return f"one of {', '.join(map(str, self.rule['choices']))}"
        text = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}[
            self.kind
        ]
        words = {"least": ">=", "above": ">", "most": "<=", "below": "<"}
        bounds = [f"{words[name]} {self.rule[name]:g}" for name in words if name in self.rule]
        return f"{text} {' and '.join(bounds)}" if bounds else text


@dataclass(frozen=True, slots=True, kw_only=True)
class PairwiseLoss:
    """An entry of `PAIRWISE_LOSSES`.

    Attributes:
        fn: `fn(pairs, *, beta, **options) -> Tensor (B,)`.
        uses_reference: True if it compares the policy with a reference.
        needs_reference: True if it has no meaning without one. A loss that uses one and does not
            need it takes plain log-probabilities in place of log-ratios.
        uses_rejected: False for a loss on the chosen response alone.
        on_margin: True if it sees the two responses through the difference of their scores alone,
            so that another f-divergence can take the place of the reverse KL.
        couples: True if the loss of a pair depends on the other pairs of its batch.
        options: Every option's name and default.
        schema: The same with types and bounds.
        paper: Source of the loss.
        summary: The first line of its docstring.

    Example:
        >>> from dpo_lightning.objectives import PAIRWISE_LOSSES
        >>> entry = PAIRWISE_LOSSES["simpo"]
        >>> entry.uses_reference, entry.options
        (False, {'gamma': 0.5})
    """

    fn: Callable[..., Any]
    uses_reference: bool = True
    needs_reference: bool = False
    uses_rejected: bool = True
    on_margin: bool = False
    couples: bool = False
    options: Mapping[str, Value] = field(default_factory=dict)
    schema: Mapping[str, Option] = field(default_factory=dict)
    paper: str
    summary: str = ""


PAIRWISE_LOSSES: dict[str, PairwiseLoss] = {}
"""Losses on pairs, by name: the package's own, then those of plugins."""

LISTWISE_LOSSES = ("softmax", "plackett_luce")
"""Names of the losses on a whole group; the functions are in `listwise.py`."""

UNPAIRED_LOSSES = ("kto", "bco", "apo_zero_unpaired")
"""Names of the losses on single responses that are desirable or not; see `unpaired.py`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpairedLoss:
    """A loss on single responses.

    Attributes:
        fn: `fn(examples, *, beta, **options) -> Tensor (B,)`.
        anchor: The point that rewards are compared with: `mismatched`, the mean log-ratio of
            responses to other prompts (KTO's z0); `running`, the mean reward so far (BCO's delta);
            `none`, 0.
        options: Every option's name and default.
        schema: The same with types and bounds.
        paper: Source of the loss.
        summary: The first line of its docstring.
    """

    fn: Callable[..., Any]
    anchor: str = "none"
    options: Mapping[str, Value] = field(default_factory=dict)
    schema: Mapping[str, Option] = field(default_factory=dict)
    paper: str
    summary: str = ""


UNPAIRED_ENTRIES: dict[str, UnpairedLoss] = {}
"""The losses of `UNPAIRED_LOSSES` by name, once `unpaired.py` is imported."""

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
"""Names of the f-divergences; the functions are in `divergences.py`."""


def register_loss(
    name: str,
    *,
    paper: str,
    reference: str = "optional",
    uses_rejected: bool = True,
    on_margin: bool = False,
    couples: bool = False,
) -> Callable[[_Function], _Function]:
    """Makes a function known as `loss=<name>`.

    Its options are its keyword-only parameters beside `beta`. Each has a default and a type, one of
    float, int, bool and str; `Annotated[float, {"least": 0, "below": 1}]` gives bounds, and its
    `help` the sentence that the list of settings has for it.

    Args:
        name: Value of the setting.
        paper: Source of the loss.
        reference: `needed`, `optional` (then plain log-probabilities can take the place of
            log-ratios) or `unused`.
        uses_rejected: True if it looks at the rejected response.
        on_margin: True if it sees the responses through `pairs.margin()` alone.
        couples: True if the loss of a pair depends on the other pairs of its batch.

    Raises:
        ValueError: If the name is taken, or a parameter has no usable type or default.

    Example:
        >>> @register_loss("perceptron", paper="Rosenblatt 1958", on_margin=True)
        ... def perceptron(pairs, *, beta, slope: float = 1.0):
        ...     return (-slope * beta * pairs.margin()).clamp(min=0)
        >>> PAIRWISE_LOSSES.pop("perceptron").options
        {'slope': 1.0}
    """
    if reference not in ("needed", "optional", "unused"):
        raise ValueError(f"reference={reference!r}: one of needed, optional, unused")

    def register(function: _Function) -> _Function:
        known = PAIRWISE_LOSSES.get(name)
        taken = name in LISTWISE_LOSSES or name in UNPAIRED_LOSSES
        if taken or (known is not None and not is_same(known.fn, function)):
            raise ValueError(f"loss {name!r} is registered already: choose another name")
        entry = _entry(name, function)
        _check_kinds(name, entry["schema"])
        PAIRWISE_LOSSES[name] = PairwiseLoss(
            fn=function,
            uses_reference=reference != "unused",
            needs_reference=reference == "needed",
            uses_rejected=uses_rejected,
            on_margin=on_margin,
            couples=couples,
            paper=paper,
            **entry,
        )
        return function

    return register


def register_unpaired(
    name: str, *, paper: str, anchor: str = "none"
) -> Callable[[_Function], _Function]:
    """Makes a function one of `UNPAIRED_ENTRIES`; its options are read off its signature.

    Args:
        name: One of `UNPAIRED_LOSSES`.
        paper: Source of the loss.
        anchor: `mismatched`, `running` or `none`, as in :class:`UnpairedLoss`.
    """

    def register(function: _Function) -> _Function:
        UNPAIRED_ENTRIES[name] = UnpairedLoss(
            fn=function, anchor=anchor, paper=paper, **_entry(name, function)
        )
        return function

    return register


def _entry(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The fields of a loss that are read off its function."""
    schema = dict(_options(name, function))
    return {
        "options": {option: entry.default for option, entry in schema.items()},
        "schema": schema,
        "summary": (inspect.getdoc(function) or "").partition("\n")[0],
    }


def check_options(
    name: str, loss: PairwiseLoss | UnpairedLoss, options: Mapping[str, Value]
) -> None:
    """Makes sure that a loss takes these options.

    Args:
        name: Its name.
        loss: Its entry.
        options: Values by name.

    Raises:
        ValueError: If it has no such option, or a value is out of range.
    """
    for option, value in options.items():
        if option not in loss.schema:
            choices = ", ".join(loss.options) or "none"
            raise ValueError(f"loss {name!r} has no option {option!r}: its options are {choices}")
        if not loss.schema[option].accepts(value):
            raise ValueError(f"{option} is {value!r}: needs {loss.schema[option].expected()}")


def losses_with_options() -> dict[str, PairwiseLoss | UnpairedLoss]:
    """The losses that may have options, by name."""
    return {**PAIRWISE_LOSSES, **UNPAIRED_ENTRIES}


def _check_kinds(name: str, schema: Mapping[str, Option]) -> None:
    """Raises where an option of that name has another type in another loss."""
    for option, own in schema.items():
        for other, entry in losses_with_options().items():
            theirs = entry.schema.get(option)
            if other != name and theirs is not None and theirs.kind is not own.kind:
                raise ValueError(
                    f"loss {name!r}: the option {option!r} is a {theirs.kind.__name__} of loss "
                    f"{other!r} and cannot be a {own.kind.__name__} here"
                )


def _options(name: str, function: Callable[..., Any]) -> Iterator[tuple[str, Option]]:
    parameters = list(inspect.signature(function).parameters.values())
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if (
        [p.name for p in parameters[1:2]] != ["beta"]
        or parameters[0].kind not in by_place
        or any(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in parameters[1:])
    ):
        raise ValueError(f"loss {name!r}: its function is called as fn(pairs, *, beta, ...)")
    yield from read_options(f"loss {name!r}", parameters[2:], function)


def read_options(
    what: str, parameters: Iterable[inspect.Parameter], function: Callable[..., Any]
) -> Iterator[tuple[str, Option]]:
    """Yields options by name: keyword-only parameters with a type, a default and, may be, bounds.

    Args:
        what: What takes them, for messages.
        parameters: Those of a function that are options.
        function: The function.

    Raises:
        ValueError: If one has no usable type or default.
    """
    for parameter in parameters:
        annotation = parameter.annotation
        if isinstance(annotation, str):  # from __future__ import annotations
            with contextlib.suppress(Exception):  # what has no meaning there is no type below
                annotation = eval(annotation, getattr(function, "__globals__", {}))
        rule: Mapping[str, Any] = {}
        if get_origin(annotation) is Annotated:
            annotation, *notes = get_args(annotation)
            rule = next((note for note in notes if isinstance(note, Mapping)), rule)
        unknown = rule.keys() - _RULES
        if unknown:
            raise ValueError(
                f"{what}: the option {parameter.name!r} has {', '.join(sorted(unknown))} in "
                f"its bounds, which are {', '.join(_RULES)}"
            )
        option = Option(annotation, parameter.default, rule)
        if annotation not in _KINDS or not option.accepts(parameter.default):
            kinds = ", ".join(kind.__name__ for kind in _KINDS)
            raise ValueError(
                f"{what}: the option {parameter.name!r} needs a type ({kinds}) and a "
                "default of that type and within its bounds"
            )
        default = float(parameter.default) if annotation is float else parameter.default
        yield parameter.name, Option(annotation, default, rule)


def is_same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """True if both are the same function, from a module that was imported again."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)
