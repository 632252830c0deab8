"""Rules of single values: bounds and choices of the schema, and checks that these cannot state."""

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

from dpo_lightning.data.dates import is_date
from dpo_lightning.data.forms import NAMES
from dpo_lightning.data.source_names import entries, eval_sets
from dpo_lightning.plugins import READERS, known_optimizers
from dpo_lightning.settings.addresses import is_http_address
from dpo_lightning.settings.conduct import PRUNE_METRICS, scales_with_beta
from dpo_lightning.settings.generation import is_backend
from dpo_lightning.settings.judging import is_price
from dpo_lightning.settings.keys import is_import_name, settings
from dpo_lightning.settings.logger_group import are_loggers
from dpo_lightning.settings.metric_names import is_set_name


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


def _valid_source(value: object) -> bool:
    try:
        return bool(entries(value))
    except ValueError:
        return False


def _valid_eval(value: object) -> bool:
    sets = eval_sets(value)
    named = all(name is None or is_set_name(name) for name in sets)
    return bool(sets) and named and all(map(_valid_source, sets.values()))


def _valid_columns(value: dict[str, Any]) -> bool:
    return all(
        isinstance(column, str)
        or (isinstance(column, list) and all(isinstance(name, str) for name in column))
        for column in value.values()
    )


def _valid_bounds(value: list[float]) -> bool:
    return len(value) == 2 and 0 < value[0] <= 1 <= value[1] < math.inf


def _valid_rungs(value: list[float]) -> bool:
    return len(value) > 0 and value == sorted(set(value)) and all(0 < at < 1 for at in value)


# Rules that bounds and choices cannot state; the schema's ``expected`` describes each.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "data.columns": _valid_columns,
    "data.density_ratio": _valid_bounds,
    "data.eval": _valid_eval,
    "data.format": lambda value: value in NAMES or value in READERS,
    "data.ignore_fields": all,
    "data.template_date": is_date,
    "data.train": _valid_source,
    "evaluation.judge_key_variable": lambda value: re.fullmatch(r"[A-Za-z_]\w*", value) is not None,
    "evaluation.judge_price": is_price,
    "evaluation.judge_url": is_http_address,
    "generation.backend": is_backend,
    "logger.name": are_loggers,
    "optimizer.betas": lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
    "optimizer.name": lambda value: value in known_optimizers(),
    "optimizer.warmup": _valid_warmup,
    "peft.init": lambda value: value in ("kaiming", "gaussian"),
    "peft.target_modules": lambda value: len(value) > 0 and all(value),
    "plugins": lambda value: all(is_import_name(name) for name in value),
    "sweep.prune_at": _valid_rungs,
    "sweep.prune_metric": lambda value: value in PRUNE_METRICS or scales_with_beta(value),
    "sweep.prune_within": lambda value: all(name in settings() for name in value),
    "sweep.trials": lambda value: isinstance(value, str | list) and len(value) > 0,
    "trainer.devices": _valid_devices,
    "trainer.max_time": _valid_max_time,
}


def accepts(key: str, value: Any) -> bool:
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


def fits(key: str, value: object) -> bool:
    """True if the setting takes a value as it was read from a command line or a file."""
    setting = settings().get(key)
    if setting is None or setting.is_section or value is None:
        return False
    kinds = (int, float) if setting.kind is float else (setting.kind,)
    if isinstance(value, bool) and setting.kind not in (bool, object):
        return False
    with contextlib.suppress(OverflowError):  # a whole number beyond all floats
        return isinstance(value, kinds) and accepts(key, value)
    return False
