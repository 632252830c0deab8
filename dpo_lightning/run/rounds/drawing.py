"""Answers of a round: its batches shared out among ranks, and those that were drawn kept on disk.

A batch's answers depend on the policy, the draws and the batch alone, so that a run that was killed
while it drew reads what it has, and draws the rest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_lightning.data.tokens import Ids
from dpo_lightning.evaluation.backends import BackendDrawer
from dpo_lightning.evaluation.many_answers import RoundDraws, draw_answers, plan_batches
from dpo_lightning.evaluation.sampling import Precision
from dpo_lightning.files import ROUNDS_FOLDER, json_object, write_whole
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.processes.phases import ShowPhase
from dpo_lightning.training.replicas import Replicas

log = logging.getLogger(__name__)

Answers = list[list[Ids]]
"""Of each prompt its answers."""


class DrawnParts:
    """Batches of a round's answers on disk, a file for each, which a killed run goes on from.

    Args:
        folder: The run's.
        draws: Their draws.
        policy: Hash of the policy that draws.
        prompts: Token ids of the round's prompts.
        writes: True if they are kept; an earlier run's folder is left as it is until a step.
    """

    def __init__(
        self, folder: Path, draws: RoundDraws, *, policy: str, prompts: Sequence[Ids], writes: bool
    ) -> None:
        # Hidden from who reads the folder as rows.
        self._folder = folder / ROUNDS_FOLDER / f".{draws.round}"
        self._writes = writes
        digest = hashlib.blake2b(json.dumps([asdict(draws), policy]).encode(), digest_size=16)
        for ids in prompts:
            digest.update(np.ascontiguousarray(ids, dtype="<i4").tobytes())
            digest.update(b"|")
        self._key = digest.hexdigest()

    def read(self, batches: Sequence[Sequence[int]]) -> dict[int, Answers]:
        """Answers of the batches that are there whole, by their numbers.

        Args:
            batches: Numbers of the prompts of each.
        """
        found: dict[int, Answers] = {}
        for number, batch in enumerate(batches):
            try:
                part = json_object(self._path(number).read_bytes()) or {}
            except OSError:
                continue
            answers = part.get("answers")
            if part.get("key") == self._key and part.get("batch") == [*batch] and answers:
                found[number] = [[_ids(own) for own in to_prompt] for to_prompt in answers]
        return found

    def keep(self, number: int, batch: Sequence[int], answers: Answers) -> None:
        """Keeps a batch; a disk that takes none is said once, and costs no answer.

        Args:
            number: Its number.
            batch: Numbers of its prompts.
            answers: Their answers.
        """
        if not self._writes:
            return
        ids = [[own.tolist() for own in to_prompt] for to_prompt in answers]
        content = {"key": self._key, "batch": [*batch], "answers": ids}
        path = self._path(number)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(content).encode(), lasting=False)
        except OSError as error:
            self._writes = False
            log.warning(
                "%s: %s: answers of the round are not kept until it is drawn",
                *(error.filename or path, error.strerror or error),
            )

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.json"


def drop_parts(folder: Path, *, but: int | None = None) -> None:
    """Removes batches of rounds whose rows are complete.

    Args:
        folder: The run's.
        but: A round whose batches stay: until a step of it is taken it may be drawn again.
    """
    for path in (folder / ROUNDS_FOLDER).glob(".[0-9]*"):
        if path.is_dir() and path.name != f".{but}":
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Drawing:
    """Settings of the drawing of rounds.

    Attributes:
        policy: The policy.
        scorer: The scorer that prepared it.
        tokenizer: Its tokenizer.
        batch_tokens: Most tokens of a batch.
        precision: The context to compute in.
        drawer: Draws by another backend; None: the policy does itself.
        show: Shows how far it is.
    """

    policy: Any
    scorer: Scorer
    tokenizer: Any
    batch_tokens: int
    precision: Precision
    drawer: BackendDrawer | None
    show: ShowPhase


def draw_round(
    drawing: Drawing,
    prompts: Sequence[Ids],
    draws: RoundDraws,
    *,
    parts: DrawnParts,
    ranks: Replicas,
    check: Callable[[], None],
    agreed: Callable[[Sequence[int]], None],
    pending: Callable[[], int],
) -> tuple[Answers, int]:
    """Draws what is missing of a round's answers; every rank gets all of them.

    Ranks take whole batches in turn, and meet after each, so that none is lost with a rank.

    Args:
        drawing: How.
        prompts: Token ids of the round's prompts.
        draws: Their draws.
        parts: Keeps batches, on the first rank.
        ranks: Those that draw.
        check: Raises if another rank is gone.
        agreed: Takes the signals of all ranks, 0 for none, after each batch; may raise.
        pending: Gives the number of the signal that this rank has had.

    Returns:
        The answers to each prompt, and the tokens that were drawn here and now, over all ranks.
    """
    batches = plan_batches(prompts, draws, batch_tokens=drawing.batch_tokens)
    found = ranks.from_first(lambda: parts.read(batches))
    left = [number for number in range(len(batches)) if number not in found]
    drawn = draw_answers(
        drawing.policy,
        drawing.scorer,
        drawing.tokenizer,
        prompts,
        draws,
        batch_tokens=drawing.batch_tokens,
        batches=[batches[number] for number in left[ranks.rank :: ranks.size]],
        precision=drawing.precision,
        show=drawing.show,
        check=check,
        drawer=drawing.drawer,
    )
    tokens = 0
    for start in range(0, len(left), ranks.size):
        mine = next(drawn)[1] if start + ranks.rank < len(left) else None
        everyone = ranks.gather((mine, pending()))
        for number, (own, _) in zip(left[start:], everyone, strict=False):
            assert own is not None
            found[number] = own
            tokens += sum(len(ids) for to_prompt in own for ids in to_prompt)
            if ranks.rank == 0:
                parts.keep(number, batches[number], own)
        agreed([signum for _, signum in everyone])
    for _ in drawn:  # to its end, which closes the bar
        raise AssertionError("a batch that nobody asked for")
    return _in_order(found, batches), tokens


def _ids(numbers: Sequence[int]) -> Ids:
    return np.asarray(numbers, dtype=np.int32)


def _in_order(found: Mapping[int, Answers], batches: Sequence[Sequence[int]]) -> Answers:
    """The answers in the order of the prompts."""
    by_prompt = {
        prompt: own
        for number, batch in enumerate(batches)
        for prompt, own in zip(batch, found[number], strict=True)
    }
    return [by_prompt[prompt] for prompt in range(len(by_prompt))]
