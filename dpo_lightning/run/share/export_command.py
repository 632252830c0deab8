"""The command ``export``: a folder that transformers, PEFT and vLLM load."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.run.folder import disk_fault
from dpo_lightning.run.guard import guarded
from dpo_lightning.run.share.contents import CARD, contents_of, in_words
from dpo_lightning.run.share.words import Exported, ShareParser, find_export

_ABOUT = """\
Writes the policy of a run into a folder of its own, with its tokenizer, chat template and card:
a whole model, or its adapter as PEFT has them; with --merge the adapter is added into the weights
of its base model. All weights are safetensors."""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a run's policy into a folder.

    Args:
        argv: The run's folder and flags; None takes the process's own.

    Returns:
        0, or 2 where the words or the run are wrong.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    parser = ShareParser("export", _ABOUT)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--merge", action="store_true", help="merge an adapter into its base model")
    parser.add_argument("--json", action="store_true", help="print one object")
    words = parser.read(argv)
    # What libraries say is not the answer.
    with contextlib.redirect_stdout(sys.stderr):
        found = _export(words.run, words.output.expanduser(), merge=words.merge)
    if words.json:
        print(json.dumps(found, indent=2))
    else:
        for file in found["files"]:
            print(f"{file['name']:<28} {in_words(file['bytes']):>10}")
        print(f"written to {found['output']}")
    return 0


def _export(run: Path, output: Path, *, merge: bool) -> dict[str, Any]:
    exported = find_export(run)
    if merge and not exported.is_adapter:
        raise UserError(
            f"--merge: {exported.folder} is a whole model, with no adapter to merge; leave it out"
        )
    if output.is_symlink() or (output.exists() and (output.is_file() or any(output.iterdir()))):
        raise UserError(f"--output {output}: it is there already; name another folder")
    contents = contents_of(exported.folder)
    # Here, because they import torch: by now every word is checked.
    from dpo_lightning.run.export import staged_folder

    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        if merge:
            from dpo_lightning.run.share.merging import merge_adapter

            merge_adapter(exported, output)
        else:
            with staged_folder(output) as staged:
                staged.mkdir()
                for name in contents.sizes:
                    shutil.copyfile(exported.folder / name, staged / name)
                _write_card(exported, staged)
    except OSError as error:
        raise UserError(disk_fault(error) or f"--output {output}: {error}") from error
    written = contents_of(output)
    return {"output": str(output), "merged": merge, "files": written.entries()}


def _write_card(exported: Exported, folder: Path) -> None:
    """The card as it is written today, where there is a run to tell of; else the export's own."""
    from dpo_lightning.run.card import model_card
    from dpo_lightning.run.share.facts import card_facts

    facts = card_facts(exported)
    if facts is not None:
        model_card(facts, adapter=exported.is_adapter).save(folder / CARD)
