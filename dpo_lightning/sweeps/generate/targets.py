"""Policies that ``generate`` answers with, and their files: one run or model, or a sweep's trials.

Everything is looked at before anything is loaded or written. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_lightning.data.questions import Format
from dpo_lightning.errors import UserError
from dpo_lightning.files import SWEEP_FILE
from dpo_lightning.run.answering.formats import SUFFIXES
from dpo_lightning.run.answering.subject import AnsweringPolicy, subject_of
from dpo_lightning.run.finished import EXPORT
from dpo_lightning.run.opened import open_named
from dpo_lightning.sweeps.generate.request import Request
from dpo_lightning.sweeps.report.read import read_sweep

_SETTINGS = ".settings.yaml"


@dataclass(frozen=True, slots=True)
class Target:
    """A policy and the file of its answers.

    Attributes:
        generator: Its name in the answers.
        name: Its folder or hub id.
        subject: The policy with its settings.
        path: The file.
    """

    generator: str
    name: str
    subject: AnsweringPolicy
    path: Path

    @property
    def settings_path(self) -> Path:
        """The file beside it that says how the answers were drawn."""
        return settings_path(self.path)


@dataclass(frozen=True, slots=True)
class Targets:
    """All that is to be answered.

    Attributes:
        own: Policies and their files.
        skipped: Trials that did not finish, with their status.
        of_sweep: True if they are a sweep's.
    """

    own: tuple[Target, ...]
    skipped: tuple[tuple[str, str], ...]
    of_sweep: bool


def settings_path(path: Path) -> Path:
    """The file that says how a file of answers was drawn."""
    return path.with_name(f"{path.name}{_SETTINGS}")


def is_sweep(folder: Path) -> bool:
    """True for the folder of a sweep."""
    marks = (SWEEP_FILE, "multirun.yaml")
    return folder.is_dir() and any((folder / mark).is_file() for mark in marks)


def find_targets(request: Request) -> Targets:
    """The policies that answer.

    Args:
        request: The command line.

    Raises:
        UserError: If one cannot, a file could not be written, or is there already.
    """
    if request.form == "arena_hard" and request.generator and request.output is not None:
        _check_arena_name(request.output, request.generator)
    folder = Path(request.name).expanduser()
    if is_sweep(folder):
        return _of_sweep(request, folder)
    generator = request.generator or _own_name(request)
    path = request.output
    if path is not None and path.is_dir():
        path = path / f"{generator}{SUFFIXES[request.form]}"
    path = path or _place(request) / f"{generator}{SUFFIXES[request.form]}"
    check_path(path, request.form)
    return Targets((_target(request, request.name, generator, path),), (), of_sweep=False)


def _check_arena_name(output: Path, generator: str) -> None:
    if not output.is_dir() and output.stem != generator:
        raise UserError(
            f"--name {generator}: arena_hard takes the name from the file, which is "
            f"--output {output}; leave --name out, or name the file {generator}.jsonl"
        )


def _own_name(request: Request) -> str:
    """A name for one policy: of a file that was named, its own; else that of a folder."""
    if request.form == "arena_hard" and request.output is not None and not request.output.is_dir():
        return request.output.stem
    path = Path(request.name)
    name = path.absolute().parent.name if path.name == EXPORT else path.name
    return name or path.absolute().name


def _place(request: Request) -> Path:
    return Path("outputs", "answers", request.prompts.name.partition(".")[0] or "prompts")


def _of_sweep(request: Request, folder: Path) -> Targets:
    if request.generator is not None:
        raise UserError(
            f"--name {request.generator}: each trial of a sweep has its folder's name; leave it out"
        )
    trials = read_sweep(folder).trials
    place = request.output or _place(request) / folder.absolute().name
    if place.exists() and not place.is_dir():
        raise UserError(
            f"--output {place}: for a sweep it must be a folder: one file for each trial"
        )
    if folder.resolve() in place.resolve().parents or folder.resolve() == place.resolve():
        raise UserError(
            f"--output {place}: nothing is written into the sweep's folder; name one outside of it"
        )
    done = [trial for trial in trials if trial.finished]
    if not done:
        raise UserError(
            f"run={folder}: no trial of it has finished; sweep.resume={folder} finishes them"
        )
    own = tuple(
        _target(
            request,
            str(folder / trial.folder),
            trial.folder,
            place / f"{trial.folder}{SUFFIXES[request.form]}",
        )
        for trial in done
    )
    skipped = tuple((t.folder, t.status) for t in trials if not t.finished)
    return Targets(own, skipped, of_sweep=True)


def _target(request: Request, name: str, generator: str, path: Path) -> Target:
    at_place = request.at_beta is not None
    opened = open_named(name, reference=request.reference, alone=not at_place)
    if not at_place and request.reference is not None:
        raise UserError(
            f"--reference {request.reference}: the policy alone answers; leave it out, or name a "
            "place between the two with --at-beta"
        )
    subject = subject_of(opened, request.settings, needs_reference=at_place)
    if at_place and not subject.backend.is_own:
        raise UserError(
            f"--at-beta {request.at_beta:g}: two models' logits are mixed at each token, which "
            f"generation.backend={subject.backend.name} cannot; draw by generation.backend=hf"
        )
    if subject.run is not None:
        _check_outside(path, subject.run)
    return Target(generator, name, subject, path)


def _check_outside(path: Path, run: Path) -> None:
    if run.resolve() in path.resolve().parents:
        raise UserError(
            f"--output {path}: nothing is written into the run's folder; name a file outside of it"
        )


def check_path(path: Path, form: Format) -> None:
    """Refuses a name that the benchmark's loader would not take.

    Raises:
        UserError: If it has another suffix.
    """
    if form != "jsonl" and path.suffix != SUFFIXES[form]:
        raise UserError(
            f"--output {path}: {form} reads {SUFFIXES[form]} files; name it "
            f"{path.with_suffix(SUFFIXES[form])}"
        )


# What is there already ---------------------------------------------------------------------------


def facts_of(request: Request, target: Target, lam: float) -> dict[str, Any]:
    """Facts of how answers are drawn, for the file beside them.

    Args:
        request: The command line.
        target: The policy.
        lam: Place of what answers.
    """
    draws = request.draws
    return {
        "generator": target.generator,
        "run": target.name,
        "format": request.form,
        "prompts": str(request.prompts),
        "prompts_sha256": hashlib.sha256(request.prompts.read_bytes()).hexdigest(),
        "prompts_as": request.mode or "by format",
        "temperature": draws.temperature,
        "top_p": draws.top_p,
        "max_new_tokens": draws.max_new_tokens,
        "seed": draws.seed,
        "at_beta": request.at_beta,
        "lambda": lam,
        "reference": request.reference,
        "settings": list(request.settings),
        **target.subject.backend.facts(),
    }


def kept_from_before(target: Target, facts: Mapping[str, Any]) -> bool:
    """True if the file is there, and its answers were drawn in just this way.

    Args:
        target: The policy and its file.
        facts: How they would be drawn.
    """
    if not target.path.is_file():
        return False
    try:
        found = yaml.safe_load(target.settings_path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(found, dict) and {k: found.get(k) for k in facts} == dict(facts)


def refuse_existing(targets: Sequence[Target]) -> None:
    """Refuses files that are there.

    Raises:
        UserError: If there are any.
    """
    there = [target.path for target in targets if target.path.exists()]
    if there:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(
            f"--output {there[0]}{more}: it is there already, with answers of another kind; name "
            "another place, or add --overwrite"
        )
