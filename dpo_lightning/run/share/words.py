"""Words of the sharing commands, and the folder that they name. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dpo_lightning.errors import UserError
from dpo_lightning.files import RESULT_FILE, read_json
from dpo_lightning.run.finished import EXPORT, export_of
from dpo_lightning.settings.credentials import refusal, typed_secrets
from dpo_lightning.settings.overrides import raise_all
from dpo_lightning.settings.program import typed
from dpo_lightning.settings.recorded import SETTINGS_FILE

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"


class ShareParser(argparse.ArgumentParser):
    """Parser of a command's words, with errors of one line.

    Args:
        command: Its name.
        about: What it does, and what its words mean.
    """

    def __init__(self, command: str, about: str) -> None:
        self._command = " ".join(typed(command))
        super().__init__(
            prog=self._command,
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or an export's")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The words, of which none is a secret.

        Args:
            words: As they were typed.

        Raises:
            UserError: If they are wrong.
        """
        if any(word.partition("=")[0] in ("--token", "--hub-token", "token") for word in words):
            raise UserError(
                "--token: a token is never typed, where others may read it; `hf auth login` or "
                "HF_TOKEN in the environment gives it"
            )
        raise_all(map(refusal, typed_secrets(words)))
        return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        """Raises in one line what argparse would print as several."""
        raise UserError(f"{message}; `{self._command} --help` says more")


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


def find_export(path: Path) -> Exported:
    """The export in a run's folder, or the one that is named itself.

    Args:
        path: A folder.

    Raises:
        UserError: If there is none.
    """
    path = path.expanduser()
    own = _kind(path)
    if own is None:
        folder = export_of(path)
        kind = _kind(folder)
        if kind is None:
            raise UserError(f"{folder}: no {MODEL_CONFIG} and no {ADAPTER_CONFIG} there")
        return Exported(folder, path, kind == "adapter")
    run = path.absolute().parent
    is_of_run = path.name.startswith(EXPORT) and (run / RESULT_FILE).is_file()
    return Exported(path, run if is_of_run else None, own == "adapter")


def _kind(folder: Path) -> str | None:
    """Kind of an export: ``adapter``, ``model``, or None where a folder is neither."""
    if (folder / ADAPTER_CONFIG).is_file():
        return "adapter"
    return "model" if (folder / MODEL_CONFIG).is_file() else None
