"""Trials that may be ranked together, and the origin of their KL.

Numbers of other rows, models or judges, or of answers that were drawn otherwise, have no common
axis. What a trial recorded as its ``basis`` decides; of an older one its settings do.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dpo_lightning.run.page.values import as_mapping, number
from dpo_lightning.sweeps.report.read import Sweep, TrialResult, override_key, override_value

DIRECTION = "policy || reference"

MOST_CUT_OFF = 0.05
"""Share of answers cut off at the limit above which neither judge nor KL decides."""

# What names rows, models and judges among the settings of a trial without a record of them.
_KEYS = {
    "model": ("model", "model.pretrained", "model.config", "model.revision"),
    "reference": ("reference.pretrained", "reference.adapter", "reference.revision"),
    "data.train": ("data", "data.train", "data.train_split", "data.subset", "data.revision"),
    "data.eval": ("data.eval", "data.eval_split", "data.eval_fraction"),
    "judge": ("evaluation.scorer", "evaluation.judge"),
}
# Unknown of some: these do not tell a trial from others by that alone.
_MAY_MISS = ("held_out", "drawn")
_WORDS = {"held_out": "held-out rows", "drawn": "answers", "judge": "judge"}


@dataclass(frozen=True, slots=True)
class KlOrigin:
    """Origin of a KL, without which it is no number to compare.

    Attributes:
        direction: Such as ``policy || reference``.
        answers: Answers that it was measured on, None where all were enumerated.
        temperature: At which they were drawn.
        max_new_tokens: Longest of them; None where the task itself ends them.
        per_token: Nats per token.
        cut_off: Share that ended at the limit.
    """

    direction: str
    answers: int | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    per_token: float | None = None
    cut_off: float | None = None

    @property
    def axis(self) -> tuple[object, ...]:
        """Facts that two KLs share which are drawn on one axis."""
        return (self.direction, self.answers, self.temperature, self.max_new_tokens)

    def words(self, *, cut: bool = True) -> str:
        """The origin in words; with the share that was cut off, if it is known and wanted."""
        if self.answers is None:
            return f"KL({self.direction}), exact over all answers"
        text = (
            f"KL({self.direction}) on {self.answers} answers at temperature {self.temperature:g}, "
            f"of at most {self.max_new_tokens} tokens"
        )
        return (
            text
            if self.cut_off is None or not cut
            else f"{text}, {self.cut_off:.0%} of them cut off"
        )


def kl_origin(trial: TrialResult) -> KlOrigin | None:
    """Origin of a trial's sampled KL; None where it recorded none."""
    facts = as_mapping(trial.evaluation.get("kl"))
    direction, answers = facts.get("direction"), number(facts.get("answers"))
    limit = number(facts.get("max_new_tokens"))
    if not isinstance(direction, str) or answers is None or limit is None:
        return None
    return KlOrigin(
        direction,
        int(answers),
        number(facts.get("temperature")) or 0.0,
        int(limit),
        number(facts.get("per_token")),
        number(facts.get("cut_off")),
    )


def pooled_origin(trials: Sequence[TrialResult], *, exact: bool) -> KlOrigin | None:
    """Origin of the KL of trials that share an axis; None where none of them recorded it.

    Args:
        trials: Those of a configuration.
        exact: True if the KL is a sum over all answers.
    """
    if exact:
        return KlOrigin(DIRECTION)
    known = [origin for trial in trials if (origin := kl_origin(trial)) is not None]
    if not known:
        return None
    per_token = [origin.per_token for origin in known if origin.per_token is not None]
    return replace(
        known[0],
        per_token=sum(per_token) / len(per_token) if per_token else None,
        cut_off=cut_off(trials),
    )


def cut_off(trials: Iterable[TrialResult]) -> float | None:
    """Mean share of answers that were cut off, None where no trial says."""
    known = [x for t in trials if (x := t.metric("samples/cut_off")) is not None]
    return sum(known) / len(known) if known else None


def comparable_parts(sweep: Sweep) -> list[tuple[str, Sweep]]:
    """The parts of a sweep that may be ranked together, the largest first.

    Args:
        sweep: The trials.

    Returns:
        What each part is of, empty where there is one, and the part; a trial that has not finished
        goes with those of its settings.
    """
    found: dict[str, list[TrialResult]] = defaultdict(list)
    recorded = all(trial.section("basis") for trial in sweep.finished)
    bases = {trial.folder: _basis(trial, recorded=recorded) for trial in sweep.finished}
    for trial in sweep.finished:
        strict = {k: v for k, v in bases[trial.folder].items() if k not in _MAY_MISS}
        found[json.dumps(strict, sort_keys=True)].append(trial)
    parts = list(found.values())
    for name in _MAY_MISS:
        parts = [piece for part in parts for piece in _split(part, bases, name)]
    parts.sort(key=len, reverse=True)
    if len(parts) < 2:
        return [("", sweep)]
    names = _names([bases[part[0].folder] for part in parts])
    others = [trial for trial in sweep.trials if not trial.finished]
    owners = [_owner(trial, parts) for trial in others]
    return [
        (
            name,
            replace(
                sweep,
                trials=(*part, *(t for t, i in zip(others, owners, strict=True) if i == own)),
                notes=sweep.notes if own == 0 else (),
            ),
        )
        for own, (name, part) in enumerate(zip(names, parts, strict=True))
    ]


def _split(
    trials: Sequence[TrialResult], bases: Mapping[str, Mapping[str, str]], name: str
) -> list[list[TrialResult]]:
    """Parts by one entry; those that lack it go with the most."""
    values = Counter(v for t in trials if (v := bases[t.folder].get(name)) is not None)
    if len(values) < 2:
        return [list(trials)]
    most = values.most_common(1)[0][0]
    return [[t for t in trials if bases[t.folder].get(name, most) == value] for value in values]


def _basis(trial: TrialResult, *, recorded: bool) -> dict[str, str]:
    """Model, rows and judge of a trial, as texts; as recorded, if that is of all trials."""
    if recorded:
        found = {name: _text(value) for name, value in trial.section("basis").items()}
    else:
        words = {override_key(w): override_value(w) for w in [*_command(trial), *trial.overrides]}
        found = {
            name: _text([words[key] for key in keys if key in words])
            for name, keys in _KEYS.items()
        }
        found["model"] = _text([found["model"], trial.section("model").get("name")])
        if not found["judge"]:
            found["judge"] = _text(trial.evaluation.get("judge"))
    origin = kl_origin(trial)
    if origin is not None:
        _, answers, temperature, limit = origin.axis
        found["drawn"] = f"{answers} of at most {limit} tokens at temperature {temperature}"
    return {name: text for name, text in found.items() if text or name not in _MAY_MISS}


def _command(trial: TrialResult) -> list[str]:
    try:
        return [word for word in shlex.split(trial.command or "") if "=" in word]
    except ValueError:
        return []


def _text(value: object) -> str:
    """A recorded value as one text, empty for nothing."""
    if isinstance(value, list):
        return " ".join(text for text in map(_text, value) if text)
    if isinstance(value, Mapping):
        return json.dumps(value, sort_keys=True)
    return "" if value is None else str(value)


def _names(bases: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of the parts: the entries in which they differ."""
    keys = list(dict.fromkeys(key for basis in bases for key in basis))
    differing = [key for key in keys if len({basis.get(key, "") for basis in bases}) > 1]
    told = [key for key in differing if key != "held_out"] or differing
    return [
        ", ".join(f"{_WORDS.get(key, key)} {basis.get(key) or 'none'}" for key in told)
        for basis in bases
    ]


def _owner(trial: TrialResult, parts: Sequence[Sequence[TrialResult]]) -> int:
    """Number of the part that a trial without a result goes with."""
    for number_of_part, part in enumerate(parts):
        if any(trial.settings == other.settings for other in part):
            return number_of_part
    return 0
