"""Models that a user names: a run, an export, an adapter, a local model or a hub id; told apart.

Every command that computes from a trained policy opens it here, so that all of them take the same
names. Nothing is loaded yet, and nothing here imports torch: :mod:`dpo_lightning.run.loaded` does
the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dpo_lightning.errors import UserError
from dpo_lightning.files import RESULT_FILE, read_json
from dpo_lightning.run.finished import EXPORT, export_of
from dpo_lightning.run.inputs import ask_hub
from dpo_lightning.settings.blocks import quoted
from dpo_lightning.settings.compose import compose_one
from dpo_lightning.settings.model_folders import found_instead, missing_weights
from dpo_lightning.settings.recorded import SETTINGS_FILE
from dpo_lightning.settings.schema import BASE, Config

Kind = Literal["run", "model", "adapter"]

ADAPTER_FILE = "adapter_config.json"
_BASE = "base_model_name_or_path"
MODEL_FILE = "config.json"

# Any of them makes a folder one of a run, or of a sweep, whose settings and reference are known.
_OF_A_RUN = (SETTINGS_FILE, RESULT_FILE, "checkpoints", ".hydra", "sweep.json", "multirun.yaml")
# The hub's old ids of one word are left out: they cannot be told from a folder that is missing.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Opened:
    """A policy that was named, and as much as is known of it.

    Attributes:
        name: Its name as it was typed.
        kind: ``run`` (with settings and reference), ``model`` (whole weights) or ``adapter``.
        weights: Folder or hub id of whole weights; of an adapter those of its base, None where
            only the run's settings say which they are.
        adapter: Folder or hub id of the adapter that is on in the policy; None without one.
        reference: Folder or hub id of the model that it is compared with; None: of a run the one
            of its settings, of an adapter its base, the adapter off.
        tokenizer: Folder or hub id of the tokenizer, which brings its chat template along; None:
            that of the base.
        run: The run's folder; None for what is not one.
        words: Command line of a run with this policy and reference, as far as it is known.
    """

    name: str
    kind: Kind
    weights: str | None
    adapter: str | None
    reference: str | None
    tokenizer: str | None
    run: Path | None
    words: tuple[str, ...]

    @property
    def trained_beta(self) -> bool:
        """True if it is known at which beta the policy was trained."""
        return self.run is not None


def open_named(
    name: str, *, reference: str | None = None, key: str = "run", alone: bool = False
) -> Opened:
    """Finds what a user named.

    Args:
        name: A run's folder, a folder with a model or a LoRA adapter, or a hub id (owner/name).
        reference: Another name, of the model that it is compared with; runs have their own.
        key: The word or flag that was behind it, for errors.
        alone: True if whole weights need nothing to be compared with.

    Raises:
        UserError: If it is nothing that could answer, or its reference is missing or given twice.
    """
    return _opened(name, find_weights(name, key), reference, key, alone=alone)


def open_all(names: Sequence[str], *, reference: str | None = None) -> list[Opened]:
    """Finds all that a user named, runs and models beside each other.

    Args:
        names: As :func:`open_named` takes them.
        reference: Of those that are no runs.

    Raises:
        UserError: If one is nothing that could answer, or the reference is that of none.
    """
    found = [find_weights(name, "run") for name in names]
    if reference is not None and all(own.run is not None for own in found):
        raise UserError(
            f"--reference {reference}: all of these are runs, which have references of their own; "
            "leave it out"
        )
    return [
        _opened(name, own, None if own.run is not None else reference, "run")
        for name, own in zip(names, found, strict=True)
    ]


def _opened(
    name: str, found: FoundWeights, reference: str | None, key: str, *, alone: bool = False
) -> Opened:
    if found.run is not None:
        return _run(name, found, reference, key)
    if found.adapter is not None:
        return _adapter(name, found, reference, key)
    if alone and reference is None:
        source = str(found.weights)
        words = (_word("model.pretrained", source),)
        return Opened(name, "model", source, None, None, source, None, words)
    return _model(name, str(found.weights), reference, key)


def compose_opened(opened: Opened, typed: Sequence[str] = ()) -> Config:
    """The checked settings under which a policy is looked at.

    Rows that ``data.eval`` among the typed settings names are all held out: they stand in the
    settings as ``data.train``, of which nothing is trained on.

    Args:
        opened: The policy.
        typed: Settings that were typed beside it.

    Raises:
        UserError: If they are wrong, or a run's settings are gone.
    """
    if opened.run is not None and not (opened.run / SETTINGS_FILE).is_file():
        raise UserError(f"run={opened.run}: its {SETTINGS_FILE} is gone, which describes it")
    if not names_rows(typed):
        return compose_one([*opened.words, *typed])
    try:
        return compose_one([*opened.words, *_all_held_out(typed)])
    except UserError as error:
        # Named as the user named it.
        raise UserError(str(error).replace("data.train", "data.eval")) from error


def names_rows(typed: Sequence[str]) -> bool:
    """True if rows to look at are among the typed settings."""
    return any(key_of(word) == "data.eval" for word in typed)


def key_of(word: str) -> str:
    """The key of a setting as it was typed."""
    return word.partition("=")[0].lstrip("+")


def last_step(run: Path) -> tuple[int, int] | None:
    """Steps that a run has taken, and those that it was planned for; None where it does not say.

    Args:
        run: Its folder.
    """
    taken = read_json(run / RESULT_FILE).get("step")
    try:
        settings = yaml.safe_load((run / SETTINGS_FILE).read_bytes())
        planned = settings["trainer"]["max_steps"]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
    if not isinstance(taken, int) or not isinstance(planned, int):
        return None
    return taken, planned


def _all_held_out(typed: Sequence[str]) -> list[str]:
    """The typed settings, with the rows of ``data.eval`` in the place of the training rows."""
    own = {key_of(word) for word in typed}
    words = ["data.eval=null", "data.eval_split=null"]
    # Of another source, of which the run's names are no parts.
    words += [f"{key}=null" for key in ("data.subset", "data.revision") if key not in own]
    if "data.eval_split" not in own:
        words.append("data.train_split=train")
    for word in typed:
        key, equals, value = word.partition("=")
        key = {"data.eval": "data.train", "data.eval_split": "data.train_split"}.get(key, key)
        words.append(f"{key}{equals}{value}")
    return words


# Kinds ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FoundWeights:
    """Weights behind a name.

    Attributes:
        run: The run's folder that they are of, if it is one.
        weights: Folder or hub id of whole weights; None for an adapter.
        adapter: Folder or hub id of an adapter; None for whole weights.
        base: Name of the adapter's base model, if it has one.
    """

    run: Path | None
    weights: str | None
    adapter: str | None
    base: str | None = None


def find_weights(name: str, key: str) -> FoundWeights:
    """Finds the weights behind a name.

    Args:
        name: As :func:`open_named` takes it.
        key: The word or flag that was behind it, for errors.

    Raises:
        UserError: If there are none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        run = path if any((path / mark).exists() for mark in _OF_A_RUN) else None
        folder = path if run is None else export_of(path, key=key)
        return _in_folder(folder, run, key)
    if path.exists():
        raise UserError(
            f"{key}={name}: it is a file; name the folder of a run, or of a model or an adapter in "
            "safetensors"
        )
    if not may_be_on_hub(name):
        raise UserError(
            f"{key}={name}: no such folder; name a run's, such as outputs/runs/<run>, one with a "
            "model or an adapter, or a hub id (owner/name)"
        )
    config = _hub_adapter(name)
    return (
        FoundWeights(None, name, None)
        if config is None
        else FoundWeights(None, None, name, _base(config))
    )


def may_be_on_hub(name: str) -> bool:
    """True if a name that is no path of this machine is a hub id, and no mistyped folder."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).expanduser().parent.is_dir()


def _in_folder(folder: Path, run: Path | None, key: str) -> FoundWeights:
    fault = found_instead(key, folder, (MODEL_FILE, ADAPTER_FILE))
    if fault is None and (folder / ADAPTER_FILE).is_file():
        config = read_json(folder / ADAPTER_FILE)
        if config:
            return FoundWeights(run, None, str(folder), _base(config))
        fault = f"its {ADAPTER_FILE} is damaged"
    fault = fault or missing_weights(folder)
    if fault is not None:
        raise UserError(f"{key}={folder}: {fault}")
    return FoundWeights(run, str(folder), None)


def _base(config: Mapping[str, Any]) -> str | None:
    base = config.get(_BASE)
    return base if isinstance(base, str) and base else None


def _run(name: str, found: FoundWeights, reference: str | None, key: str) -> Opened:
    assert found.run is not None
    if reference is not None:
        raise UserError(
            f"--reference {reference}: {key}={name} is a run, which has a reference of its own; "
            f"leave it out, or name {found.run / EXPORT} alone"
        )
    return Opened(
        name,
        "run",
        weights=found.weights or found.base,
        adapter=found.adapter,
        reference=None,
        tokenizer=found.weights or found.adapter,
        run=found.run,
        words=("--config", str(found.run / SETTINGS_FILE)),
    )


def _model(name: str, source: str, reference: str | None, key: str) -> Opened:
    if reference is None:
        run = Path(source).parent
        is_export = Path(source).name == EXPORT and (run / SETTINGS_FILE).is_file()
        raise UserError(
            f"{key}={name}: a model alone has no reference to be compared with; name one with "
            f"--reference MODEL{f', or name its run, {run}, which has one' if is_export else ''}"
        )
    other = find_weights(reference, "--reference")
    if other.weights is None:
        raise UserError(
            f"--reference {reference}: an adapter cannot be the reference of whole weights; merge "
            "it into its base model (peft.merge=true) and name that"
        )
    words = (_word("model.pretrained", source), _word("reference.pretrained", other.weights))
    return Opened(name, "model", source, None, other.weights, source, None, words)


def _adapter(name: str, found: FoundWeights, reference: str | None, key: str) -> Opened:
    base, source = found.base, str(found.adapter)
    if base is None:
        raise UserError(
            f"{key}={name}: its {ADAPTER_FILE} names no base model ({_BASE}), so that there is "
            "nothing to put it on; name the run that trained it"
        )
    if not Path(base).expanduser().is_dir() and not _HUB_ID.fullmatch(base):
        raise UserError(
            f"{key}={name}: its base model is {base}, which is not there; fix {_BASE} in its "
            f"{ADAPTER_FILE}"
        )
    words = ["peft=lora", _word("peft.adapter", source), _word("model.pretrained", base)]
    other = None if reference is None else find_weights(reference, "--reference")
    if other is None:
        words.append(f"reference.adapter={BASE}")
    elif other.adapter is not None:
        words.append(_word("reference.adapter", other.adapter))
    else:
        words.append(_word("reference.pretrained", str(other.weights)))
    compared = None if other is None else other.adapter or other.weights
    return Opened(name, "adapter", base, source, compared, None, None, tuple(words))


def _hub_adapter(name: str) -> dict[str, Any] | None:
    """The config of an adapter of the hub, or of its local cache; None if it is none."""
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, ADAPTER_FILE, local_files_only=not ask_hub([name]))
    except Exception:  # no such file; if there is no such id either, loading says so
        return None
    return read_json(Path(path))


def _word(key: str, value: str) -> str:
    return f"{key}={quoted(value)}"
