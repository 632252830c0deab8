"""Reference caches of a scorer that counts, and ways to damage their files."""

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.reference.cache import ReferenceCache
from dpo_lightning.reference.fill import with_reference_logps

FACTS = {"weights": "w", "dtype": "float32", "path": "flat"}


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def pair(prompt: tuple[int, ...], *responses: tuple[int, ...]) -> TokenGroup:
    ranks = tuple(range(1, len(responses) + 1))
    return TokenGroup(ids(*prompt), tuple(ids(*r) for r in responses), ranks, 1.0, "f:1", "key")


class CountingScorer:
    """Scores a response by its own ids: -(sum of ids) - prompt ids / 100, and keeps what it saw.

    With `most` it never comes back when it has seen as many.
    """

    shared = True

    def __init__(self, log: Path | None = None, *, most: int | None = None) -> None:
        self.seen: list[tuple[tuple[int, ...], ...]] = []
        self._log = log
        self._most = most

    def logps(self, model, batch, plan=None):
        while self._most is not None and len(self.seen) >= self._most:
            time.sleep(0.05)
        values, cursor = [], 0
        for shape in batch.segments:
            parts = batch.input_ids[cursor : cursor + sum(shape)].split(list(shape))
            cursor += sum(shape)
            prompt, *responses = (tuple(part.tolist()) for part in parts)
            for response in responses:
                self.seen.append((prompt, response))
                values.append(-sum(response) - sum(prompt) / 100)
                if self._log is not None:
                    with self._log.open("a") as file:
                        file.write(f"{prompt} {response}\n")
        return torch.tensor(values)

    def plan(self, batch):
        return None

    def token_logps(self, model, batch, plan):
        """A token has -id and its share of the rest of its response's value."""
        sums = self.logps(model, batch)
        ids = torch.zeros(len(sums)).index_add(0, batch.response, batch.targets.float())
        rest = (sums + ids) / batch.lengths
        return -batch.targets.float() + rest[batch.response]


def expected(group: TokenGroup) -> list[float]:
    return [-int(r.sum()) - int(group.prompt.sum()) / 100 for r in group.responses]


def fill(
    cache: ReferenceCache, *parts: list[TokenGroup], scorer=None, budget: int = 8, **more: Any
):
    stand_in: Any = scorer or CountingScorer()
    return with_reference_logps(
        parts,
        cache,
        load=lambda: torch.nn.Linear(1, 1),
        scorer=stand_in,
        device=torch.device("cpu"),
        precision=contextlib.nullcontext,
        micro_batch_tokens=budget,
        **more,
    )


GROUPS = [
    pair((1, 2), (3, 0), (4, 5, 0)),
    pair((1, 2), (6, 0), (3, 0)),  # the second response is one of the first group's
    pair((9,), (3, 0), (4, 0), (5, 0)),
]


def check(parts: list[list[TokenGroup]]) -> None:
    for group in (group for part in parts for group in part):
        assert group.reference_logps is not None
        assert group.reference_logps.dtype == np.float32
        np.testing.assert_allclose(group.reference_logps, np.array(expected(group)), rtol=1e-6)


def only_part(cache: ReferenceCache) -> Path:
    [path] = cache.path.glob("*.safetensors")
    return path


def rewrite(path: Path, **changes) -> None:
    save_file(load_file(path) | changes, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def other_file(path: Path) -> None:
    save_file({"weights": np.zeros(3, dtype=np.float32)}, path)


def poison(path: Path) -> None:
    """A file whose hash fits its content, but whose values are none that a model could give."""
    part = load_file(path)
    part["logps"][0] = np.nan
    publish_unchecked(path, part)


def positive(path: Path) -> None:
    part = load_file(path)
    part["logps"][0] = 5.0
    publish_unchecked(path, part)


def publish_unchecked(path: Path, part) -> None:
    """Writes a block's file anew, with the hash that fits whatever it holds."""
    from dpo_lightning.reference.cache import _digest

    save_file(part | {"digest": np.frombuffer(_digest(part), dtype=np.uint8)}, path)


def values_in(folder: Path) -> dict[str, bytes]:
    """The bytes of every block's file below a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


MANY = [pair((1, i), (2, i, 0), (3, i, 0)) for i in range(40)]
