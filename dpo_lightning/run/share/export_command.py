"""The command ``export``: a folder that transformers, PEFT and vLLM load."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.files import write_json
from dpo_lightning.run.folder import disk_fault
from dpo_lightning.run.framed import answer_alone, print_answer
from dpo_lightning.run.guard import guarded
from dpo_lightning.run.share.at_beta import (
    AT_BETA_FILE,
    cost_in_words,
    measured_cost,
    place_in_run,
    scale_adapter,
)
from dpo_lightning.run.share.contents import CARD, contents_of, in_words
from dpo_lightning.run.share.words import Exported, ShareParser, find_export

_ABOUT = """\
Writes the policy of a run into a folder of its own, with its tokenizer, chat template and card:
a whole model, or its adapter as PEFT has them; with --merge the adapter is added into the weights
of its base model. With --at-beta the update of an adapter is scaled to stand for another beta than
the run's own, and what that approximation costs is measured on held-out prompts. All weights are
safetensors."""

_AT_BETA = re.compile(r"^at_beta=")


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
    parser.add_argument(
        "--at-beta", type=float, metavar="BETA",
        help="the adapter scaled to stand for another beta, with the measured cost of that",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one object")
    words = parser.read([_AT_BETA.sub("--at-beta=", word) for word in argv])
    if words.at_beta is not None and not 0 < words.at_beta < math.inf:
        raise UserError(f"--at-beta {words.at_beta:g}: must be a finite number > 0")
    with answer_alone():
        found = _export(
            words.run, words.output.expanduser(), merge=words.merge, at_beta=words.at_beta
        )
    print_answer(found, as_json=words.json, show=_show)
    return 0


def _show(found: Mapping[str, Any]) -> None:
    for file in found["files"]:
        print(f"{file['name']:<28} {in_words(file['bytes']):>10}")
    if found["at_beta"] is not None:
        print(cost_in_words(found["at_beta"]))
    print(f"written to {found['output']}")


def _export(run: Path, output: Path, *, merge: bool, at_beta: float | None) -> dict[str, Any]:
    exported = find_export(run)
    if merge and not exported.is_adapter:
        raise UserError(
            f"--merge: {exported.folder} is a whole model, with no adapter to merge; leave it out"
        )
    if output.is_symlink() or (output.exists() and (output.is_file() or any(output.iterdir()))):
        raise UserError(f"--output {output}: it is there already; name another folder")
    contents = contents_of(exported.folder)
    cost = None if at_beta is None else _cost(exported, at_beta)
    # Here, because it imports torch: by now every word is checked.
    from dpo_lightning.run.export import staged_folder

    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with staged_folder(output) as staged:
            staged.mkdir()
            for name in contents.sizes:
                shutil.copyfile(exported.folder / name, staged / name)
            if cost is not None:
                scale_adapter(staged, cost["lambda"])
            if merge:
                _merge(exported, staged)
            else:
                _write_card(exported, staged)
            if cost is not None:
                _say_cost(staged, cost)
    except OSError as error:
        raise UserError(disk_fault(error) or f"--output {output}: {error}") from error
    written = contents_of(output)
    return {
        "output": str(output), "merged": merge, "files": written.entries(), "at_beta": cost
    }  # fmt: skip


def _cost(exported: Exported, beta: float) -> dict[str, Any]:
    """The cost of the scaled adapter, which is measured before anything is written."""
    config, lam = place_in_run(exported, beta)
    # Here, because it imports torch.
    from dpo_lightning.tracking.phases import Phases

    return measured_cost(exported, config, lam, Phases.on_stderr())


def _merge(exported: Exported, staged: Path) -> None:
    """Puts the merged model in the place of a staged adapter."""
    from dpo_lightning.run.share.merging import merge_adapter

    whole = staged / "merged"
    merge_adapter(exported, whole, weights=staged)
    for path in [*staged.iterdir()]:
        if path != whole:
            path.unlink()
    for path in [*whole.iterdir()]:
        path.replace(staged / path.name)
    whole.rmdir()


def _say_cost(folder: Path, cost: Mapping[str, Any]) -> None:
    """Writes the cost beside the weights, and into the card."""
    write_json(folder / AT_BETA_FILE, cost)
    card = folder / CARD
    text = card.read_text() if card.is_file() else ""
    card.write_text(f"{text.rstrip()}\n\n## At another beta\n\n{cost_in_words(cost)}\n")


def _write_card(exported: Exported, folder: Path) -> None:
    """The card as it is written today, where there is a run to tell of; else the export's own."""
    from dpo_lightning.run.card import model_card
    from dpo_lightning.run.share.facts import card_facts

    facts = card_facts(exported)
    if facts is not None:
        model_card(facts, adapter=exported.is_adapter).save(folder / CARD)
