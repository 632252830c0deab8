"""Answers to unknown keys and to values that are refused."""

import dataclasses
import difflib
import re
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.settings.credentials import is_secret, refusal
from dpo_lightning.settings.keys import Setting, is_known, settings
from dpo_lightning.settings.program import typed

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
        return f"{key}: unknown key; `{' '.join(typed())} --cfg job` shows all there are"
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
    return f"{group}={option}: unknown {group}; available: {', '.join(options)}{hint}"


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
    if key == "trainer.precision" and str(value) in ("bf16-true", "bf16"):
        return (
            f"{key}={value}: weights held in bfloat16 are model.dtype=bfloat16; "
            f"the precision is {expected(setting)}"
        )
    close = difflib.get_close_matches(str(value), setting.rule.get("choices", ()), n=1)
    hint = f"; did you mean {key}={close[0]}?" if close else ""
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
