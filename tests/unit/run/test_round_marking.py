"""Marks of a round: what is kept, and judges that fail, stall, give NaN or text."""

import contextlib
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dpo_lightning import plugins
from dpo_lightning.data.marked import mark_groups, pair_numbers
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.endpoint_judge import EndpointJudge
from dpo_lightning.evaluation.judges import MarkingJudge
from dpo_lightning.evaluation.mark_cache import KeptMarks
from dpo_lightning.evaluation.named_judge import checked_marks, judge_identity, make_judge
from dpo_lightning.plugins import load_plugins
from dpo_lightning.run.rounds.asking import Patience, RoundMarker
from dpo_lightning.run.rounds.marking import make_marker, mark_prompts
from dpo_lightning.settings.judging import EndpointSettings, JudgeSettings
from tests.support.judge_server import Act, judge_server, marks_length, prefers_longer
from tests.support.marked import marked_prompt

PROMPTS = [f"p{i}" for i in range(10)]
ANSWERS = [("a" * (i + 1),) for i in range(10)]
LENGTHS = [float(i + 1) for i in range(10)]


class Function:
    """A judge's function: it marks by length, unless it is told to do something else."""

    def __init__(self, act: Callable[[int, list[str]], object] | None = None) -> None:
        self.calls: list[list[str]] = []
        self._act = act

    def __call__(self, prompts, answers):
        self.calls.append(answers)
        found = None if self._act is None else self._act(len(self.calls), answers)
        return [len(answer) for answer in answers] if found is None else found


class Waits(list):
    """Seconds that were waited for, none of them long."""

    def __call__(self, seconds: float) -> None:
        assert seconds <= 1
        self.append(seconds)


def marker_of(function, folder: Path, *, per_call=4, identity="mine.f", waits=None, **patience):
    return RoundMarker(
        MarkingJudge(partial(checked_marks, "mine.f", function, may_miss=True)),
        label="evaluation.judge=mine.f",
        kept=KeptMarks(folder / "rounds" / ".marks", {"function": identity}),
        per_call=per_call,
        go_on="go on with resume=the/run",
        patience=Patience(**patience),
        sleep=Waits() if waits is None else waits,
    )


def marked(marker: RoundMarker, *, round=1, prompts=PROMPTS, answers=ANSWERS, **more):
    return marker.mark(prompts, answers, round=round, **more)


def fails(times: int, error: type[Exception]) -> Callable[[int, list[str]], None]:
    def act(number, answers):
        if number <= times:
            raise error("no luck")

    return act


def raised(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_answers_are_marked_in_calls_and_equal_ones_once(tmp_path):
    function = Function()
    found = marked(
        marker_of(function, tmp_path), prompts=[*PROMPTS, "p0"], answers=[*ANSWERS, ("a",)]
    )
    assert found.marks == [*LENGTHS, 1.0]
    assert (found.made, found.kept) == (10, 0)
    assert [len(call) for call in function.calls] == [4, 4, 2]


def test_a_mark_is_made_once_for_all_rounds_of_a_run(tmp_path):
    marked(marker_of(Function(), tmp_path))
    later = Function()
    found = marked(
        marker_of(later, tmp_path), round=2, prompts=["new", *PROMPTS], answers=[("x",), *ANSWERS]
    )
    assert found.marks == [1.0, *LENGTHS]
    assert later.calls == [["x"]]
    assert (found.made, found.kept) == (1, 10)


def test_another_judge_marks_anew(tmp_path):
    marked(marker_of(Function(), tmp_path))
    other = Function()
    marked(marker_of(other, tmp_path, identity="mine.f, changed"))
    assert len(other.calls) == 3


def test_a_run_that_was_killed_asks_only_for_what_is_missing(tmp_path):
    """The calls are the same as without the kill: what a judge reads at once decides last bits."""

    def kill(number, answers):
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        marked(marker_of(Function(kill), tmp_path))
    again, whole = Function(), Function()
    (tmp_path / "other").mkdir()
    assert marked(marker_of(again, tmp_path)).marks == LENGTHS
    marked(marker_of(whole, tmp_path / "other"))
    assert again.calls == whole.calls[2:]


def test_a_call_that_was_lost_is_made_again_as_it_was(tmp_path):
    first = Function()
    marked(marker_of(first, tmp_path))
    path = tmp_path / "rounds" / ".marks" / "1.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], *lines[2:]]))
    again = Function()
    assert marked(marker_of(again, tmp_path)).marks == LENGTHS
    assert again.calls == [first.calls[1]]


def test_marks_of_a_later_round_do_not_change_what_is_asked_at_once(tmp_path):
    """A run that is begun anew in its folder finds the marks of rounds that are not there yet."""
    marked(marker_of(Function(), tmp_path), round=2, prompts=PROMPTS[:3], answers=ANSWERS[:3])
    anew = Function()
    assert marked(marker_of(anew, tmp_path)).marks == LENGTHS
    assert [len(call) for call in anew.calls] == [4, 4, 2]


def test_a_line_that_was_cut_off_is_asked_for_again_and_harms_no_other(tmp_path):
    path = tmp_path / "rounds" / ".marks" / "1.jsonl"
    marked(marker_of(Function(), tmp_path))
    path.write_bytes(path.read_bytes()[:-20])
    again = Function()
    assert marked(marker_of(again, tmp_path)).marks == LENGTHS
    assert [len(call) for call in again.calls] == [2]
    nothing = Function()
    marked(marker_of(nothing, tmp_path))
    assert nothing.calls == []


@pytest.mark.parametrize(
    "line",
    ["[]", '{"round": 1}', '{"round": "1", "marks": {}}', '{"round": 1, "marks": {"k": "high"}}',
     '{"round": 1, "marks": {"k": NaN}}', "\x00"],
)  # fmt: skip
def test_a_damaged_line_is_no_mark(tmp_path, line):
    (tmp_path / "1.jsonl").write_text(f'{line}\n{{"round": 1, "marks": {{"k": 2.0}}}}\n')
    assert KeptMarks(tmp_path, {}).before(2) == {"k": 2.0}


def test_no_process_touches_the_marks_of_another(tmp_path):
    """A later one, by its number, has the last word."""
    for mark in (1.0, 2.0):
        KeptMarks(tmp_path / "rounds" / ".marks", {}).add(1, {"k": mark})
    files = sorted((tmp_path / "rounds" / ".marks").iterdir())
    assert [path.name for path in files] == ["1.jsonl", "2.jsonl"]
    assert files[0].read_text() == '{"round": 1, "marks": {"k": 1.0}}\n'
    assert KeptMarks(tmp_path / "rounds" / ".marks", {}).of(1) == {"k": 2.0}


def test_a_run_that_goes_on_in_another_folder_knows_the_marks_of_the_first(tmp_path, plugin):
    settings = JudgeSettings("mine_rounds.length", ("mine_rounds",), None, 4, tmp_path / "cache")
    judge = make_judge(settings, may_miss=True)
    for name, resumed, made in (("one", None, 10), ("two", "one", 0), ("three", None, 10)):
        (tmp_path / name).mkdir()
        own = make_marker(
            judge, settings, tmp_path / name, go_on="again",
            resumed=None if resumed is None else tmp_path / resumed,
        )  # fmt: skip
        assert marked(own).made == made
    assert not (tmp_path / "two" / "rounds").exists()


def test_marks_are_kept_on_where_an_earlier_run_is_cleared_away(tmp_path, caplog):
    kept = KeptMarks(tmp_path / "rounds" / ".marks", {})
    kept.add(1, {"k": 1.0})
    shutil.rmtree(tmp_path / "rounds")
    kept.add(2, {"l": 2.0})
    assert KeptMarks(tmp_path / "rounds" / ".marks", {}).before(3) == {"l": 2.0}
    assert caplog.records == []


def test_the_folder_of_a_run_that_is_gone_is_not_made_again(tmp_path, caplog):
    KeptMarks(tmp_path / "gone" / "rounds" / ".marks", {}).add(1, {"k": 1.0})
    assert not (tmp_path / "gone").exists()
    assert "marks are not kept" in caplog.text


def test_a_disk_that_is_full_costs_no_mark(tmp_path, caplog):
    (tmp_path / "rounds").write_text("in the way")
    assert marked(marker_of(Function(), tmp_path)).marks == LENGTHS
    assert [r.getMessage() for r in caplog.records if "are not kept" in r.getMessage()]
    assert len(caplog.records) == 1


def test_a_judge_that_fails_is_asked_again_after_a_wait(tmp_path, caplog):
    """Waits of 5 and of 20 seconds, in parts of one, so that a signal is heard."""
    waits = Waits()
    function = Function(fails(2, TimeoutError))
    found = marked(marker_of(function, tmp_path, per_call=10, waits=waits))
    assert found.marks == LENGTHS
    assert waits == [1.0] * 25
    begin = "round 1: evaluation.judge=mine.f fails (TimeoutError: no luck); it is asked again in "
    assert [record.getMessage() for record in caplog.records] == [
        f"{begin}5 s, attempt 2 of 3",
        f"{begin}20 s, attempt 3 of 3",
    ]


def test_no_wait_is_longer_than_the_longest():
    """5, 20, 80 and 320 seconds, of which the last is cut."""
    assert [Patience().wait(attempt) for attempt in (1, 2, 3, 4)] == [5, 20, 80, 300]


def test_a_judge_that_goes_on_failing_stops_the_run_with_one_line(tmp_path):
    """Its first call worked: its marks are there when the run goes on."""

    def act(number, answers):
        if number > 1:
            raise ConnectionError("nobody\nthere")

    said = raised(lambda: marked(marker_of(Function(act), tmp_path)))
    assert said == (
        "round 1: evaluation.judge=mine.f: ConnectionError: nobody there; the marks that were made "
        "are kept: go on with resume=the/run"
    )
    again = Function()
    marked(marker_of(again, tmp_path))
    assert [len(call) for call in again.calls] == [4, 2]


@pytest.mark.parametrize("error", [TypeError, AttributeError, NameError, ImportError])
def test_a_fault_of_the_code_is_not_waited_for(tmp_path, error):
    waits, function = Waits(), Function(fails(1, error))
    said = raised(lambda: marked(marker_of(function, tmp_path, waits=waits)))
    assert f"{error.__name__}: no luck" in said
    assert (waits, len(function.calls)) == ([], 1)


def test_too_few_marks_are_a_fault_of_the_code(tmp_path):
    function = Function(lambda number, answers: [1.0])
    assert "1 marks for 4 answers" in raised(lambda: marked(marker_of(function, tmp_path)))
    assert len(function.calls) == 1


def test_who_wants_to_stop_is_heard_while_a_judge_is_waited_for(tmp_path):
    heard: list[int] = []

    def check():
        heard.append(1)
        if len(heard) == 4:
            raise InterruptedError

    waits = Waits()
    with pytest.raises(InterruptedError):
        marked(marker_of(Function(fails(9, TimeoutError)), tmp_path, waits=waits), check=check)
    # Once before the call, and then each second.
    assert waits == [1.0, 1.0]


@pytest.mark.parametrize("nothing", [math.nan, math.inf, None, "no idea"])
def test_a_few_answers_without_a_mark_are_left_out(tmp_path, caplog, nothing):
    """One of ten is a tenth, which may be missing; it is not asked for when the round is redone."""
    function = Function(lambda number, answers: [nothing] + [1.0] * 9)
    assert marked(marker_of(function, tmp_path, per_call=10)).marks == [None] + [1.0] * 9
    assert "1 of 10 answers have no mark, and are left out" in caplog.text
    again = Function()
    assert marked(marker_of(again, tmp_path, per_call=10)).marks == [None] + [1.0] * 9
    assert again.calls == []
    # Another round may ask for it.
    assert marked(marker_of(again, tmp_path, per_call=10), round=2).marks[0] == 1.0


def test_many_answers_without_a_mark_stop_the_run(tmp_path):
    """Two of ten. The marks of the others are kept: when the run goes on, these are asked for."""
    function = Function(lambda number, answers: [math.nan, math.nan] + [1.0] * 8)
    said = raised(lambda: marked(marker_of(function, tmp_path, per_call=10)))
    assert said == (
        "round 1: evaluation.judge=mine.f: 2 of 10 answers have no mark, more than 10%, as what it "
        "gave is no finite number; the first of them is to 'p0'; fix the judge; the marks that "
        "were made are kept: go on with resume=the/run"
    )
    again = Function()
    assert marked(marker_of(again, tmp_path, per_call=10)).marks == [1.0, 2.0] + [1.0] * 8
    assert again.calls == [["a", "aa"]]


def test_marks_in_text_are_read_like_replies(tmp_path):
    texts = ["7", "Score: 8/10", 'Good.\n{"mark": 9}', "-1.5"]
    function = Function(lambda number, answers: texts)
    found = marked(marker_of(function, tmp_path), prompts=PROMPTS[:4], answers=ANSWERS[:4])
    assert found.marks == [7.0, 8.0, 9.0, -1.5]


def test_a_judge_that_is_silent_is_named_now_and_then(tmp_path, caplog):
    marker = marker_of(Function(lambda n, a: time.sleep(0.4)), tmp_path, per_call=10, stall=0.1)
    assert marked(marker).marks == LENGTHS
    assert "round 1: evaluation.judge=mine.f has not answered for 0 s (10 answers)" in caplog.text
    caplog.clear()
    marked(marker_of(Function(), tmp_path, stall=60.0), round=2)
    assert caplog.records == []


def test_it_is_shown_how_far_it_is_and_how_long_it_waits(tmp_path):
    said: list[tuple] = []

    @contextlib.contextmanager
    def show(name, *, total, unit, done=0):
        said.append((name, total, unit, done))
        yield lambda now, note="": said.append((now, note))

    function = Function(lambda number, answers: 1 / 0 if number == 2 else None)
    marked(marker_of(function, tmp_path), show=show)
    assert said[0] == ("marking", 10, "answers", 0)
    assert [(4, f"asks again in {left} s") for left in (5, 4, 3, 2, 1)] == [
        own for own in said[1:] if own[1]
    ]
    steps = [own[0] for own in said[1:]]
    assert steps == sorted(steps)
    assert steps[-1] == 10


# An endpoint --------------------------------------------------------------------------------------


def endpoint(server, folder: Path, **more) -> JudgeSettings:
    own = EndpointSettings(
        **({"url": server.url, "model": "m", "form": "marks", "retries": 0, "concurrency": 1}
           | more)
    )  # fmt: skip
    return JudgeSettings("m", (), own, 4, folder / "cache")


def endpoint_marker(settings: JudgeSettings, folder: Path, waits: list) -> RoundMarker:
    judge = EndpointJudge(settings.endpoint, cache=settings.cache, wait=[].append)
    own = make_marker(judge, settings, folder, go_on="go on with resume=the/run")
    own._sleep = waits if isinstance(waits, Waits) else Waits()
    return own


BAD = {
    "fails": Act("down", status=503),
    "is gone": Act(reset=True),
    "stalls": Act(stall=20),
}


@pytest.mark.parametrize("name", BAD)
def test_a_server_that_comes_back_marks_all_and_nothing_twice(tmp_path, name, caplog):
    """It answers four questions and then two of them badly, whoever they are of: of the others each
    is asked once."""

    def act(number, question):
        return BAD[name] if number in (4, 5) else marks_length(number, question)

    waits = Waits()
    with judge_server(act) as server:
        settings = endpoint(server, tmp_path, timeout=0.5)
        found = marked(endpoint_marker(settings, tmp_path, waits))
        assert found.marks == LENGTHS
        assert len(server.seen) == 12
        assert len(waits) == 5
        assert found.facts["failed"] == 2
        assert found.facts["tokens_in"] == 1000
        # What was marked costs nothing another time, by whichever run.
        marked(endpoint_marker(settings, tmp_path / "other", waits), round=3)
        assert len(server.seen) == 12
    assert "evaluation.judge=endpoint fails" in caplog.text


def test_a_server_that_stays_away_stops_the_run_and_marks_are_kept(tmp_path):
    """Its fifth and later answers fail, five times over: 5 + 20 + 80 + 300 seconds of waiting."""
    down = True

    def act(number, question):
        return Act("down", status=503) if down and number > 3 else marks_length(number, question)

    waits = Waits()
    with judge_server(act) as server:
        settings = endpoint(server, tmp_path)
        said = raised(lambda: marked(endpoint_marker(settings, tmp_path, waits)))
        assert said == (
            f"round 1: evaluation.judge=endpoint: {server.url}: it answers 503 (down); the marks "
            "that were made are kept: go on with resume=the/run"
        )
        assert sum(waits) == 405
        down, before = False, len(server.seen)
        assert marked(endpoint_marker(settings, tmp_path, Waits())).marks == LENGTHS
        assert len(server.seen) - before == 6


@pytest.mark.parametrize(("status", "remedy"), [(401, "judge_key_variable"), (404, "judge_model")])
def test_a_server_that_takes_no_question_is_not_waited_for(tmp_path, status, remedy):
    waits = Waits()
    with judge_server(lambda n, q: Act("no", status=status)) as server:
        settings = endpoint(server, tmp_path)
        said = raised(lambda: marked(endpoint_marker(settings, tmp_path, waits)))
    assert said.startswith(f"round 1: evaluation.judge=endpoint: {server.url}: it answers {status}")
    assert said.endswith("go on with resume=the/run")
    assert remedy in said
    assert waits == []


@pytest.mark.parametrize("text", ['{"mark": NaN}', '{"mark": "high"}', "I would say seven.", ""])
def test_nonsense_is_asked_for_once_more_and_then_has_no_mark(tmp_path, text):
    """The shortest answer gets nonsense always, the next one only at first: 10 questions and 2."""

    def act(number, question):
        always = "=== answer ===\na\n" in question
        once = "=== answer ===\naa\n" in question and number < 10
        return Act(text) if always or once else marks_length(number, question)

    waits = Waits()
    with judge_server(act) as server:
        found = marked(endpoint_marker(endpoint(server, tmp_path), tmp_path, waits))
        assert len(server.seen) == 12
    assert found.marks == [None, *LENGTHS[1:]]
    assert waits == []


# For a run ----------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A user's module, which is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plugins, "SCORERS", {})
    (tmp_path / "mine_rounds.py").write_text(
        "def length(prompts, answers):\n    return [len(a) or None for a in answers]\n"
    )
    load_plugins(["mine_rounds"])
    yield tmp_path / "mine_rounds.py"
    sys.modules.pop("mine_rounds", None)


def test_prompts_get_the_marks_of_their_answers(tmp_path, plugin):
    settings = JudgeSettings("mine_rounds.length", ("mine_rounds",), None, 4, tmp_path / "cache")
    marker = make_marker(make_judge(settings, may_miss=True), settings, tmp_path, go_on="again")
    drawn = [
        marked_prompt("Say a.", ["aaa", "b", "aaa"], [None] * 3),
        marked_prompt([{"role": "user", "content": "Hi"}], ["Hello", "Yo"], [None] * 2),
    ]
    found, told = mark_prompts(marker, drawn, seed=0, round=1)
    assert [own.marks for own in found] == [(3.0, 1.0, 3.0), (5.0, 2.0)]
    assert told.made == 4
    assert (tmp_path / "rounds" / ".marks" / "1.jsonl").is_file()


def test_a_changed_function_is_another_judge(tmp_path, plugin):
    settings = JudgeSettings("mine_rounds.length", ("mine_rounds",), None, 4, tmp_path / "cache")
    before = judge_identity(settings)
    assert judge_identity(settings) == before
    plugin.write_text(plugin.read_text() + "# Changed.\n")
    assert judge_identity(settings) != before
    assert judge_identity(JudgeSettings("org/model", (), None, 4, tmp_path)) == {
        "model": "org/model",
        "files": [],
    }


def test_a_changed_reward_model_is_another_judge(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    settings = JudgeSettings(str(tmp_path), (), None, 4, tmp_path / "cache")
    before = judge_identity(settings)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert judge_identity(settings) != before


def test_a_judge_that_compares_is_asked_for_the_pairs(tmp_path):
    """The longer answer of each pair gets a mark of 1, and the groups are those pairs."""
    drawn = [marked_prompt(f"Say {i}.", ["a", "bb", "ccc", "dddd"], [None] * 4) for i in range(3)]
    with judge_server(prefers_longer) as server:
        settings = endpoint(server, tmp_path, form="pairs")
        marker = endpoint_marker(settings, tmp_path, Waits())
        found, _ = mark_prompts(marker, drawn, seed=3, round=2)
        assert len(server.seen) == 2 * 2 * 3  # two pairs of each prompt, in both orders
    pairs = pair_numbers(drawn, seed=3, round=2)
    for own, two in zip(found, pairs, strict=True):
        for first, second in two:
            assert (own.marks[first], own.marks[second]) == (0.0, 1.0)
    groups, dropped = mark_groups(found, how="pairs", min_margin=0.0, noise="none", seed=3, round=2)
    assert dropped == {}
    assert [own.numbers for own in groups] == [(b, a) for two in pairs for a, b in two]
    assert all(len(g.group.responses[0]) > len(g.group.responses[1]) for g in groups)


def test_marks_of_the_embedded_task_are_its_true_rewards():
    from dpo_lightning.data.controlled import PROMPTS as TASK_PROMPTS
    from dpo_lightning.data.controlled import ControlledTask

    task = ControlledTask()
    answers = [np.array(outcome) for outcome in task.outcomes[::97]]
    for prompt, rewards in zip(TASK_PROMPTS, task.rewards[:, ::97].tolist(), strict=True):
        assert task.marks(prompt, answers) == pytest.approx(rewards, abs=1e-12)
    assert task.marks(TASK_PROMPTS[0], [np.array([0])]) == [0.0]


def test_the_log_names_no_secret(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    key = "sk-" + "a1B2c3D4" * 6

    def act(number, answers):
        raise ConnectionError(f"https://x/?key={key} refused api_key={key}")

    said = raised(lambda: marked(marker_of(Function(act), tmp_path)))
    assert key not in said + caplog.text
