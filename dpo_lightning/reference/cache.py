"""Reference log-probabilities on disk, found by the scored content. Imports no torch.

A namespace is a folder per reference (its weights, dtype, kernel, device); in it, a file per block
of responses that are computed together, which holds one number per response (or, in a folder of its
own, one per token). A block's name is the hash of its responses' prompt and response ids: beta,
learning rate, seed, order, batch size and paths have no part in it. A file is put in its place
whole, by one rename, and holds a hash of its content, by which a damaged one is found out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dpo_lightning.data.tokens import Ids
from dpo_lightning.files import read_json, write_json, write_whole
from dpo_lightning.processes.work_claims import WorkClaim, claim_work, claimant

log = logging.getLogger(__name__)

KEY_BYTES = 16
_SUFFIX = ".safetensors"
_ABOUT = "about.json"
# Says which responses are computed together; a value out of another layout may differ in its last
# bits, and is none.
_LAYOUT = "blocks of parts"
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
        self._given = facts
        self._facts = {**facts, "layout": _LAYOUT, "values": "per token" if per_token else "sums"}
        text = json.dumps(self._facts, sort_keys=True)
        self.path = folder / hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()

    def of_tokens(self) -> ReferenceCache:
        """Returns the cache of single tokens' values under the same reference."""
        return ReferenceCache(self._folder, self._given, per_token=True)

    def widths(self, lengths: Lengths) -> Lengths:
        """Number of values that each response has, shape (n,).

        Args:
            lengths: Tokens of each response, shape (n,).
        """
        return lengths if self._per_token else np.ones_like(lengths)

    def read(self, name: str, keys: Keys, lengths: Lengths) -> Logps | None:
        """The stored values of a block, or None.

        A damaged file is never used: it is said, taken away where that is possible, and counts as
        missing. A folder that cannot be read is an empty one.

        Args:
            name: The block's.
            keys: Of its responses, in their order, shape (n, 16), from :func:`response_key`.
            lengths: Tokens of each response, shape (n,).

        Returns:
            The values of all responses end to end, shape (sum of the widths,), float32.
        """
        path = self._file(name)
        try:
            part = load(path.read_bytes())
            self._check(part)
            if part["digest"].tobytes() != _digest(part):
                raise ValueError("its content is not what was written")
            if not (
                np.array_equal(part["keys"], keys) and np.array_equal(part["lengths"], lengths)
            ):
                raise ValueError("it is of other responses")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            log.warning(
                "the reference cache's %s is damaged (%s): its rows are computed again", path, error
            )
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        logps: Logps = part["logps"]
        return logps

    def publish(self, name: str, keys: Keys, lengths: Lengths, logps: Logps) -> None:
        """Adds a block, all of it or nothing.

        Args:
            name: The block's.
            keys: Of its responses, in their order, shape (n, 16).
            lengths: Shape (n,).
            logps: The values of all responses end to end, shape (sum of the widths,).

        Raises:
            OSError: If it cannot be written; what was there stays as it was.
        """
        part: Part = {"keys": keys, "logps": logps, "lengths": lengths}
        self._check(part)
        self._make()
        part["digest"] = np.frombuffer(_digest(part), dtype=np.uint8)
        # Many and small, and checked by its reader: waiting for the disk would take longer.
        write_whole(self._file(name), save(part), lasting=False)

    def claim(self, name: str) -> WorkClaim | None:
        """Takes the computation of a block on; None while another process has it.

        Raises:
            OSError: If the folder cannot be written.
        """
        self._make()
        claim = claim_work(self._claim_file(name))
        if claim is not None and claim.is_taken_over:
            # What the other had not put in its place yet.
            for left in self.path.glob(f".{name}{_SUFFIX}.*"):
                left.unlink(missing_ok=True)
        return claim

    def claimant(self, name: str) -> str:
        """The process that computes a block, in words."""
        return claimant(self._claim_file(name))

    def earlier_layouts(self) -> list[Path]:
        """Folders beside this one whose values were computed in other blocks, and are not read."""
        found = []
        with contextlib.suppress(OSError):
            for about in sorted(self._folder.glob(f"*/{_ABOUT}")):
                facts = read_json(about)
                if "weights" in facts and facts.get("layout") != _LAYOUT:
                    found.append(about.parent)
        return found

    def _file(self, name: str) -> Path:
        return self.path / f"{name}{_SUFFIX}"

    def _claim_file(self, name: str) -> Path:
        return self.path / f".{name}.claim"

    def _make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        about = self.path / _ABOUT
        if not about.exists():
            write_json(about, self._facts)

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


def _digest(part: Part) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in ("keys", "logps", "lengths"):
        digest.update(np.ascontiguousarray(part[name]).tobytes())
    return digest.digest()
