"""Answers to unknown keys and to values that are refused."""

import dataclasses
import difflib
import re
from collections.abc import Collection
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.objectives.objective import known_losses
from dpo_lightning.plugins import known_optimizers
from dpo_lightning.settings.conduct import LOGGERS
from dpo_lightning.settings.credentials import is_secret, refusal
from dpo_lightning.settings.foreign_answers import Answer
from dpo_lightning.settings.foreign_keys import KEYS
from dpo_lightning.settings.foreign_values import (
    answer_to_value,
    near_miss,
    renamed_loss,
)
from dpo_lightning.settings.keys import Setting, is_known, settings
from dpo_lightning.settings.program import typed
from dpo_lightning.settings.rules import fits

# Groups and Hydra's own keys that a typo may have meant, beside the keys of the schema.
_OTHER_KEYS = ("experiment", "hydra.run.dir", "hydra.sweep.dir")
_LAUNCHER = "hydra/launcher"

_MISSING = object()


def unknown_key(key: str, value: object = _MISSING) -> str:
    """The answer to a key that the schema does not have.

    Args:
        key: As it was typed.
        value: With it; shown only as the value of the key that was meant.
    """
    if is_secret(key):
        return refusal(key)
    known = KEYS.get(key, KEYS.get(key.rpartition(".")[2]))
    if known is not None:
        return f"{key}: unknown key; {_in_words(known, value)}"
    launchers = _launchers_with(key)
    if launchers:
        others = " or ".join(f"hydra/launcher={name}" for name in launchers)
        return f"{key}: only with {others}, which is not chosen"
    candidates = [*settings(), *_OTHER_KEYS, *_launcher_keys()]
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in candidates if name.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(key, candidates, n=1)
    if not close:
        by_leaf = {name.rpartition(".")[2]: name for name in reversed(candidates)}
        close = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1)]
    meant = " or ".join(f"`{name}`" for name in same_leaf[:3] or close)
    if not meant:
        return f"{key}: unknown key; `{' '.join(typed())} --help-all` lists all keys"
    return f"{key}: unknown key; did you mean {meant}?"


def _in_words(answer: Answer, value: object = _MISSING) -> str:
    """The settings that an answer names, with the typed value where it fits, and its sentence."""
    if value is not _MISSING and (known := answer.values.get(shown(value))) is not None:
        return f"use {known}" if known else "leave it out"
    use = answer.use
    if answer.carries and value is not _MISSING:
        use = _carried(use, value)
    return _with_reason(use and f"use {use}", answer.why)


def _with_reason(words: str, why: str) -> str:
    return f"{words} ({why})" if words and why else words or why


def _carried(use: str, value: object) -> str:
    """The settings with a typed value in place of ``<...>``, if the key there takes it."""
    found = re.search(r"(\S+)=\[?<[^>]*>\]?$", use)
    if found is None:
        return use
    key, start = found.group(1), use[: found.start()]
    meant = answer_to_value(key, value)
    if meant is not None and meant.use:
        return f"{start}{meant.use}"
    setting = settings().get(key)
    if setting is None:  # Hydra's own, such as a folder
        fitting = isinstance(value, str)
    elif setting.is_section:
        if key == "loss":
            value = renamed_loss(str(value), known_losses()) or value
        fitting = value in _options(key)
    else:
        fitting = fits(key, value)
    return f"{start}{key}={shown(value)}" if fitting else use


def _options(group: str) -> tuple[str, ...]:
    """The names that a group of settings may have."""
    if group == "loss":
        return known_losses()
    if group == "optimizer":
        return known_optimizers()
    if group == "logger":
        return LOGGERS
    rule = settings()[f"{group}.{'kind' if f'{group}.kind' in settings() else 'name'}"].rule
    return tuple(rule.get("choices", ()))


def _launchers_with(key: str) -> list[str]:
    """The project's launchers that have a key."""
    store = ConfigStore.instance()
    if not key.startswith("hydra.launcher."):
        return []
    if store.get_type(_LAUNCHER) != ObjectType.GROUP:
        return []
    name = key.removeprefix("hydra.launcher.")
    found = {option: store.load(f"{_LAUNCHER}/{option}") for option in store.list(_LAUNCHER)}
    return [
        option.removesuffix(".yaml")
        for option, node in found.items()
        if node.provider == "dpo_lightning" and name in map(str, node.node)
    ]


def _launcher_keys() -> list[str]:
    """The keys of the project's launchers, which Hydra finds as plugins."""
    store = ConfigStore.instance()
    keys: dict[str, None] = {}
    for name in store.list(_LAUNCHER) if store.get_type(_LAUNCHER) == ObjectType.GROUP else ():
        found = store.load(f"{_LAUNCHER}/{name}")
        if found.provider == "dpo_lightning":
            keys |= dict.fromkeys(
                f"hydra.launcher.{key}" for key in map(str, found.node) if key[0] != "_"
            )
    return list(keys)


def unknown_option(group: str, option: str, options: Collection[str]) -> str:
    """The answer to a choice that a config group does not have."""
    return (
        f"{group}={option}: unknown {group}; available: {', '.join(options)}"
        f"{_hint(group, group, option, options)}"
    )


def loss_hint(name: str) -> str:
    """A hint at the ``loss.name`` that was meant, behind its semicolon; empty without one."""
    return _hint("loss.name", "loss", name, known_losses())


def _hint(key: str, group: str, typed: object, options: Collection[str]) -> str:
    """The choice that was meant, behind a semicolon; empty where none is known."""
    option = str(typed)
    known = answer_to_value(group, typed)
    if known is not None:
        sure = known.use and "<" not in known.use
        words = f"did you mean {known.use}?" if sure else known.use and f"use {known.use}"
        return f"; {_with_reason(words, known.why)}"
    if group == "loss":
        found = renamed_loss(option, options) or near_miss(option, options)
        return f"; did you mean {key}={found}?" if found else ""
    close = difflib.get_close_matches(option, options, n=1)
    if close:
        return f"; did you mean {key}={close[0]}?"
    if group == "model" and ("/" in option or Path(option).exists()):
        return "; a folder or a hub id is named by model.pretrained="
    if group == "data" and ("/" in option or "." in option):
        return "; a file or a hub id is named by data.train="
    return ""


def shown(value: object) -> str:
    """The value as it is typed on a command line, on one line and not endless."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, float):
        text = f"{value:g}"
    elif isinstance(value, list):
        text = f"[{','.join(map(shown, value))}]"
    else:
        text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def expected(setting: Setting) -> str:
    """Describes the accepted values of a setting in words."""
    rule = setting.rule
    if "choices" in rule:
        text = f"one of {', '.join(rule['choices'])}"
    elif "expected" in rule:
        text = rule["expected"]
    elif setting.kind in (int, float):
        text = "a whole number" if setting.kind is int else "a finite number"
        words = {"least": ">=", "above": ">", "most": "<=", "below": "<"}
        if bounds := [f"{words[name]} {rule[name]}" for name in words if name in rule]:
            text = f"{text} {' and '.join(bounds)}"
    elif setting.is_section:
        text = f"keys below it ({', '.join(f.name for f in dataclasses.fields(setting.kind))})"
    else:
        text = {bool: "true or false", str: "a text", list: "a list", dict: "a mapping"}[
            setting.kind
        ]
    return f"{text}, or null" if setting.optional else text


def wrong_value(key: str, value: object) -> str:
    """The answer to a value that the key does not take."""
    setting = settings()[key]
    if value == "":
        return f"{key}= has no value: must be {expected(setting)}"
    choices = setting.rule.get("choices", ())
    if key in ("optimizer.name", "logger.name"):
        choices = _options(key.removesuffix(".name"))
    hint = _hint(key, key.removesuffix(".name"), value, choices)
    return f"{key}={shown(value)}: must be {expected(setting)}{hint}"


def config_error(error: OmegaConfBaseException) -> str:
    """Puts an error of OmegaConf about a key or its value into one line."""
    key = re.sub(r"\[\d+\].*$", "", str(error.full_key or ""))
    text = str(error).partition("\n")[0]
    if key and "Key '" in text and not is_known(key):
        return unknown_key(key)
    if key not in settings() or "nterpolation" in text:
        return f"{key}: {text}" if key else text
    if "not Optional" in text or "value 'None'" in text:
        return wrong_value(key, None)
    found = re.search(r"^Value '(.*)' (?:of type|is not)|: '(.*)'$|value: (.*)$", text)
    if found is None:
        return f"{key}: must be {expected(settings()[key])}"
    return wrong_value(key, next(group for group in found.groups() if group is not None))
