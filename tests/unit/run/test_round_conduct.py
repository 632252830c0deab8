"""The course of a round: drawn or read, marked, written, and left as it was where it is stopped."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_lightning.data.rounds import RoundGroups, RoundPlan
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import CorruptArtifactError, UserError
from dpo_lightning.processes.signals import Stopped
from dpo_lightning.run.plan import RoundsPlan
from dpo_lightning.run.rounds import conduct
from dpo_lightning.run.rounds.conduct import Paused, RoundConductor, RoundWork
from dpo_lightning.run.rounds.files import read_round, rows_path
from dpo_lightning.run.rounds.kept import Saving
from dpo_lightning.run.rounds.outcome import say_round
from dpo_lightning.settings.rounds import RoundSettings
from dpo_lightning.tracking.progress import Throughput
from tests.support.groups import ids
from tests.support.models import byte_tokenizer

PLAN = RoundPlan(3, 4, 2, 1, 2, 0.0, 1)
SETTINGS = RoundSettings(
    count=3,
    prompts=2,
    num_generations=2,
    steps=4,
    temperature=1.0,
    max_new_tokens=8,
    groups="pairs",
    min_margin=0.0,
    noise="none",
    previous=False,
    offline_fraction=0.0,
    exact=False,
)


class Folder:
    """A run's folder; hooks wait until it has begun."""

    def __init__(self, path: Path, *, begun: bool) -> None:
        path.mkdir(exist_ok=True)
        self.path, self.begun = path, begun
        self.hooks: list = []

    def when_begun(self, hook) -> None:
        if self.begun:
            hook()
        else:
            self.hooks.append(hook)

    def begin(self) -> None:
        self.begun = True
        for hook in self.hooks:
            hook()


class Scene:
    """A conductor whose answers are two words to each prompt, the longer one better.

    Attributes:
        logged: Metrics by step.
        marking: Called before marks are given.
    """

    def __init__(self, path: Path, *, begun: bool = True, resumed: Path | None = None) -> None:
        self.folder = Folder(path, begun=begun)
        self.logged: dict[int, dict[str, float]] = {}
        self.marking = lambda: None
        self.signals = SimpleNamespace(received=0, notice=lambda: None)
        logger = SimpleNamespace(log_metrics=self._log)
        self.trainer = SimpleNamespace(
            global_step=0, global_rank=0, world_size=1, is_global_zero=True, loggers=[logger]
        )
        self.throughput = Throughput()
        saving = Saving(self.folder, path / "checkpoints", 1, resumed)
        self.conductor = RoundConductor(
            RoundsPlan(SETTINGS, PLAN, embedded=False),
            saving,
            signals=self.signals,
            throughput=self.throughput,
            seed=1,
        )
        self.conductor.setup(self.trainer, None, "fit")
        given = [
            TokenGroup(ids(n, n), (ids(1), ids(2)), (1, 2), 1.0, f"g:{n}", f"s:{n}")
            for n in range(70, 76)
        ]
        self.conductor.ask(
            RoundWork(
                given=given,
                room=5,
                longest=8,
                draws=SimpleNamespace(policy=torch.nn.Linear(1, 1), tokenizer=byte_tokenizer()),
                text=lambda own: "x" * len(own),
                mark=self._mark,
                judge="length",
                filling=SimpleNamespace(device=torch.device("cpu")),
                check=lambda: None,
                show=None,
            )
        )

    def _log(self, values, step: int) -> None:
        self.logged[step] = values

    def _mark(self, drawn, *, round, check):
        self.marking()
        check()
        return [replace(own, marks=tuple(float(len(x)) for x in own.texts)) for own in drawn]

    def begin(self, round: int, step: int | None = None) -> RoundGroups:
        self.trainer.global_step = PLAN.first_step(round) if step is None else step
        return self.conductor.begin(round)


@pytest.fixture(autouse=True)
def drawn(monkeypatch) -> list[int]:
    """Rounds that were drawn; drawing and filling take random numbers."""
    rounds: list[int] = []

    def draw_round(drawing, prompts, draws, **_):
        rounds.append(draws.round)
        torch.rand(3)
        random.random()
        return [[ids(80, 81, draws.round), ids(90)] for _ in prompts], 8

    def fill_round(filling, groups, given, rows, *, moment, watch):
        torch.rand(2)
        return groups, given

    monkeypatch.setattr(conduct, "draw_round", draw_round)
    monkeypatch.setattr(conduct, "fill_round", fill_round)
    return rounds


def test_a_round_is_drawn_marked_and_written(tmp_path):
    """Marks 3 and 1: the longer answer is chosen; their mean is 2 and their deviation 1."""
    scene = Scene(tmp_path / "run")
    groups = scene.begin(2)
    assert [group.responses[0].tolist() for group in groups.drawn] == [[80, 81, 2]] * 2
    written = read_round(scene.folder.path, 2)
    assert written.marks == [(3.0, 1.0)] * 2
    assert (written.facts.round, written.facts.step, written.facts.judge) == (2, 4, "length")
    assert scene.logged == {
        4: {
            "rounds/round": 2.0,
            "rounds/prompts": 2.0,
            "rounds/groups": 2.0,
            "rounds/length": 2.0,
            "rounds/mark": 2.0,
            "rounds/mark_spread": 1.0,
        }
    }
    state = scene.conductor.state_dict()
    assert (state["round"], state["digest"]) == (2, written.digest)
    assert scene.throughput.drawn_tokens == 8


def test_what_a_round_draws_leaves_the_generators_as_they_were(tmp_path):
    scene = Scene(tmp_path / "run")
    before = torch.get_rng_state(), random.getstate()
    scene.begin(1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_inside_a_round_its_rows_are_read(tmp_path, drawn):
    first = Scene(tmp_path / "run")
    whole = first.begin(2)
    again = Scene(tmp_path / "run")
    again.conductor.load_state_dict(first.conductor.state_dict())
    drawn.clear()
    groups = again.begin(2, step=6)
    assert drawn == []
    assert again.logged == {}
    for one, other in zip(groups.drawn, whole.drawn, strict=True):
        assert [x.tolist() for x in one.responses] == [x.tolist() for x in other.responses]
        assert one.source == other.source


def test_rows_that_the_checkpoint_did_not_see_are_refused(tmp_path):
    first = Scene(tmp_path / "run")
    first.begin(2)
    again = Scene(tmp_path / "run")
    again.conductor.load_state_dict(first.conductor.state_dict() | {"digest": "0" * 64})
    with pytest.raises(CorruptArtifactError, match=r"rounds/2.jsonl: the rows that the checkpoint"):
        again.begin(2, step=6)


def test_a_checkpoint_of_other_rounds_is_refused(tmp_path):
    scene = Scene(tmp_path / "run")
    with pytest.raises(CorruptArtifactError, match="of step 6 and knows no rows of round 2"):
        scene.begin(2, step=6)


def test_a_run_that_goes_on_elsewhere_takes_the_rows_along(tmp_path):
    first = Scene(tmp_path / "one")
    first.begin(1)
    first.begin(2)
    (tmp_path / "one" / "checkpoints").mkdir()
    resumed = tmp_path / "one" / "checkpoints" / "step-000006.ckpt"
    again = Scene(tmp_path / "two", begun=False, resumed=resumed)
    again.conductor.load_state_dict(first.conductor.state_dict())
    again.begin(2, step=6)
    assert list((tmp_path / "two").iterdir()) == []
    again.folder.begin()
    for round in (1, 2):
        one, two = (rows_path(tmp_path / name, round).read_bytes() for name in ("one", "two"))
        assert one == two
    assert read_round(tmp_path / "two", 2).digest == first.conductor.state_dict()["digest"]


def test_nothing_is_written_before_the_run_has_begun(tmp_path):
    scene = Scene(tmp_path / "run", begun=False)
    scene.begin(1)
    assert list(scene.folder.path.iterdir()) == []
    assert scene.conductor.state_dict() == {}
    scene.folder.begin()
    assert scene.conductor.state_dict()["digest"] == read_round(scene.folder.path, 1).digest


def test_rows_of_a_course_that_was_left_are_removed(tmp_path):
    """A run that had come to round 3 goes on from round 1: its third round may come out otherwise.

    Once: what this run writes stays.
    """
    scene = Scene(tmp_path / "run")
    for round in (1, 2, 3):
        scene.begin(round)
    again = Scene(tmp_path / "run")
    again.begin(1)
    assert read_round(again.folder.path, 3) is None
    assert not rows_path(again.folder.path, 3).exists()
    again.begin(2)
    again.begin(3)
    again.conductor._saving.remove_later(1)
    assert read_round(again.folder.path, 3) is not None


def test_a_signal_while_marks_are_made_saves_and_stops(tmp_path, monkeypatch):
    scene = Scene(tmp_path / "run")
    scene.marking = lambda: setattr(scene.signals, "received", 15)
    saved = []

    def save_and_stop(trainer, signum, **_):
        saved.append((trainer.global_step, torch.get_rng_state()))
        raise Stopped(signum)

    monkeypatch.setattr(conduct, "save_and_stop", save_and_stop)
    before = torch.get_rng_state()
    with pytest.raises(Stopped) as stopped:
        scene.begin(2)
    assert stopped.value.signum == 15
    [(step, state)] = saved
    assert step == 4
    assert torch.equal(state, before)
    assert not rows_path(scene.folder.path, 2).exists()


def test_a_first_round_without_a_group_ends_the_run_and_a_later_one_moves_nothing(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(
        conduct, "draw_round", lambda drawing, prompts, draws, **_: ([[ids(9)] * 2] * 2, 4)
    )
    scene = Scene(tmp_path / "run")
    with pytest.raises(UserError, match="round 1: the answers to 2 prompts made no group"):
        scene.begin(1)
    assert list(scene.begin(2).drawn) == []
    assert "round 2: the answers to 2 prompts made no group" in caplog.text
    assert read_round(scene.folder.path, 2).groups == []
    # A resume in the midst of it reads that there are none.
    assert list(scene.begin(2, step=5).drawn) == []


def test_a_round_says_what_its_steps_have(caplog):
    """Room for 12 in two steps: 9 are 4.5 a step, and of all 12 nothing is said.

    Two of the four groups of two prompts, for 12 places: each has three.
    """
    plan = replace(PLAN, count=1, steps=2, batch_size=6, groups_per_prompt=2, offline_fraction=0.0)

    def said(groups: int, prompts: int) -> str:
        caplog.clear()
        with caplog.at_level("INFO"):
            say_round(1, [None] * prompts, [None] * groups, {}, plan=plan)
        return caplog.messages[-1].partition("prompts")[2]

    assert said(12, 6) == ""
    assert said(9, 6) == "; a step has about 4.5 of them, and room for 6"
    assert said(2, 2) == "; a step has about 3 of them, and room for 6; each is seen about 3 times"
    assert said(4, 2) == "; each is seen about 3 times"


def test_prompts_without_room_for_an_answer_are_not_asked(tmp_path):
    scene = Scene(tmp_path / "run")
    work = scene.conductor._work
    with pytest.raises(UserError, match=r"no prompt of data.train leaves room for an answer"):
        scene.conductor.ask(replace(work, room=1))


def test_paused_says_which_signal():
    assert Paused(2).signum == 2
