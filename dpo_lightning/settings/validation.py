"""Checks of a composed config: unknown keys, types, ranges, and what may not be together.

Every problem is one clause that names the key, the value and what would do; :func:`validate` raises
all that it finds as one line. It needs neither torch nor a network: what only a loaded model can
tell (positions, vocabulary, a missing EOS) is checked where the model is loaded.
"""

import dataclasses
import difflib
import functools
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.errors import UserError
from dpo_lightning.objectives.registry import known_losses
from dpo_lightning.settings.combinations import inconsistencies
from dpo_lightning.settings.credentials import is_secret, refusal, secrets_in
from dpo_lightning.settings.schema import LONGEST_NAME, Config, LossConfig, loss_schema, schema

# Groups and Hydra's own keys that a typo may have meant, beside the keys of the schema.
_OTHER_KEYS = ("experiment", "hydra.run.dir", "hydra.sweep.dir")
_LAUNCHER = "hydra/launcher"

_BATCH = (
    "data.batch_size counts the groups of an optimizer step and data.micro_batch_tokens bounds "
    "what a device holds at once; the accumulation follows from them"
)
_BETA = "beta has one place: beta=<value>"

# What people type by habit, by the last part of the key.
_HABITS = {
    "beta": _BETA,
    "pref_beta": _BETA,
    "kl_penalty": _BETA,
    "accumulate_grad_batches": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "train_batch_size": "use data.batch_size=<groups of an optimizer step>",
    "gradient_clip_val": "use optimizer.max_grad_norm=<norm>",
    "gradient_clip_algorithm": "the norm is clipped: optimizer.max_grad_norm=<norm>",
    "learning_rate": "use optimizer.lr=<rate>",
    "lr_scheduler_type": "use optimizer.schedule=<cosine|linear|constant>",
    "warmup_steps": "use optimizer.warmup=<steps, or a share below 1>",
    "warmup_ratio": "use optimizer.warmup=<steps, or a share below 1>",
    "steps": "use trainer.max_steps=<steps>",
    "epochs": "use trainer.max_epochs=<passes>",
    "num_train_epochs": "use trainer.max_epochs=<passes>",
    "max_seq_length": "use data.max_length=<tokens>",
    "max_prompt_length": "use data.max_length=<tokens> with data.truncation=prompt",
    "fp16": "use trainer.precision=<32-true|bf16-mixed>",
    "bf16": "use trainer.precision=bf16-mixed",
    "gpus": "use trainer.devices=<count>",
    "dataset": "use data.train=<file or hub id>",
    "dataset_name": "use data.train=<file or hub id>",
    "train_file": "use data.train=<file or hub id>",
    "model_name_or_path": "use model.pretrained=<folder or hub id>",
    "loss_type": "use loss=<name>; docs/objectives.md has their names elsewhere",
    "loss_weights": "use loss.terms={<loss>: <weight>}",
    "simpo_gamma": "use loss.gamma=<margin>",
    "f_divergence_type": "use loss.f_divergence=<name>",
    "f_alpha_divergence_coef": "use loss.f_alpha=<order>",
    "use_weighting": "use loss.wpo=true",
    "ref_model": "use reference.pretrained=<folder or hub id>",
    "use_peft": "use peft=lora",
    "lora": "use peft=lora",
    "lora_r": "use peft=lora peft.r=<rank>",
    "lora_rank": "use peft=lora peft.r=<rank>",
    "lora_alpha": "use peft=lora peft.alpha=<number>",
    "lora_dropout": "use peft=lora peft.dropout=<share>",
    "lora_target_modules": "use peft=lora peft.target_modules=[<names>]",
    "load_in_4bit": "use peft=lora peft.quantization=nf4",
    "adapter_name_or_path": "use peft=lora peft.adapter=<folder or hub id>",
    "resume_from_checkpoint": "use resume=<checkpoint or run folder>",
    "ckpt_path": "use resume=<checkpoint or run folder>",
    "output_dir": "use hydra.run.dir=<folder>",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key of the schema.

    Attributes:
        kind: The type of a value: ``int``, ``float``, ``bool``, ``str``, ``list``, ``dict``,
            ``object`` for any, or the dataclass of a section.
        optional: Whether null is a value.
        rule: The bounds or choices that the schema gives.
    """

    kind: type
    optional: bool
    rule: Mapping[str, Any]

    @property
    def is_section(self) -> bool:
        """Whether other keys stand below this one."""
        return dataclasses.is_dataclass(self.kind)


def _settings(section: type, prefix: str) -> Iterator[tuple[str, Setting]]:
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        annotation, optional = hints[item.name], False
        if annotation is LossConfig:
            annotation = loss_schema()
        if get_origin(annotation) in (Union, types.UnionType):
            annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
            optional = True
        kind = object if annotation is Any else get_origin(annotation) or annotation
        yield f"{prefix}{item.name}", Setting(kind, optional, item.metadata)
        if dataclasses.is_dataclass(kind):
            yield from _settings(kind, f"{prefix}{item.name}.")


def settings() -> dict[str, Setting]:
    """Every key of the schema, sections included, in the order of the schema."""
    return _all_settings(known_losses())


@functools.cache
def _all_settings(_: tuple[str, ...]) -> dict[str, Setting]:
    return dict(_settings(Config, ""))


def is_known(key: str) -> bool:
    """Whether the schema has the key, or it stands below one whose keys or items are the user's."""
    known = settings()
    parts = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    for end in range(1, len(parts) + 1):
        setting = known.get(".".join(parts[:end]))
        if setting is None:
            return False
        if not setting.is_section:
            rest = parts[end:]
            return setting.kind is dict or all(part.isdigit() for part in rest)
    return True


def unknown_key(key: str) -> str:
    """The answer to a key that the schema does not have; it never shows a value."""
    if is_secret(key):
        return refusal(key)
    leaf = key.rpartition(".")[2]
    if leaf in _HABITS:
        return f"{key}: unknown key; {_HABITS[leaf]}"
    candidates = [*settings(), *_OTHER_KEYS, *_launcher_keys()]
    same_leaf = [name for name in candidates if name.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(key, candidates, n=1)
    if not close:
        by_leaf = {name.rpartition(".")[2]: name for name in reversed(candidates)}
        close = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1)]
    meant = " or ".join(f"`{name}`" for name in same_leaf[:3] or close)
    if not meant:
        return f"{key}: unknown key; `python train.py --cfg job` shows all there are"
    return f"{key}: unknown key; did you mean {meant}?"


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


def unknown_option(group: str, option: str, options: list[str]) -> str:
    """The answer to a choice that a config group does not have."""
    close = difflib.get_close_matches(option, options, n=1)
    hint = f"; did you mean {group}={close[0]}?" if close else ""
    if not hint and group == "model" and ("/" in option or Path(option).exists()):
        hint = "; a folder or a hub id is named by model.pretrained="
    if not hint and group == "data" and ("/" in option or "." in option):
        hint = "; a file or a hub id is named by data.train="
    return f"{group}={option}: no such choice of {group}, there are {', '.join(options)}{hint}"


def shown(value: object) -> str:
    """The value as it is typed on a command line, on one line and not endless."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def expected(setting: Setting) -> str:
    """What a value of this setting may be, in words."""
    rule = setting.rule
    if "choices" in rule:
        text = f"one of {', '.join(rule['choices'])}"
    elif "expected" in rule:
        text = rule["expected"]
    elif setting.kind in (int, float):
        text = "a whole number" if setting.kind is int else "a finite number"
        words = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
        if bounds := [f"{words[name]} {rule[name]}" for name in words if name in rule]:
            text = f"{text}, {' and '.join(bounds)}"
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
        return f"{key}= has no value: needs {expected(setting)}"
    if key == "trainer.precision" and str(value) in ("bf16-true", "bf16"):
        return (
            f"{key}={value}: weights held in bfloat16 are model.dtype=bfloat16; "
            f"the precision is {expected(setting)}"
        )
    close = difflib.get_close_matches(str(value), setting.rule.get("choices", ()), n=1)
    hint = f"; did you mean {key}={close[0]}?" if close else ""
    return f"{key}={shown(value)}: needs {expected(setting)}{hint}"


def config_error(error: OmegaConfBaseException) -> str:
    """The one-line form of what OmegaConf raised about a key or its value."""
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
        return f"{key}: needs {expected(settings()[key])}"
    return wrong_value(key, next(group for group in found.groups() if group is not None))


def _misplaced(raw: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """What the schema has no place for; it is taken out of ``raw``, so that the rest is judged."""
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


def is_import_name(name: str) -> bool:
    """Whether the name has the form of a module's."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name) is not None


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
    """Whether a value of the right type also keeps to the rule of its key."""
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
        yield f"name={shown(config.name)}: needs at most {LONGEST_NAME} printable characters"


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
        cfg: What Hydra composed, with or without its ``hydra`` node.
        multirun: Whether it is one of several that run in this process.
        explicit_run_dir: Whether the run's folder was named, so that a run can be found again.

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
