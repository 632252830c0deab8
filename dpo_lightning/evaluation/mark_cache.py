"""Replies of a judge, kept on disk, so that nothing is asked and paid for twice. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.files import json_object, write_whole

log = logging.getLogger(__name__)

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply.

    Attributes:
        text: The reply itself.
        tokens_in: Tokens of the question, as the server counted them; None where it did not.
        tokens_out: Those of the reply.
    """

    text: str
    tokens_in: int | None
    tokens_out: int | None


def key_of(judge: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """The name of a reply: a hash of all that it depends on.

    Args:
        judge: Address, model, question and options.
        content: Prompt and answers.
    """
    text = json.dumps([_FORMAT, dict(judge), dict(content)], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class MarkCache:
    """A file for each reply, written whole; what is damaged counts as missing.

    Args:
        folder: Where they are; it is made with the first one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_open = True

    def get(self, key: str) -> Reply | None:
        """The reply of that name, if it is there and whole."""
        try:
            found = json_object(self._path(key).read_bytes()) or {}
        except OSError:
            return None
        text = found.get("text")
        if found.get("key") != key or not isinstance(text, str):
            return None
        counts = (found.get(name) for name in ("tokens_in", "tokens_out"))
        first, second = (count if isinstance(count, int) else None for count in counts)
        return Reply(text, first, second)

    def put(self, key: str, reply: Reply) -> None:
        """Keeps a reply; a disk that takes none is said once, and costs no mark."""
        content = {"key": key} | asdict(reply)
        if not self._is_open:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, f"{json.dumps(content)}\n".encode(), lasting=False)
        except OSError as error:
            self._is_open = False
            log.warning("marks are not kept: %s: %s", error.filename or path, error.strerror)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"
