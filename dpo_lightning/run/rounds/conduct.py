"""The rounds of a training: as it comes to one, answers are drawn, marked, grouped and filled.

All of it happens between two steps, on all ranks together. What a round has done is on disk before
the next part begins, so that a killed run goes on from there: batches of answers, marks, the rows
of the round, reference log-probabilities. A checkpoint names the rows that its steps were of; a
round that was drawn behind the checkpoint is drawn again by the same policy, and is the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from dpo_lightning.data.marked import MarkedGroup, MarkedPrompt, mark_groups
from dpo_lightning.data.rounds import RoundGroups, RoundPlan
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import CorruptArtifactError, UserError
from dpo_lightning.evaluation.many_answers import RoundDraws
from dpo_lightning.processes.phases import ShowPhase
from dpo_lightning.processes.signals import SignalWatch
from dpo_lightning.reference.fill import Watch
from dpo_lightning.run.plan import RoundsPlan
from dpo_lightning.run.rounds.drawing import (
    Answers,
    Drawing,
    DrawnParts,
    draw_round,
    drop_parts,
)
from dpo_lightning.run.rounds.files import RoundFacts, read_round, rows_path, write_round
from dpo_lightning.run.rounds.filling import Filling, Moment, fill_round
from dpo_lightning.run.rounds.kept import Saving
from dpo_lightning.run.rounds.outcome import round_metrics, say_round, trained_hash
from dpo_lightning.tracking.progress import Throughput
from dpo_lightning.training.checkpoints.exact_resume import random_state, set_random_state
from dpo_lightning.training.preemption import save_and_stop
from dpo_lightning.training.replicas import Replicas

log = logging.getLogger(__name__)

Mark = Callable[..., list[MarkedPrompt]]
"""Marks a round's answers: takes prompts, and ``round`` and ``check`` by name."""


class Paused(Exception):
    """A signal asks the run to stop between two parts of a round.

    Args:
        signum: Its number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@dataclass(frozen=True, slots=True)
class RoundWork:
    """All that the rounds of a run are made with.

    Attributes:
        given: Training rows: whose prompts are answered, and what a share of each step may be of.
        room: Most tokens of a prompt, so that an answer fits behind it.
        longest: Longest answer, in tokens.
        draws: How answers are drawn.
        text: An answer's token ids as text.
        mark: Marks them, on the first rank.
        judge: Who marks, in words.
        filling: How reference rows are made.
        check: Raises if another rank is gone.
        show: Shows how far long phases are.
        gives_marks: False where the judge compares two answers.
    """

    given: Sequence[TokenGroup]
    room: int
    longest: int
    draws: Drawing
    text: Callable[[Any], str]
    mark: Mark
    judge: str
    filling: Filling
    check: Callable[[], None]
    show: ShowPhase
    gives_marks: bool = True


@dataclass(frozen=True, slots=True)
class _ReadyRound:
    """A round, ready to be filled.

    Attributes:
        groups: Its groups.
        policy: Hash of the policy that drew its answers.
        folder: The run's folder that has it.
        metrics: Its metrics; none where they were logged before.
    """

    groups: list[TokenGroup]
    policy: str
    folder: Path
    metrics: dict[str, float]


class RoundConductor(Callback):
    """Makes the groups of each round as its first step comes up; a callback for its state alone.

    It does nothing until :meth:`ask` says with what.

    Args:
        rounds: How many, how answers are drawn and how they become groups.
        saving: Where things are kept.
        signals: Those that stop the run.
        throughput: Is told what is drawn, and the time that is none of the training loop's.
        seed: Of all draws.
    """

    def __init__(
        self,
        rounds: RoundsPlan,
        saving: Saving,
        *,
        signals: SignalWatch,
        throughput: Throughput,
        seed: int,
    ) -> None:
        self._settings = rounds.settings
        self._plan = rounds.plan
        self._saving = saving
        self._signals = signals
        self._throughput = throughput
        self._seed = seed
        self._trainer: pl.Trainer | None = None
        self._work: RoundWork | None = None
        self._usable: list[TokenGroup] = []
        # Round, hash of its rows and of its policy, as a checkpoint has them.
        self._state: dict[str, Any] = {}

    def ask(self, work: RoundWork) -> None:
        """Says what the rounds are made with, before the training.

        Raises:
            UserError: If no prompt leaves room for an answer.
        """
        self._work = work
        self._usable = [group for group in work.given if len(group.prompt) <= work.room]
        short = len(work.given) - len(self._usable)
        if not self._usable:
            raise UserError(
                f"rounds.count={self._plan.count}: no prompt of data.train leaves room for an "
                f"answer within {work.room + 1} tokens; a larger data.max_length= may"
            )
        if short:
            log.info("rounds: %d prompts leave no room for an answer and are not asked", short)

    @property
    def plan(self) -> RoundPlan:
        """Steps and groups of each round."""
        return self._plan

    # State ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The round that is trained on, and hashes of its rows and of the policy that drew them."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the round of a checkpoint."""
        self._state = dict(state_dict)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Notes the trainer, whose steps the rounds are of."""
        self._trainer = trainer

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes the parts of the last round, whose rows are complete."""
        if trainer.is_global_zero and self._saving.folder.begun:
            drop_parts(self._saving.folder.path)

    # Rounds -----------------------------------------------------------------------------------

    def begin(self, round: int) -> RoundGroups:
        """The groups of a round, with all that its steps need.

        Args:
            round: Its number, from 1.

        Raises:
            Stopped: If a signal asked for the end; what was done of the round is kept.
            UserError: If the judge fails, or no group is left.
            CorruptArtifactError: If the rows that a checkpoint was trained on are gone or changed.
        """
        try:
            return self._begin(round)
        except Paused as pause:
            assert self._trainer is not None
            log.info("round %d: what was drawn and marked of it is kept", round)
            save_and_stop(
                self._trainer,
                pause.signum,
                signals=self._signals,
                folder=self._saving.checkpoints,
                keep=self._saving.keep,
            )

    def _begin(self, round: int) -> RoundGroups:
        assert self._trainer is not None
        assert self._work is not None
        trainer, work = self._trainer, self._work
        begin, device = time.perf_counter(), work.filling.device
        # Whatever is loaded here may draw numbers that a resumed run draws at another time.
        state = random_state(device)
        try:
            moved = trainer.global_step > self._plan.first_step(round)
            ready = self._trained_on(round) if moved else self._drawn(round)
            moment = Moment(round, ready.policy, ready.folder, moved)
            rows = self._plan.given_rows_of(round, len(work.given))
            watch = Watch(self._check_alone, work.show)
            drawn, given = fill_round(
                work.filling, ready.groups, work.given, rows, moment=moment, watch=watch
            )
        finally:
            set_random_state(state, device)
            self._throughput.drawing_seconds += time.perf_counter() - begin
        if trainer.is_global_zero and ready.metrics:
            for logger in trainer.loggers:
                logger.log_metrics(ready.metrics, step=trainer.global_step)
        return RoundGroups(drawn, given, len(self._asked(round)))

    def _asked(self, round: int) -> list[int]:
        return self._plan.choose_prompts(round, len(self._usable))

    def _trained_on(self, round: int) -> _ReadyRound:
        """The rows of a round of which a checkpoint has taken steps already."""
        ranks = self._ranks
        known, state = self._state.get("round") == round, self._state

        def read() -> _ReadyRound:
            if not known:
                raise CorruptArtifactError(
                    f"resume: the checkpoint is of step {ranks.trainer.global_step} and knows no "
                    f"rows of round {round}: it was made with other rounds; resume from a "
                    "checkpoint at the start of a round, or start a new run"
                )
            for folder in self._saving.folders:
                found = read_round(folder, round)
                if found is not None and found.digest == state["digest"]:
                    self._saving.take_over(folder, round)
                    return _ReadyRound(found.groups, state["policy"], folder, {})
            raise CorruptArtifactError(
                f"{rows_path(self._saving.folder.path, round)}: the rows that the checkpoint was "
                "trained on are not there; put them back, or resume from a checkpoint of an "
                "earlier round"
            )

        return ranks.from_first(read)

    def _drawn(self, round: int) -> _ReadyRound:
        """A round that is drawn by the policy as it is, or was and is read as far as it is kept."""
        assert self._work is not None
        work, ranks = self._work, self._ranks
        policy = ranks.from_first(lambda: trained_hash(work.draws.policy))
        asked = [self._usable[number] for number in self._asked(round)]
        prompts = [group.prompt for group in asked]
        draws = RoundDraws(
            num_generations=self._settings.num_generations,
            temperature=self._settings.temperature,
            max_new_tokens=work.longest,
            seed=self._seed,
            round=round,
        )
        parts = DrawnParts(
            self._saving.folder.path,
            draws,
            policy=policy,
            prompts=prompts,
            writes=self._saving.writes,
        )
        begin = time.perf_counter()
        answers, tokens = draw_round(
            work.draws,
            prompts,
            draws,
            parts=parts,
            ranks=ranks,
            check=work.check,
            agreed=_stop_if_any,
            pending=lambda: self._signals.received,
        )
        self._throughput.drawn_tokens += tokens
        self._throughput.sampling_seconds += time.perf_counter() - begin

        def marked() -> _ReadyRound | int:
            try:
                return self._marked(round, asked, answers, policy)
            except Paused as pause:
                return pause.signum

        found = ranks.from_first(marked)
        if isinstance(found, int):
            raise Paused(found)
        if ranks.rank == 0 and self._saving.writes:
            drop_parts(self._saving.folder.path, but=round)
        return found

    def _marked(
        self, round: int, asked: Sequence[TokenGroup], answers: Answers, policy: str
    ) -> _ReadyRound:
        """Marks answers, makes groups of them, and has them written; on the first rank."""
        assert self._work is not None
        work, settings = self._work, self._settings
        drawn = [
            MarkedPrompt(
                prompt_key=group.prompt_key,
                prompt=group.prompt,
                answers=tuple(own),
                texts=tuple(work.text(ids) for ids in own),
                marks=(None,) * len(own),
                source=group.source,
            )
            for group, own in zip(asked, answers, strict=True)
        ]
        marked = work.mark(drawn, round=round, check=self._check)
        found, dropped = mark_groups(
            marked,
            how=settings.groups,
            min_margin=settings.min_margin,
            noise=settings.noise,
            seed=self._seed,
            round=round,
        )
        say_round(round, asked, found, dropped, plan=self._plan)
        facts = RoundFacts(
            round=round,
            step=self._ranks.trainer.global_step,
            policy=policy,
            judge=work.judge,
            groups=settings.groups,
            noise=settings.noise,
            min_margin=settings.min_margin,
            temperature=settings.temperature,
            seed=self._seed,
            answers=sum(map(len, answers)),
            dropped=dropped,
        )
        self._saving.folder.when_begun(lambda: self._write(found, facts))
        metrics = round_metrics(round, marked, found, gives_marks=work.gives_marks)
        folder = self._saving.folder.path
        return _ReadyRound([own.group for own in found], policy, folder, metrics)

    # Files ------------------------------------------------------------------------------------

    def _write(self, groups: Sequence[MarkedGroup], facts: RoundFacts) -> None:
        """Writes the rows of a round; those of later ones were of a course that the run left."""
        assert self._work is not None
        self._saving.remove_later(facts.round)
        folder = self._saving.folder.path
        digest = write_round(folder, groups, facts, self._work.draws.tokenizer)
        self._state = {"round": facts.round, "digest": digest, "policy": facts.policy}

    # Ranks and signals ------------------------------------------------------------------------

    @property
    def _ranks(self) -> Replicas:
        assert self._trainer is not None
        return Replicas(self._trainer)

    def _check(self) -> None:
        """Looks after the other ranks, and for signals.

        Raises:
            Paused: If there was one.
        """
        assert self._work is not None
        self._work.check()
        if self._signals.received:
            raise Paused(self._signals.received)

    def _check_alone(self) -> None:
        """The same where no other rank waits for this one; else a signal waits for the step."""
        assert self._work is not None
        if self._ranks.size == 1:
            self._check()
        else:
            self._work.check()


def _stop_if_any(signals: Sequence[int]) -> None:
    """Stops all ranks alike where one of them has had a signal."""
    if any(signals):
        raise Paused(max(signals))
