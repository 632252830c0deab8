"""Checks of a composed config: unknown keys, types, ranges, contradictions.

Every problem is one clause that names the key, the value and what would do; :func:`validate` raises
all that it finds as one line. It needs neither torch nor a network: what only a loaded model can
tell (positions, vocabulary, a missing EOS) is checked where the model is loaded.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.errors import UserError
from dpo_lightning.settings.combinations import inconsistencies
from dpo_lightning.settings.credentials import refusal, secrets_in
from dpo_lightning.settings.judging import judge_named
from dpo_lightning.settings.keys import settings
from dpo_lightning.settings.logger_group import one_form
from dpo_lightning.settings.messages import config_error, shown, unknown_key, wrong_value
from dpo_lightning.settings.names import LONGEST_NAME
from dpo_lightning.settings.renamed import say_renamed
from dpo_lightning.settings.rules import accepts
from dpo_lightning.settings.schema import Config
from dpo_lightning.settings.store import schema


def _misplaced(raw: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yields unknown keys, and takes them out of ``raw`` so that the rest is judged."""
    for key in list(raw):
        dotted, value = f"{prefix}{key}", raw[key]
        setting = settings().get(dotted)
        if setting is None:
            del raw[key]
            yield unknown_key(dotted, value)
        elif setting.is_section and isinstance(value, dict):
            yield from _misplaced(value, f"{dotted}.")
        elif setting.is_section:
            del raw[key]
            yield wrong_value(dotted, value)


def _wrong_values(config: Config) -> Iterator[str]:
    for key, setting in settings().items():
        if not setting.is_section:
            value = functools.reduce(getattr, key.split("."), config)
            if not accepts(key, value):
                yield wrong_value(key, value)
    if config.name is not None and (
        len(config.name) > LONGEST_NAME or not config.name.isprintable()
    ):
        yield f"name={shown(config.name)}: must have at most {LONGEST_NAME} printable characters"


def _at_home(value: Any) -> Any:
    """A source with each ``~`` as the user's home."""
    if isinstance(value, str):
        return str(Path(value).expanduser()) if value.startswith("~") else value
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "path" not in value:
        return {name: _at_home(source) for name, source in value.items()}
    return {**value, "path": _at_home(value["path"])}


def _normalised(config: Config, *, multirun: bool) -> None:
    """Give each value its one form, so that what reads the config has no cases."""
    evaluation = config.evaluation
    if evaluation.scorer is not None and evaluation.judge in (None, evaluation.scorer):
        say_renamed("evaluation.scorer", "evaluation.judge")
        evaluation.judge, evaluation.scorer = evaluation.scorer, None
    evaluation.judge = judge_named(evaluation) if evaluation.scorer is None else evaluation.judge
    for section, key in (
        (config, "resume"),
        (config.model, "pretrained"),
        (config.model, "tokenizer"),
        (config.model, "config"),
        (config.peft, "adapter"),
        (config.reference, "pretrained"),
        (config.reference, "adapter"),
        (config.reference, "cache_dir"),
        (config.evaluation, "judge"),
        (config.evaluation, "judge_prompt"),
        (config.data, "chat_template"),
    ):
        value = getattr(section, key)
        if value is not None and value.startswith("~"):
            setattr(section, key, str(Path(value).expanduser()))
    if config.trainer.precision == "bf16-true":
        config.model.dtype = "bfloat16"  # which is what it means
    config.data.train = _at_home(config.data.train)
    config.data.eval = _at_home(config.data.eval)
    config.logger.name = one_form(config.logger.name)
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
