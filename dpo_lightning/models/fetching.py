"""Weights of the hub, downloaded ahead of loading so that their progress shows. Imports no torch.

The libraries' own bars are off, as they are many and know nothing of a log.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.utils.tqdm import tqdm

from dpo_lightning.data.source_names import is_hub_id
from dpo_lightning.processes.phases import Say, ShowPhase

log = logging.getLogger(__name__)

# Files that transformers loads; the other formats that a repository may hold are left there.
_WEIGHTS = ("model.safetensors", "model-*.safetensors")
_MEGABYTE = 10**6


class _Unseen(tqdm):
    """The hub's own bar, not shown."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": True})  # type: ignore[no-untyped-call]


class _Sum:
    """Bytes of several files that came one after the other.

    Args:
        say: Takes the megabytes so far.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._bytes = 0

    def bar(self) -> type[tqdm]:
        """Class of a bar that adds to the sum; of the hub's two only what reaches the disk."""
        add = self._add

        class Counted(_Unseen):
            def update(self, n: float | None = 1) -> None:
                add(n or 0)

            def update_transfer(self, n: float) -> None:
                pass

            def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None:
                pass

        return Counted

    def _add(self, size: float) -> None:
        self._bytes += int(size)
        self._say(self._bytes // _MEGABYTE)


def fetch_weights(source: str, revision: str | None, show: ShowPhase) -> None:
    """Downloads the weights of a model of the hub that are not there yet.

    Whatever goes wrong is not said here: loading asks for the same files, and says it.

    Args:
        source: A hub id; a folder is left alone.
        revision: Its revision.
        show: Shows how far it is.
    """
    if Path(source).exists() or not is_hub_id(source) or "HF_HUB_OFFLINE" in os.environ:
        return
    try:
        files = snapshot_download(
            source,
            revision=revision,
            allow_patterns=[*_WEIGHTS],
            dry_run=True,
            tqdm_class=_Unseen,
        )
        missing = [file for file in files if file.will_download]
        size = sum(file.file_size or 0 for file in missing)
        if size < _MEGABYTE:
            return
        with show("download", total=size // _MEGABYTE, unit="MB") as say:
            counted = _Sum(say).bar()
            # One by one: threads would keep an interrupt waiting.
            for file in missing:
                hf_hub_download(
                    source, file.filename, revision=file.commit_hash, tqdm_class=counted
                )
    except Exception as error:
        log.debug("%s: not downloaded ahead of loading: %s", source, error)
