"""Checks of a composed config: unknown keys, types, ranges, contradictions.

Every problem is one clause that names the key, the value and what would do; :func:`validate` raises
all that it finds as one line. It needs neither torch nor a network: what only a loaded model can
tell (positions, vocabulary, a missing EOS) is checked where the model is loaded.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.errors import UserError
from dpo_lightning.settings.combinations import inconsistencies
from dpo_lightning.settings.credentials import refusal, secrets_in
from dpo_lightning.settings.keys import is_import_name, settings
from dpo_lightning.settings.messages import config_error, shown, unknown_key, wrong_value
from dpo_lightning.settings.names import LONGEST_NAME
from dpo_lightning.settings.schema import Config
from dpo_lightning.settings.store import schema


def _misplaced(raw: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yields unknown keys, and takes them out of ``raw`` so that the rest is judged."""
    for key in list(raw):
        dotted, value = f"{prefix}{key}", raw[key]
        setting = settings().get(dotted)
        if setting is None:
            del raw[key]
            yield unknown_key(dotted)
        elif setting.is_section and isinstance(value, dict):
            yield from _misplaced(value, f"{dotted}.")
        elif setting.is_section:
            del raw[key]
            yield wrong_value(dotted, value)


def _valid_devices(value: object) -> bool:
    if isinstance(value, str):
        return value == "auto" or re.fullmatch(r"[1-9]\d*|\d+(,\d+)+,?|\d+,", value) is not None
    if isinstance(value, list):
        numbers = [item for item in value if type(item) is int and item >= 0]
        return 0 < len(value) == len(set(numbers))
    return type(value) is int and value >= 1


def _valid_warmup(value: float) -> bool:
    return 0 <= value < 1 or (math.isfinite(value) and value >= 1 and value == int(value))


def _valid_max_time(value: str) -> bool:
    return re.fullmatch(r"\d\d:\d\d:\d\d:\d\d", value) is not None and any(
        int(part) for part in value.split(":")
    )


# Rules that bounds and choices cannot state; the schema's ``expected`` describes each.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "optimizer.betas": lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
    "optimizer.warmup": _valid_warmup,
    "peft.init": lambda value: value in ("kaiming", "gaussian"),
    "peft.target_modules": lambda value: len(value) > 0 and all(value),
    "plugins": lambda value: all(is_import_name(name) for name in value),
    "trainer.devices": _valid_devices,
    "trainer.max_time": _valid_max_time,
}


def _accepts(key: str, value: Any) -> bool:
    """True if a value of the right type also keeps to the rule of its key."""
    setting = settings()[key]
    rule = setting.rule
    if value is None:
        return setting.optional
    if key in _CHECKS:
        return _CHECKS[key](value)
    if "choices" in rule:
        return value in rule["choices"]
    if setting.kind in (int, float):
        return (
            math.isfinite(value)
            and value >= rule.get("least", -math.inf)
            and value > rule.get("above", -math.inf)
            and value <= rule.get("most", math.inf)
            and value < rule.get("below", math.inf)
        )
    return value != "" if setting.kind is str else True


def _wrong_values(config: Config) -> Iterator[str]:
    for key, setting in settings().items():
        if not setting.is_section:
            value = functools.reduce(getattr, key.split("."), config)
            if not _accepts(key, value):
                yield wrong_value(key, value)
    if config.name is not None and (
        len(config.name) > LONGEST_NAME or not config.name.isprintable()
    ):
        yield f"name={shown(config.name)}: must have at most {LONGEST_NAME} printable characters"


def _normalised(config: Config, *, multirun: bool) -> None:
    """Give each value its one form, so that what reads the config has no cases."""
    for section, key in (
        (config, "resume"),
        (config.model, "pretrained"),
        (config.model, "tokenizer"),
        (config.model, "config"),
        (config.peft, "adapter"),
        (config.reference, "pretrained"),
        (config.reference, "adapter"),
        (config.reference, "cache_dir"),
        (config.evaluation, "scorer"),
        (config.data, "train"),
        (config.data, "eval"),
        (config.data, "chat_template"),
    ):
        value = getattr(section, key)
        if value is not None and value.startswith("~"):
            setattr(section, key, str(Path(value).expanduser()))
    devices = config.trainer.devices
    if isinstance(devices, str) and devices != "auto":
        numbers = [int(number) for number in devices.split(",") if number]
        config.trainer.devices = numbers if "," in devices else numbers[0]
    if multirun and devices == "auto":
        # The trials of an in-process sweep share this process: each may use one device only.
        config.trainer.devices = 1


def validate(cfg: DictConfig, *, multirun: bool = False, explicit_run_dir: bool = False) -> Config:
    """Check a composed config and return it as plain typed objects.

    Args:
        cfg: The config, as Hydra composed it, with or without its ``hydra`` node.
        multirun: True if it is one of several that run in this process.
        explicit_run_dir: True if the run's folder was named, so that a run can be found again.

    Returns:
        The settings; paths with ``~`` are expanded and ``trainer.devices`` is a count, a list of
        numbers or ``auto``.

    Raises:
        UserError: All problems that were found, in one line.
    """
    try:
        # Hydra's own node holds values that exist only inside a job.
        own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        raw = OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(config_error(error)) from error
    assert isinstance(raw, dict)
    # Nothing further is said of such a config: whatever else is wrong, its values may be shown.
    if secrets := list(secrets_in(raw, "")):
        raise UserError("; ".join(map(refusal, dict.fromkeys(secrets))))
    problems = list(_misplaced(raw))
    try:
        merged = OmegaConf.merge(schema(), raw)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        problems.append(config_error(error))
        raise UserError("; ".join(problems)) from error
    assert isinstance(config, Config)
    problems += _wrong_values(config)
    if not problems:
        _normalised(config, multirun=multirun)
        problems += inconsistencies(config, multirun=multirun, explicit_run_dir=explicit_run_dir)
    if problems:
        raise UserError("; ".join(problems))
    return config
