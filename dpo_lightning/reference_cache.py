"""Reference log-probabilities on disk, by the content of what was scored. Imports no torch.

A namespace is a folder per reference (its weights, dtype, kernel); in it, one number per response,
found by a hash of prompt and response ids. Beta, learning rate, seed, batch size and paths have no
part in either. A file's name is the hash of its content, so a file that is there is either whole or
found out; files are only added, each by one rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dpo_lightning.data.tokens import Ids
from dpo_lightning.files import hold_lock, write_whole
from dpo_lightning.results import write_json

log = logging.getLogger(__name__)

KEY_BYTES = 16
_SUFFIX = ".safetensors"
# Rounding may put the log of a probability of 1 this far above 0.
_ROUNDING = 1e-3

Keys = npt.NDArray[np.uint8]
Logps = npt.NDArray[np.float32]
Lengths = npt.NDArray[np.int32]
Part = dict[str, npt.NDArray[Any]]


def response_key(prompt: Ids, response: Ids) -> bytes:
    """A hash of the ids of a prompt and of a response to it, 16 bytes.

    Args:
        prompt: Shape (P,), as the model reads it, after truncation.
        response: Shape (R,), the same.
    """
    digest = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(prompt, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(response, dtype="<i4").tobytes())
    return digest.digest()


class ReferenceCache:
    """The stored log-probabilities of one reference.

    Args:
        folder: Where all references have their folders.
        facts: What the numbers depend on beside the ids: weights, dtype, kernel, versions.

    Attributes:
        path: This reference's folder; it need not exist.
    """

    def __init__(self, folder: Path, facts: Mapping[str, str]) -> None:
        self._facts = dict(facts)
        text = json.dumps(self._facts, sort_keys=True)
        self.path = folder / hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()

    def read(self, keys: Keys, lengths: Lengths) -> Logps:
        """The stored values, NaN where there is none.

        A damaged file is never used: it is said, taken away where that is possible, and its rows
        count as missing. A folder that cannot be read is an empty one.

        Args:
            keys: Shape (n, 16), from :func:`response_key`.
            lengths: Tokens of each response, shape (n,); a stored value of another length is none.

        Returns:
            Shape (n,), float32.
        """
        known: dict[bytes, tuple[float, int]] = {}
        with contextlib.suppress(OSError):
            for path in sorted(self.path.glob(f"*{_SUFFIX}")):
                known |= self._read_part(path)
        values = np.full(len(keys), np.nan, dtype=np.float32)
        for i, (key, length) in enumerate(zip(_as_bytes(keys), lengths.tolist(), strict=True)):
            value, stored_length = known.get(key, (np.nan, length))
            if stored_length == length:
                values[i] = value
        return values

    def publish(self, keys: Keys, logps: Logps, lengths: Lengths) -> None:
        """Adds values, all of them or none.

        Args:
            keys: Shape (n, 16).
            logps: Shape (n,).
            lengths: Shape (n,).

        Raises:
            OSError: If they cannot be written; what was there stays as it was.
        """
        part: Part = {"keys": keys, "logps": logps, "lengths": lengths}
        _check(part)
        self.path.mkdir(parents=True, exist_ok=True)
        about = self.path / "about.json"
        if not about.exists():
            write_json(about, self._facts)
        write_whole(self.path / f"{_digest(part)}{_SUFFIX}", save(part))

    def lock(self, *, on_wait: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from computing the same; see :func:`hold_lock`."""
        return hold_lock(self.path / ".lock", on_wait=on_wait)

    def _read_part(self, path: Path) -> dict[bytes, tuple[float, int]]:
        try:
            part = load(path.read_bytes())
            _check(part)
            if _digest(part) != path.stem:
                raise ValueError("its content is not what was written")
        except FileNotFoundError:
            return {}
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            log.warning(
                "the reference cache's %s is damaged (%s): its rows are computed again", path, error
            )
            with contextlib.suppress(OSError):
                path.unlink()
            return {}
        values = zip(part["logps"].tolist(), part["lengths"].tolist(), strict=True)
        return dict(zip(_as_bytes(part["keys"]), values, strict=True))


def _as_bytes(keys: Keys) -> list[bytes]:
    data = np.ascontiguousarray(keys).tobytes()
    return [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]


def _digest(part: Part) -> str:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in ("keys", "logps", "lengths"):
        digest.update(np.ascontiguousarray(part[name]).tobytes())
    return digest.hexdigest()


def _check(part: Part) -> None:
    """Raises where values could not be log-probabilities of responses.

    Raises:
        ValueError: With what is wrong.
    """
    keys, logps, lengths = part["keys"], part["logps"], part["lengths"]
    count = len(keys)
    if keys.shape != (count, KEY_BYTES) or logps.shape != (count,) or lengths.shape != (count,):
        raise ValueError("its parts have different lengths")
    if [array.dtype.str for array in (keys, logps, lengths)] != ["|u1", "<f4", "<i4"]:
        raise ValueError("its parts have other types")
    if not (np.isfinite(logps).all() and (logps <= _ROUNDING).all() and (lengths > 0).all()):
        raise ValueError("some of its values are no log-probabilities")
