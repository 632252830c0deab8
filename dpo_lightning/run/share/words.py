"""Words of the sharing commands, and the folder that they name. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_lightning.errors import UserError
from dpo_lightning.files import RESULT_FILE, read_json
from dpo_lightning.run.finished import EXPORT
from dpo_lightning.run.opened import find_weights, may_be_on_hub
from dpo_lightning.run.words import Grammar, Words, read_words
from dpo_lightning.settings.credentials import refusal, typed_secrets
from dpo_lightning.settings.overrides import raise_all
from dpo_lightning.settings.recorded import SETTINGS_FILE


def read_shared(argv: Sequence[str], grammar: Grammar) -> Words:
    """The words of a sharing command, of which none is a secret.

    Args:
        argv: As they were typed.
        grammar: What the command takes.

    Raises:
        UserError: If they are wrong.
    """
    if any(word.partition("=")[0] in ("--token", "--hub-token", "token") for word in argv):
        raise UserError(
            "--token: a token is never typed, where others may read it; `hf auth login` or "
            "HF_TOKEN in the environment gives it"
        )
    raise_all(map(refusal, typed_secrets(argv)))
    return read_words(argv, grammar)


@dataclass(frozen=True, slots=True)
class Exported:
    """An exported model.

    Attributes:
        folder: Its folder.
        run: The run's folder; None where the export stands alone.
        is_adapter: True if it is an adapter, which needs its base model.
    """

    folder: Path
    run: Path | None
    is_adapter: bool

    def result(self) -> dict[str, Any]:
        """The run's ``result.json``; empty without one."""
        return {} if self.run is None else read_json(self.run / RESULT_FILE)

    def settings(self) -> dict[str, Any]:
        """The run's ``config.yaml``; empty without one.

        Raises:
            UserError: If it is damaged.
        """
        path = None if self.run is None else self.run / SETTINGS_FILE
        if path is None or not path.is_file():
            return {}
        try:
            found = yaml.safe_load(path.read_bytes())
        except (ValueError, yaml.YAMLError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{path}: it is damaged; name an export's folder, which needs none")
        return found


def find_export(name: str) -> Exported:
    """The export in a run's folder, or the one that is named itself.

    Args:
        name: A folder.

    Raises:
        UserError: If there is none.
    """
    if not Path(name).expanduser().exists() and may_be_on_hub(name):
        raise UserError(
            f"run={name}: no such folder, and a model of the hub is shared already; `hf download "
            f"{name} --local-dir <folder>` brings one here"
        )
    found = find_weights(name, "run")
    folder = Path(found.adapter or str(found.weights))
    run = found.run
    if run is None:
        above = folder.absolute().parent
        is_of_run = folder.name.startswith(EXPORT) and (above / RESULT_FILE).is_file()
        run = above if is_of_run else None
    return Exported(folder, run, found.adapter is not None)
