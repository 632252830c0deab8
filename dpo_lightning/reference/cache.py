"""Reference log-probabilities on disk, found by the scored content. Imports no torch.

A namespace is a folder per reference (its weights, dtype, kernel); in it, one number per response
(or, in a folder of its own, one per token), found by a hash of prompt and response ids. Beta,
learning rate, seed, batch size and paths have no part in either. A file's name is the hash of its
content, so a file that is there is either whole or found out; files are only added, each by one
rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dpo_lightning.data.tokens import Ids
from dpo_lightning.files import hold_lock, write_json, write_whole

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
        folder: Parent of the folders of all references.
        facts: Facts beside the ids that decide the numbers: weights, dtype, kernel, versions.
        per_token: True if each token of a response has a value, instead of their sum.

    Attributes:
        path: The folder of these values of this reference; it need not exist.
    """

    def __init__(self, folder: Path, facts: Mapping[str, str], *, per_token: bool = False) -> None:
        self._folder = folder
        self._per_token = per_token
        # Sums are not named, as they were there first.
        self._facts = {**facts, **({"values": "per token"} if per_token else {})}
        text = json.dumps(self._facts, sort_keys=True)
        self.path = folder / hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()

    def of_tokens(self) -> ReferenceCache:
        """Returns the cache of single tokens' values under the same reference."""
        return ReferenceCache(self._folder, self._facts, per_token=True)

    def widths(self, lengths: Lengths) -> Lengths:
        """Number of values that each response has, shape (n,).

        Args:
            lengths: Tokens of each response, shape (n,).
        """
        return lengths if self._per_token else np.ones_like(lengths)

    def read(self, keys: Keys, lengths: Lengths) -> Logps:
        """The stored values, NaN where there is none.

        A damaged file is never used: it is said, taken away where that is possible, and its rows
        count as missing. A folder that cannot be read is an empty one.

        Args:
            keys: Shape (n, 16), from :func:`response_key`.
            lengths: Tokens of each response, shape (n,); a stored value of another length is none.

        Returns:
            The values of all responses end to end, shape (sum of the widths,), float32; those of
            one are all there or all NaN.
        """
        known: dict[tuple[bytes, int], Logps] = {}
        with contextlib.suppress(OSError):
            for path in sorted(self.path.glob(f"*{_SUFFIX}")):
                known |= self._read_part(path)
        widths = self.widths(lengths)
        values = np.full(widths.sum(), np.nan, dtype=np.float32)
        for response, own in zip(_responses(keys, lengths), pieces(values, widths), strict=True):
            own[:] = known.get(response, np.nan)
        return values

    def publish(self, keys: Keys, logps: Logps, lengths: Lengths) -> None:
        """Adds values, all of them or none.

        Args:
            keys: Shape (n, 16).
            logps: The values of all responses end to end, shape (sum of the widths,).
            lengths: Shape (n,).

        Raises:
            OSError: If they cannot be written; what was there stays as it was.
        """
        part: Part = {"keys": keys, "logps": logps, "lengths": lengths}
        self._check(part)
        self.path.mkdir(parents=True, exist_ok=True)
        about = self.path / "about.json"
        if not about.exists():
            write_json(about, self._facts)
        write_whole(self.path / f"{_digest(part)}{_SUFFIX}", save(part))

    def lock(self, *, on_wait: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from computing the same; see :func:`hold_lock`."""
        return hold_lock(self.path / ".lock", on_wait=on_wait)

    def _read_part(self, path: Path) -> dict[tuple[bytes, int], Logps]:
        try:
            part = load(path.read_bytes())
            self._check(part)
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
        values = pieces(part["logps"], self.widths(part["lengths"]))
        return dict(zip(_responses(part["keys"], part["lengths"]), values, strict=True))

    def _check(self, part: Part) -> None:
        """Raises if values cannot be log-probabilities of responses.

        Raises:
            ValueError: With what is wrong.
        """
        keys, logps, lengths = part["keys"], part["logps"], part["lengths"]
        count = lengths.size
        if keys.shape != (count, KEY_BYTES) or lengths.shape != (count,):
            raise ValueError("its parts have different lengths")
        if [array.dtype.str for array in (keys, logps, lengths)] != ["|u1", "<f4", "<i4"]:
            raise ValueError("its parts have other types")
        if not ((lengths > 0).all() and np.isfinite(logps).all() and (logps <= _ROUNDING).all()):
            raise ValueError("some of its values are no log-probabilities")
        if logps.shape != (self.widths(lengths).sum(),):
            raise ValueError("its parts have different lengths")


def pieces(values: Logps, widths: Lengths) -> Iterator[Logps]:
    """Cuts a flat array into views, one per width.

    Args:
        values: Shape (sum of the widths,).
        widths: Shape (n,).
    """
    end = 0
    for width in widths.tolist():
        end += width
        yield values[end - width : end]


def _responses(keys: Keys, lengths: Lengths) -> list[tuple[bytes, int]]:
    """Key and length of each response, by which a stored value is found."""
    data = np.ascontiguousarray(keys).tobytes()
    cut = [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]
    return list(zip(cut, lengths.tolist(), strict=True))


def _digest(part: Part) -> str:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in ("keys", "logps", "lengths"):
        digest.update(np.ascontiguousarray(part[name]).tobytes())
    return digest.hexdigest()
