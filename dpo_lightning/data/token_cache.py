"""Token ids on disk, found by the content that they were made of: text, tokenizer, limits."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

import dpo_lightning
from dpo_lightning.data.conversations import Fault
from dpo_lightning.data.rows import PreferenceGroup
from dpo_lightning.data.templates import TemplateOptions
from dpo_lightning.data.tokens import TokenGroup, TokenizedGroups, tokenize_groups
from dpo_lightning.files import hold_lock, write_whole
from dpo_lightning.processes.phases import ShowPhase, unshown

log = logging.getLogger(__name__)

# Part of every key: other code may cut other tokens.
_FORMAT = 4


def tokenize_once(
    groups: Sequence[PreferenceGroup],
    tokenizer: Any,
    *,
    max_length: int,
    truncation: str,
    folder: Path | None,
    options: TemplateOptions | None = None,
    keep: bool = True,
    show: ShowPhase = unshown,
) -> TokenizedGroups:
    """Turns groups of text into token ids, or finds those of an earlier run.

    Of several processes that want the same, one computes it. A folder that cannot be used costs no
    more than the work.

    Args:
        groups: The groups.
        tokenizer: A transformers tokenizer.
        max_length: Longest prompt + response, in tokens.
        truncation: ``drop``, ``prompt`` or ``response``.
        folder: Folder of the token ids; None keeps none.
        options: Options of the chat template; None is a template without any.
        keep: False reads the folder and writes nothing into it.
        show: Shows how far it is.
    """
    options = options or TemplateOptions()

    def compute() -> TokenizedGroups:
        return tokenize_groups(
            groups,
            tokenizer,
            max_length=max_length,
            truncation=truncation,
            options=options,
            show=show,
        )

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if folder is None or backend is None or not groups:
        return compute()  # one in Python has no description to go by
    key = _key(groups, tokenizer, backend, f"{max_length} {truncation} {options.key()}")
    path = folder / f"{key}.safetensors"
    found = _read(path, groups)
    if found is not None:
        return found
    if not keep:
        return compute()
    try:
        with hold_lock(folder / f".{key}.lock", on_wait=_say_waiting):
            found = _read(path, groups) or compute()
            write_whole(path, _packed(found, groups))
    except OSError as error:
        log.info("token ids could not be cached in %s: %s", folder, error.strerror or error)
        found = found or compute()
    return found


def _say_waiting() -> None:
    log.info("waiting for another process that is tokenizing the same rows")


def _key(groups: Sequence[PreferenceGroup], tokenizer: Any, backend: Any, limits: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    about = (
        *(_FORMAT, dpo_lightning.__version__, transformers.__version__, tokenizers.__version__),
        *(type(tokenizer).__name__, limits, tokenizer.chat_template, tokenizer.bos_token_id),
        *(tokenizer.eos_token_id, sorted(tokenizer.all_special_ids)),
    )
    digest.update(repr(about).encode("utf-8", "surrogatepass"))
    digest.update(backend.to_str().encode("utf-8", "surrogatepass"))
    for group in groups:
        given = (group.prompt, group.responses, group.tools, group.template_kwargs)
        text = repr((*given, group.ranks, group.weight, group.label))
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _packed(tokenized: TokenizedGroups, groups: Sequence[PreferenceGroup]) -> bytes:
    """The token ids laid end to end, and which group each token group was made of."""
    sequences = [ids for g in tokenized.groups for ids in (g.prompt, *g.responses)]
    arrays: dict[str, npt.NDArray[Any]] = {
        "ids": np.concatenate([np.zeros(0, dtype=np.int32), *sequences]),
        "lengths": np.array([len(ids) for ids in sequences], dtype=np.int32),
        "responses": np.array([len(g.responses) for g in tokenized.groups], dtype=np.int32),
        "ranks": np.array([rank for g in tokenized.groups for rank in g.ranks], dtype=np.int32),
        "origin": np.array(list(_origins(tokenized.groups, groups)), dtype=np.int32),
    }
    about = {
        "dropped": json.dumps(tokenized.dropped),
        "changed": json.dumps(tokenized.changed),
        "notes": json.dumps(tokenized.notes),
        "faults": json.dumps({n: asdict(fault) for n, fault in tokenized.faults.items()}),
        "too_long": json.dumps([tokenized.kept_by, tokenized.longest]),
        "leads": json.dumps(tokenized.leads),
    }
    return save(arrays, metadata=about | {"digest": _digest(arrays, about)})


def _origins(made: Iterable[TokenGroup], groups: Sequence[PreferenceGroup]) -> Iterable[int]:
    """The place of the group that each token group was made of; both are in one order."""
    places = iter(range(len(groups)))
    for group in made:
        yield next(i for i in places if groups[i].source == group.source)


def _digest(arrays: dict[str, npt.NDArray[Any]], about: dict[str, str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    kept = {key: text for key, text in about.items() if key != "digest"}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()


def _read(path: Path, groups: Sequence[PreferenceGroup]) -> TokenizedGroups | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.get("digest") != _digest(arrays, about):
            raise ValueError("its content is not what was written")
        return _unpacked(arrays, about, groups)
    except (OSError, SafetensorError, ValueError, KeyError, IndexError) as error:
        log.warning("%s is damaged (%s): its rows are tokenized again", path, error)
        return None


def _unpacked(
    arrays: dict[str, npt.NDArray[Any]], about: dict[str, str], groups: Sequence[PreferenceGroup]
) -> TokenizedGroups:
    sequences = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
    ranks = arrays["ranks"].tolist()
    made = []
    at = rank = 0
    for origin, count in zip(arrays["origin"].tolist(), arrays["responses"].tolist(), strict=True):
        group = groups[origin]
        made.append(
            TokenGroup(
                prompt=sequences[at],
                responses=tuple(sequences[at + 1 : at + 1 + count]),
                ranks=tuple(ranks[rank : rank + count]),
                weight=group.weight,
                source=group.source,
                prompt_key=group.prompt_key,
                target_margin=group.target_margin or 0.0,
                label=group.label,
            )
        )
        at += count + 1
        rank += count
    kept_by, longest = json.loads(about["too_long"])
    return TokenizedGroups(
        groups=made,
        dropped=Counter(json.loads(about["dropped"])),
        changed=Counter(json.loads(about["changed"])),
        notes=json.loads(about["notes"]),
        faults={int(n): Fault(**fault) for n, fault in json.loads(about["faults"]).items()},
        kept_by=Counter(kept_by),
        longest=longest,
        leads=Counter(json.loads(about["leads"])),
    )
