"""Course of a pruned sweep: which trials run to which rung, and what becomes of them there.

All of it follows from files: what trials reported (``rungs.jsonl``), how they ended
(``result.json``), and what was decided (``sweep.json``, written before anyone acts on it). So a
sweep that is killed at any moment goes on with the same decisions. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.files import PRUNING, RESULT_FILE, SWEEP_FILE, read_json, write_json
from dpo_lightning.settings.pruning import PruneSettings
from dpo_lightning.sweeps.halving import Cell, Terms, decide, spent_until, surely_kept
from dpo_lightning.sweeps.trials import Trial
from dpo_lightning.tracking.rungs import Goal, RungReport, read_reports

_FAILED = ("failed", "diverged", "stopped")


class Course:
    """Leads the trials of a sweep from rung to rung.

    Args:
        settings: By what is pruned.
        trials: All trials of the sweep.
        pools: What each is compared within, by the hash of its settings.
        folder: The sweep's folder.
    """

    def __init__(
        self,
        settings: PruneSettings,
        trials: Sequence[Trial],
        pools: Mapping[str, tuple[str, ...]],
        folder: Path,
    ) -> None:
        self._settings = settings
        self._trials = {trial.folder.name: trial for trial in trials}
        self._path = folder / SWEEP_FILE
        self._cells: dict[str, list[Trial]] = {}
        self._cell_of: dict[str, str] = {}
        for name, trial in self._trials.items():
            cell = " ".join(_own_settings(trial)) or "one"
            self._cells.setdefault(cell, []).append(trial)
            self._cell_of[name] = cell
        self._pools = {name: pools[own[0].plan.settings_hash] for name, own in self._cells.items()}
        self._goals: dict[str, Goal] = {}
        self._reports: dict[str, dict[int, RungReport]] = {}
        self._decisions: list[dict[str, Any]] = []
        self._changed = True

    # What the dispatcher asks -----------------------------------------------------------------

    def begin(self) -> None:
        """Takes up what an earlier command decided, and gives each trial its state.

        Raises:
            UserError: If that was decided by other settings, or among other trials.
        """
        about = self._about()
        found = read_json(self._path).get(PRUNING)
        if isinstance(found, dict):
            self._check_same(found, about)
            self._decisions = list(found["rungs"])
        else:
            self._write()
        for trial in self._trials.values():
            self._read(trial)
        for decision in self._decisions:
            self._apply(decision)
        for trial in self._trials.values():
            if trial.status == "waiting" and not self._may_go(trial):
                trial.status = "paused"

    def goal(self, trial: Trial) -> Goal | None:
        """The rung at which a trial that is started now is to stop; None: at its end."""
        rung = self._next(trial)
        name = trial.folder.name
        self._goals.pop(name, None)
        if rung is None:
            return None
        goal = Goal(rung, self._settings.at, self._settings.metric)
        self._goals[name] = goal
        return goal

    def ended(self, trial: Trial) -> None:
        """Takes note of the end of an attempt; one that reported is at its rung, however it ended.

        Args:
            trial: The trial, with its outcome.
        """
        self._changed = True
        self._read(trial)
        goal = self._goals.get(trial.folder.name)
        if trial.status == "finished" or goal is None:
            return
        if goal.rung in self._reports[trial.folder.name]:
            trial.status, trial.error = "paused", None
            _note(trial, "paused", None)

    def released(self) -> list[Trial]:
        """Decides each rung that all have reached; returns the paused trials that now may go on."""
        if not self._changed:
            return []
        self._changed = False
        while self._is_due():
            decision = self._decide()
            self._decisions.append(decision)
            self._write()
            self._apply(decision)
        free = [t for t in self._trials.values() if t.status == "paused" and self._may_go(t)]
        for trial in free:
            trial.status = "waiting"
        return free

    # Where trials stand -----------------------------------------------------------------------

    @property
    def _rung(self) -> int:
        """Number of the rung that is decided next."""
        return len(self._decisions)

    def _read(self, trial: Trial) -> None:
        self._reports[trial.folder.name] = read_reports(trial.folder, self._settings.metric)

    def _alive(self, rung: int) -> list[str]:
        """Cells that are still in the sweep before a rung."""
        if rung == 0:
            return list(self._cells)
        kept = {self._cell_of[name] for name in self._decisions[rung - 1]["kept"]}
        return [name for name in self._cells if name in kept]

    def _compared(self, rung: int) -> list[str]:
        """Those of them that are not alone in their pool."""
        alive = self._alive(rung)
        pools = [self._pools[name] for name in alive]
        return [name for name in alive if pools.count(self._pools[name]) > 1]

    def _next(self, trial: Trial) -> int | None:
        """The rung that a trial has to report at next; None where it can no longer be pruned."""
        cell, rung = self._cell_of[trial.folder.name], self._rung
        if rung == len(self._settings.at) or cell not in self._compared(rung):
            return None
        while rung in self._reports[trial.folder.name]:
            rung += 1
        return rung if rung < len(self._settings.at) else None

    def _may_go(self, trial: Trial) -> bool:
        """True if a trial may run towards its next rung, which needs no decision on the way."""
        name, rung = trial.folder.name, self._rung
        if rung == len(self._settings.at) or self._cell_of[name] not in self._compared(rung):
            return True
        reported = self._reports[name]
        if rung not in reported:
            return True
        # Ahead of a decision by one rung, and only where that is certain.
        return rung + 1 not in reported and self._cell_of[name] in self._sure()

    def _sure(self) -> set[str]:
        """Cells that stay at the next rung whatever the others report."""
        reported, missing = [], dict[tuple[str, ...], int]()
        for name in self._compared(self._rung):
            if all(self._is_through(trial, self._rung) for trial in self._cells[name]):
                reported.append(self._cell(name, self._rung))
            else:
                missing[self._pools[name]] = missing.get(self._pools[name], 0) + 1
        return surely_kept(reported, missing, self._terms(), rung=self._rung)

    def _is_through(self, trial: Trial, rung: int) -> bool:
        """True if a trial has reported at a rung, or never will."""
        name = trial.folder.name
        return rung in self._reports[name] or trial.status in ("finished", *_FAILED)

    # Decisions --------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        """True if all that are compared at the next rung have reported or ended."""
        rung = self._rung
        if rung == len(self._settings.at):
            return False
        trials = [trial for name in self._compared(rung) for trial in self._cells[name]]
        return all(self._is_through(trial, rung) for trial in trials)

    def _cell(self, name: str, rung: int) -> Cell:
        """A cell with what its trials reported at a rung."""
        own, sign = self._cells[name], self._settings.sign
        scores = {}
        for trial in own:
            report = self._reports[trial.folder.name].get(rung)
            if report is not None:
                seed = int(trial.plan.facts["seed"])
                scores[seed] = [sign * value for value in report.values]
        return Cell(
            name=name,
            pool=self._pools[name],
            line=tuple(line for line in _own_settings(own[0]) if _key(line) != "beta"),
            beta=float(own[0].plan.facts["beta"]),
            trials=len(own),
            scores=scores,
        )

    def _terms(self) -> Terms:
        """The terms, with the steps at which rungs were in fact: the warm-up may have put them off.

        Where trials differ in that the latest counts.
        """
        at, rung = self._settings.at, self._rung
        fractions = [float(decision["fraction"]) for decision in self._decisions]
        reports = [found[rung] for found in self._reports.values() if rung in found]
        fractions.append(max([at[rung], *(one.step / one.total_steps for one in reports)]))
        # Not by what trials that ran ahead have reported: that depends on who was quick.
        fractions += [max(share, fractions[-1]) for share in at[rung + 1 :]]
        work = max([0.0, *(one.work / one.total_steps for one in reports)])
        return Terms(tuple(fractions), self._settings.keep, self._settings.budget, work)

    def _decide(self) -> dict[str, Any]:
        """The decision of the next rung, as an entry of ``sweep.json``."""
        rung, terms = self._rung, self._terms()
        compared = self._compared(rung)
        alone = [name for name in self._alive(rung) if name not in compared]
        alive = [self._count(self._alive(number)) for number in range(rung + 1)]
        found = decide(
            [self._cell(name, rung) for name in compared],
            [self._cell(name, rung) for name in alone],
            terms,
            rung=rung,
            spent=spent_until(alive, terms.fractions, terms.report),
            trials=len(self._trials),
        )
        ended = [
            trial.folder.name
            for name in compared
            for trial in self._cells[name]
            if trial.status in _FAILED and rung not in self._reports[trial.folder.name]
        ]
        values = {
            trial.folder.name: self._reports[trial.folder.name][rung].value
            for name in compared
            for trial in self._cells[name]
            if rung in self._reports[trial.folder.name]
        }
        return {
            "rung": rung,
            "fraction": terms.fractions[rung],
            "kept": sorted(set(self._folders(found.kept)) - set(ended)),
            "pruned": sorted(set(self._folders(found.pruned)) - set(ended)),
            "ended": sorted(ended),
            "values": dict(sorted(values.items())),
            "why": {
                trial.folder.name: found.why[name]
                for name in sorted(found.why)
                for trial in self._cells[name]
            },
            "spent": found.spent,
        }

    def _count(self, cells: Iterable[str]) -> int:
        return sum(len(self._cells[name]) for name in cells)

    def _folders(self, cells: Iterable[str]) -> list[str]:
        return [trial.folder.name for name in cells for trial in self._cells[name]]

    def _apply(self, decision: Mapping[str, Any]) -> None:
        """Gives the trials that a decision is about their state; doing it again changes nothing."""
        rung = decision["rung"]
        for name in decision["ended"]:
            trial = self._trials[name]
            if trial.status == "waiting":  # of an earlier command: its rung went by without it
                result = read_json(trial.folder / RESULT_FILE)
                said = result.get("status")
                trial.status = said if said in _FAILED else "failed"
                trial.error = str(result.get("error") or f"it did not reach rung {rung + 1}")
        for name in decision["pruned"]:
            trial = self._trials[name]
            if trial.status == "finished":
                continue
            report = self._reports[name].get(rung)
            where = "" if report is None else f" at step {report.step} of {report.total_steps}"
            trial.status = "pruned"
            trial.error = (
                f"pruned{where}, {decision['why'][name]} by {self._settings.metric}; "
                "sweep.prune=none finishes it"
            )
            _note(trial, "pruned", trial.error)

    # sweep.json -------------------------------------------------------------------------------

    def _about(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "prune_at": list(settings.at),
            "prune_keep": settings.keep,
            "prune_within": list(settings.within),
            "prune_metric": settings.metric,
            "budget": settings.budget,
            "trials": sorted(trial.plan.settings_hash for trial in self._trials.values()),
        }

    def _write(self) -> None:
        entry = self._about() | {"rungs": self._decisions}
        write_json(self._path, read_json(self._path) | {PRUNING: entry})

    def _check_same(self, found: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Refuses to go on where earlier decisions were made otherwise, or are damaged.

        Raises:
            UserError: Naming the first thing that differs.
        """
        remedy = "finish that one with sweep.prune=none, or name another hydra.sweep.dir="
        rungs = found.get("rungs")
        if not isinstance(rungs, list) or about.keys() - found.keys():
            raise UserError(f"{self._path}: its {PRUNING} is damaged; {remedy}")
        for key, value in about.items():
            if found[key] == value:
                continue
            if key == "trials":
                raise UserError(
                    f"hydra.sweep.dir={self._path.parent}: the sweep there is pruned among other "
                    f"trials than these; {remedy}"
                )
            raise UserError(
                f"sweep.{key}={value}: the sweep in {self._path.parent} is pruned with "
                f"{found[key]}; {remedy}"
            )


def _own_settings(trial: Trial) -> list[str]:
    """The swept settings of a trial but for its seed."""
    return [line for line in trial.plan.overrides if _key(line) != "seed"]


def _key(line: str) -> str:
    return line.lstrip("+~").partition("=")[0]


def _note(trial: Trial, status: str, error: str | None) -> None:
    """Puts a trial's state into its files."""
    path = trial.folder / RESULT_FILE
    result = read_json(path)
    if result.get("status") != status or result.get("error") != error:
        facts = {"settings_hash": trial.plan.settings_hash, **trial.plan.facts}
        write_json(path, facts | result | {"status": status, "error": error})
        # Here, because few trials come to it. The run wrote its page before this was decided.
        from dpo_lightning.run.page.write import keep_run_page

        keep_run_page(trial.folder)
    trial.metrics = result.get("metrics") or {}
    trial.save()
