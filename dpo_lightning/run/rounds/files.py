"""The groups of a round on disk: rows that are trained on anew, and read back to the last bit.

``rounds/3.jsonl`` has a row for each group, in the form that every file of rows has, so that it can
be looked at, filtered and named with ``data.train=``, as can the whole folder. Text does not always
become the token ids again that were drawn: those stand under ``provenance``, and a run that goes on
reads them. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from dpo_lightning.data.groups import prompt_of_key
from dpo_lightning.data.marked import MarkedGroup, text_behind
from dpo_lightning.data.tokens import Ids, TokenGroup
from dpo_lightning.errors import CorruptArtifactError, StorageError
from dpo_lightning.files import ROUNDS_FOLDER, json_object, read_json, write_json, write_whole

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class RoundFacts:
    """Facts about a round as a whole; those that a group's marks and labels depend on.

    Attributes:
        round: Its number, from 1.
        step: Optimizer steps that were completed when its answers were drawn.
        policy: Hash of the policy that drew them.
        judge: Who marked them.
        groups: How groups were made of them: ``pairs``, ``best_worst``, ``ranking``, ``margin``.
        noise: ``none``, or ``bradley_terry`` where labels were drawn.
        min_margin: Smallest difference of marks in a group.
        temperature: At which they were drawn.
        seed: Of all draws.
        answers: Number of answers.
        dropped: Counts of what became no group, by reason.
    """

    round: int
    step: int
    policy: str
    judge: str
    groups: str
    noise: str
    min_margin: float
    temperature: float
    seed: int
    answers: int
    dropped: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class RoundRows:
    """A round as it was read back.

    Attributes:
        groups: Its groups, in the order of the file.
        marks: Marks of the responses of each, best response first.
        facts: Facts about it.
        digest: Hash of the file of rows, 64 hexadecimal digits.
    """

    groups: list[TokenGroup]
    marks: list[tuple[float, ...]]
    facts: RoundFacts
    digest: str


def rows_path(folder: Path, number: int) -> Path:
    """The file with the rows of a round.

    Args:
        folder: The run's.
        number: Of the round, from 1.
    """
    return folder / ROUNDS_FOLDER / f"{number}.jsonl"


def facts_path(folder: Path, number: int) -> Path:
    """The file with the facts about a round; it is written last, so that it says that all is there.

    Its name is hidden from who reads the folder as rows.
    """
    return folder / ROUNDS_FOLDER / f".{number}.json"


def write_round(
    folder: Path, groups: Sequence[MarkedGroup], facts: RoundFacts, tokenizer: Any
) -> str:
    """Writes a round: all of it, or nothing that is taken for one.

    Equal groups and facts make equal files.

    Args:
        folder: The run's.
        groups: Its groups; a group's source names its line.
        facts: Facts about it.
        tokenizer: The policy's, for the text of answers that follow a prompt without a template.

    Returns:
        A hash of the rows, 64 hexadecimal digits.

    Raises:
        StorageError: If the folder cannot be written.
    """
    lines = [json.dumps(_row(own, facts, tokenizer), ensure_ascii=False) for own in groups]
    content = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
    digest = hashlib.sha256(content).hexdigest()
    rows, about = rows_path(folder, facts.round), facts_path(folder, facts.round)
    try:
        rows.parent.mkdir(exist_ok=True)
        # Without it there is no round, whatever rows there are of an earlier attempt.
        about.unlink(missing_ok=True)
        write_whole(rows, content)
        write_json(about, {"format": _FORMAT, "sha256": digest, **asdict(facts)})
    except OSError as error:
        raise StorageError(
            f"{error.filename or rows}: {error.strerror or error}: the rows of round "
            f"{facts.round} cannot be written; make room, or take another folder with "
            "hydra.run.dir=<folder>"
        ) from error
    return digest


def read_round(folder: Path, number: int) -> RoundRows | None:
    """A round as it was written; None where there is none, or not all of it.

    Args:
        folder: The run's.
        number: Of the round, from 1.

    Raises:
        CorruptArtifactError: If its rows were changed or damaged since.
    """
    rows, about = rows_path(folder, number), read_json(facts_path(folder, number))
    if about.get("format") != _FORMAT:
        return None
    try:
        content = rows.read_bytes()
        facts = RoundFacts(**{field.name: about[field.name] for field in fields(RoundFacts)})
    except OSError as error:
        raise CorruptArtifactError(
            f"{rows}: {error.strerror or error}: the run has trained on these rows; put them back, "
            "or start a new run"
        ) from error
    except KeyError as error:
        raise CorruptArtifactError(
            f"{facts_path(folder, number)}: it has no {error.args[0]}; put back what the run wrote"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != about.get("sha256"):
        raise CorruptArtifactError(
            f"{rows}: these are not the rows that the run wrote; put them back, and to train on "
            "others name a copy of the file with data.train="
        )
    groups, marks = [], []
    for line, text in enumerate(content.decode().split("\n")[:-1], start=1):
        group, own = _group_of(text, f"{ROUNDS_FOLDER}/{number}.jsonl:{line}")
        groups.append(group)
        marks.append(own)
    return RoundRows(groups, marks, facts, digest)


# Rows --------------------------------------------------------------------------------------------


def _row(own: MarkedGroup, facts: RoundFacts, tokenizer: Any) -> dict[str, Any]:
    """A group as a row that a file of rows may have."""
    group = own.group
    prompt, tools = prompt_of_key(group.prompt_key), _tools(group.prompt_key)
    written = _writer(prompt, tokenizer, group.prompt)
    responses = [written(text, ids) for text, ids in zip(own.texts, group.responses, strict=True)]
    row: dict[str, Any] = {"prompt": prompt}
    if tools:
        row["tools"] = tools
    if group.ranks == (1, 2):
        row |= {"chosen": responses[0], "rejected": responses[1]}
    else:
        row |= {"responses": responses, "ranks": [*group.ranks]}
    row["marks"] = [*own.marks]
    about = asdict(facts)
    del about["dropped"], about["answers"]
    row["provenance"] = {
        **about,
        "answers": [*own.numbers],
        "source": own.asked,
        "prompt_key": group.prompt_key,
        "prompt_ids": group.prompt.tolist(),
        "response_ids": [ids.tolist() for ids in group.responses],
    }
    return row


def _writer(prompt: object, tokenizer: Any, prompt_ids: Ids) -> Callable[[str, Ids], Any]:
    """Function that makes a response of a row out of the text and the token ids of an answer."""
    if isinstance(prompt, str):
        return lambda text, ids: text_behind(tokenizer, prompt_ids, ids)
    return lambda text, ids: [{"role": "assistant", "content": text}]


def _tools(prompt_key: str) -> list[Any]:
    """Tools that a prompt's key has beside its messages."""
    if not prompt_key.startswith("{"):
        return []
    found = json.loads(prompt_key).get("tools")
    tools = json.loads(found) if found else []
    return tools if isinstance(tools, list) else []


def _group_of(text: str, source: str) -> tuple[TokenGroup, tuple[float, ...]]:
    """The group of a row of ours, and its marks."""
    row = json_object(text) or {}
    try:
        about = row["provenance"]
        responses = tuple(np.asarray(ids, dtype=np.int32) for ids in about["response_ids"])
        group = TokenGroup(
            prompt=np.asarray(about["prompt_ids"], dtype=np.int32),
            responses=responses,
            ranks=tuple(row.get("ranks", (1, 2))),
            weight=1.0,
            source=source,
            prompt_key=about["prompt_key"],
        )
        return group, tuple(float(mark) for mark in row["marks"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptArtifactError(
            f"{source}: it cannot be read ({type(error).__name__}: {error}); put back what the run "
            "wrote"
        ) from error
