"""Questions to a judge about a round's answers: marks are kept, and one that fails is asked again.

A judge is given answers in calls of a fixed size, planned over the whole round, and the marks of a
call are kept together: a reward model's last bits depend on what it reads at once, so that a run
that was killed in between makes the same marks again. Imports no torch.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.judges import Judge, Mark
from dpo_lightning.evaluation.mark_cache import KeptMarks
from dpo_lightning.evaluation.win_rates import MOST_MISSING
from dpo_lightning.plugins import Prompt
from dpo_lightning.processes.phases import Say, ShowPhase, unshown
from dpo_lightning.settings.credentials import redact

log = logging.getLogger(__name__)

Texts = tuple[str, ...]
"""One answer that is marked, or two that are compared."""

# Errors of code that no second attempt mends.
_LASTING = (TypeError, NameError, AttributeError, ImportError, SyntaxError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Patience:
    """Waits for a judge that fails.

    Attributes:
        attempts: Times that a call is made at most.
        first_wait: Seconds before the second attempt; each later one waits four times as long.
        longest_wait: Seconds that no wait exceeds.
        stall: Seconds after which it is said that a call has not ended; None: never.
    """

    attempts: int = 3
    first_wait: float = 5.0
    longest_wait: float = 300.0
    stall: float | None = 60.0

    def wait(self, attempt: int) -> float:
        """Seconds between an attempt, counted from 1, and the next."""
        return min(self.longest_wait, self.first_wait * 4.0 ** (attempt - 1))


@dataclass(frozen=True, slots=True)
class RoundMarks:
    """Marks of a round's answers.

    Attributes:
        marks: In the order of the answers, None where there is none.
        made: Different answers that were marked now.
        kept: Those whose mark was there from before.
        facts: Counts of an endpoint, such as tokens and price.
    """

    marks: list[Mark]
    made: int
    kept: int
    facts: Mapping[str, Any] = field(default_factory=dict)


class RoundMarker:
    """Has the answers of rounds marked by a judge.

    Args:
        judge: The judge.
        label: Its name, for messages.
        kept: Marks of before; None: the judge keeps its own.
        per_call: Answers that it is given at once.
        go_on: What to do once it works again, for errors, such as ``resume=<folder>``.
        patience: How long it is waited for.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        label: str,
        kept: KeptMarks | None,
        per_call: int,
        go_on: str,
        patience: Patience | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._judge = judge
        self._label = label
        self._kept = kept
        self._per_call = per_call
        self._go_on = go_on
        self._patience = patience or Patience()
        self._sleep = sleep

    @property
    def gives_marks(self) -> bool:
        """True if the judge marks an answer by itself; else it compares two."""
        return self._judge.gives_marks

    def mark(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Texts],
        *,
        round: int,
        show: ShowPhase = unshown,
        check: Callable[[], object] = lambda: None,
    ) -> RoundMarks:
        """The mark of each answer; or of each two: 1 where the first is better, 0 where it is not.

        Equal answers to equal prompts are asked for once.

        Args:
            prompts: Of the answers.
            answers: The text of each; two of a judge that compares.
            round: Number of the round, from 1.
            show: Shows how far it is.
            check: Called between two calls and while it waits; what it raises ends the marking.

        Raises:
            UserError: If the judge fails for good, or leaves more than a tenth without a mark. The
                marks that it made are kept.
        """
        task = _Task(round, show, check)
        items = list(zip(prompts, answers, strict=True))
        keys = [self._key(prompt, texts) for prompt, texts in items]
        different = dict(zip(keys, items, strict=True))
        before = {} if self._kept is None else self._kept.before(round)
        found: dict[str, Mark] = {key: before[key] for key in different if key in before}
        kept = len(found)
        missing = [key for key in different if key not in found]
        calls = [missing[i : i + self._per_call] for i in range(0, len(missing), self._per_call)]
        own: Mapping[str, Mark] = {} if self._kept is None else dict(self._kept.of(round))
        with show("marking", total=len(different), unit="answers", done=kept) as say:
            for call in calls:
                # What was kept of a call is all that it gave marks for.
                found |= {key: own[key] for key in call if key in own}
                asked = {key: different[key] for key in call if key not in own}
                kept += len(call) - len(asked)
                if asked:
                    check()
                    found |= self._call(asked, task, say, len(found))
                say(len(found))
        self._check_missing(found, different, task)
        return RoundMarks([found[key] for key in keys], len(different) - kept, kept, task.facts())

    def _key(self, prompt: Prompt, texts: Texts) -> str:
        content = {"prompt": prompt, "answers": [*texts]}
        if self._kept is not None:
            return self._kept.key(content)
        return repr((prompt, texts))

    def _call(
        self, asked: Mapping[str, tuple[Prompt, Texts]], task: _Task, say: Say, done: int
    ) -> dict[str, Mark]:
        """The marks of one call, by as many attempts as there is patience for."""
        found: dict[str, Mark] = dict.fromkeys(asked)
        nonsense = 0
        for attempt in range(1, self._patience.attempts + 1):
            left = [key for key in asked if found[key] is None]
            try:
                marks, facts = self._ask([asked[key] for key in left], task, say, done)
            except UserError as error:
                if error.__cause__ is None or isinstance(error.__cause__, _LASTING):
                    raise self._stopped(task, str(error)) from error
                why: str | None = str(error)
            else:
                found |= dict(zip(left, marks, strict=True))
                why = str(facts["last_error"]) if facts.get("failed") else None
                task.count(facts)
                nonsense = nonsense + 1 if facts.get("nonsense") else 0
            # Nonsense may have been the server's: it is asked for once more, without a wait.
            if None not in found.values() or (why is None and nonsense != 1):
                break
            if why is not None and attempt == self._patience.attempts:
                raise self._stopped(task, why)
            if why is not None:
                self._wait(attempt, why, task, say, done)
        if self._kept is not None:
            self._kept.add(task.round, {k: mark for k, mark in found.items() if mark is not None})
        return found

    def _ask(
        self, asked: Sequence[tuple[Prompt, Texts]], task: _Task, say: Say, done: int
    ) -> tuple[list[Mark], Mapping[str, Any]]:
        prompts = [prompt for prompt, _ in asked]
        columns = [[texts[i] for _, texts in asked] for i in range(1 if self.gives_marks else 2)]
        show = _inside(say, done)
        with self._watched(len(asked), task):
            if self.gives_marks:
                return self._judge.mark(prompts, columns[0], show=show)
            judged = self._judge.compare(prompts, columns[0], columns[1], show=show)
        return judged.wins, judged.facts

    @contextlib.contextmanager
    def _watched(self, count: int, task: _Task) -> Iterator[None]:
        """Says now and then that the judge has not answered, while it has not."""
        stall = self._patience.stall
        if stall is None:
            yield
            return
        over = threading.Event()

        def watch(waited: float = stall, pause: float = stall) -> None:
            while not over.wait(pause):
                log.warning(
                    "round %d: %s has not answered for %.0f s (%d answers)",
                    *(task.round, self._label, waited, count),
                )
                pause, waited = waited, 2 * waited

        thread = threading.Thread(target=watch, name="stalled-judge", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _wait(self, attempt: int, why: str, task: _Task, say: Say, done: int) -> None:
        seconds = self._patience.wait(attempt)
        log.warning(
            "round %d: %s fails (%s); it is asked again in %.0f s, attempt %d of %d",
            *(task.round, self._label, self._reason(why), seconds, attempt + 1),
            self._patience.attempts,
        )
        # In short parts, so that whoever wants to stop the run is heard.
        while seconds > 0:
            task.check()
            say(done, f"asks again in {seconds:.0f} s")
            self._sleep(min(1.0, seconds))
            seconds -= 1.0

    def _check_missing(
        self, found: Mapping[str, Mark], asked: Mapping[str, tuple[Prompt, Texts]], task: _Task
    ) -> None:
        missing = [key for key in asked if found[key] is None]
        if not missing:
            return
        said = f"{len(missing)} of {len(asked)} answers have no mark"
        if len(missing) > MOST_MISSING * len(asked):
            first = " ".join(str(asked[missing[0]][0]).split())[:60]
            raise self._stopped(
                task,
                f"{said}, more than {MOST_MISSING:.0%}, as what it gave is no finite number; the "
                f"first of them is to {first!r}; fix the judge",
            )
        log.warning("round %d: %s: %s, and are left out", task.round, self._label, said)
        if self._kept is not None:
            # Now that the run goes on without them: else they are asked for again.
            self._kept.add(task.round, dict.fromkeys(missing))

    def _stopped(self, task: _Task, why: str) -> UserError:
        return UserError(
            f"round {task.round}: {self._label}: {self._reason(why)}; the marks that were made are "
            f"kept: {self._go_on}"
        )

    def _reason(self, why: str) -> str:
        """A reason on one line, without the judge's name, which stands before it."""
        return redact(" ".join(why.split()).removeprefix(f"{self._label}: "))


@dataclass(slots=True)
class _Task:
    """One round that is marked.

    Attributes:
        round: Its number, from 1.
        show: Shows how far it is.
        check: Raises where the run is to end.
        sums: Numbers that the judge counted.
    """

    round: int
    show: ShowPhase
    check: Callable[[], object]
    sums: dict[str, float] = field(default_factory=dict)

    def count(self, facts: Mapping[str, Any]) -> None:
        """Adds the counts of one call."""
        for name, value in facts.items():
            if isinstance(value, int | float):
                self.sums[name] = self.sums.get(name, 0) + value

    def facts(self) -> dict[str, Any]:
        """The counts of all calls."""
        return dict(self.sums)


def _inside(say: Say, done: int) -> ShowPhase:
    """Lets a judge show its own steps as steps of the round."""

    @contextlib.contextmanager
    def show(name: str, *, total: int, unit: str, done: int = done) -> Iterator[Say]:
        yield lambda now, note="", /: say(done + now, note)

    return show
