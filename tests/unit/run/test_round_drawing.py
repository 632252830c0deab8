"""Answers of a round: shared out among ranks, kept batch by batch, and read by who goes on."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from dpo_lightning.evaluation.many_answers import RoundDraws
from dpo_lightning.run.rounds import drawing
from dpo_lightning.run.rounds.conduct import Paused, _stop_if_any
from dpo_lightning.run.rounds.drawing import Drawing, DrawnParts, draw_round, drop_parts
from tests.support.groups import ids

PROMPTS = [ids(n) for n in range(10, 15)]
DRAWS = RoundDraws(num_generations=2, temperature=1.0, max_new_tokens=4, seed=1, round=1)
BATCHES = [[4, 0], [1], [3, 2]]


class Team:
    """Ranks in threads, which meet at a barrier."""

    def __init__(self, rank: int, size: int, board: list, barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier

    def from_first(self, function):
        if self.rank == 0:
            self._board[:] = [function()]
        self._barrier.wait()
        value = self._board[0]
        self._barrier.wait()
        return value

    def gather(self, value):
        if self.rank == 0:
            self._board[:] = [None] * self.size
        self._barrier.wait()
        self._board[self.rank] = value
        self._barrier.wait()
        found = list(self._board)
        self._barrier.wait()
        return found


@pytest.fixture(autouse=True)
def drawn(monkeypatch) -> list[list[int]]:
    """Batches that were drawn: answers say which prompt they are to, and as which of its two."""
    asked: list[list[int]] = []

    def draw_answers(model, scorer, tokenizer, prompts, draws, *, batches, check, **_):
        for batch in batches:
            check()
            asked.append([*batch])
            yield [*batch], [[ids(prompts[n][0], k) for k in (0, 1)] for n in batch]

    monkeypatch.setattr(drawing, "plan_batches", lambda *_, **__: [[*b] for b in BATCHES])
    monkeypatch.setattr(drawing, "draw_answers", draw_answers)
    return asked


def parts_in(folder, *, policy: str = "p", draws: RoundDraws = DRAWS, writes: bool = True):
    return DrawnParts(folder, draws, policy=policy, prompts=PROMPTS, writes=writes)


def draw(folder, *, ranks: int = 1, pending=lambda: 0, **words):
    """The answers that each rank has."""
    board, barrier = [], threading.Barrier(ranks)
    found: dict[int, object] = {}
    settings = Drawing(None, None, None, 64, None, None, None)

    def run(rank: int) -> None:
        try:
            found[rank] = draw_round(
                settings,
                PROMPTS,
                DRAWS,
                parts=parts_in(folder, **words),
                ranks=Team(rank, ranks, board, barrier),
                check=lambda: None,
                agreed=_stop_if_any,
                pending=pending,
            )
        except Paused as pause:
            found[rank] = pause.signum

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(ranks)]


def as_lists(answers) -> list:
    return [[own.tolist() for own in to_prompt] for to_prompt in answers]


EXPECTED = [[[n, 0], [n, 1]] for n in range(10, 15)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_rank_has_all_answers_in_the_order_of_the_prompts(tmp_path, drawn, ranks):
    """Two tokens of each of ten answers, whoever drew them; each batch is drawn once."""
    for answers, tokens in draw(tmp_path, ranks=ranks):
        assert as_lists(answers) == EXPECTED
        assert tokens == 20
    assert sorted(drawn) == sorted(BATCHES)


def test_what_was_drawn_is_not_drawn_again(tmp_path, drawn):
    [(first, _)] = draw(tmp_path)
    (tmp_path / "rounds" / ".1" / "1.json").unlink()
    drawn.clear()
    [(again, tokens)] = draw(tmp_path)
    assert drawn == [[1]]
    assert tokens == 4
    assert as_lists(again) == as_lists(first)
    assert again[0][0].dtype == np.int32


@pytest.mark.parametrize(
    "words",
    [
        {"policy": "another"},
        {"draws": RoundDraws(2, 0.7, 4, 1, 1)},
        {"draws": RoundDraws(2, 1.0, 4, 2, 1)},
    ],
    ids=["policy", "temperature", "seed"],
)
def test_answers_of_other_draws_are_none(tmp_path, words):
    draw(tmp_path)
    assert len(parts_in(tmp_path).read(BATCHES)) == 3
    assert parts_in(tmp_path, **words).read(BATCHES) == {}


def test_a_torn_part_is_drawn_again(tmp_path, drawn):
    draw(tmp_path)
    path = tmp_path / "rounds" / ".1" / "0.json"
    path.write_bytes(path.read_bytes()[:-9])
    drawn.clear()
    [(answers, _)] = draw(tmp_path)
    assert drawn == [[4, 0]]
    assert as_lists(answers) == EXPECTED


def test_where_nothing_may_be_written_nothing_is(tmp_path):
    [(answers, _)] = draw(tmp_path, writes=False)
    assert as_lists(answers) == EXPECTED
    assert list(tmp_path.iterdir()) == []


def test_a_signal_stops_all_ranks_behind_the_same_batches(tmp_path, drawn):
    """It comes while the first batches are drawn: those are kept, and no other is begun."""
    assert draw(tmp_path, ranks=2, pending=lambda: 15) == [15, 15]
    assert sorted(drawn) == sorted(BATCHES[:2])
    assert sorted(parts_in(tmp_path).read(BATCHES)) == [0, 1]


def test_parts_of_other_rounds_are_dropped(tmp_path):
    draw(tmp_path)
    for name in (".2", ".10", ".reference"):
        (tmp_path / "rounds" / name).mkdir()
    drop_parts(tmp_path, but=2)
    assert {path.name for path in (tmp_path / "rounds").iterdir()} == {".2", ".reference"}
    drop_parts(tmp_path)
    assert {path.name for path in (tmp_path / "rounds").iterdir()} == {".reference"}


def test_the_hash_of_a_policy_is_of_what_it_trains():
    """A frozen weight may change without a change of the hash; a trained one may not by a bit."""
    import torch

    from dpo_lightning.run.rounds.outcome import trained_hash

    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    first = trained_hash(model)
    with torch.no_grad():
        model.bias += 1
    assert trained_hash(model) == first
    with torch.no_grad():
        model.weight[0, 0] = torch.nextafter(model.weight[0, 0], torch.tensor(9.0))
    assert trained_hash(model) != first


def test_the_largest_signal_counts():
    _stop_if_any([0, 0])
    with pytest.raises(Paused) as stopped:
        _stop_if_any([0, 10, 2])
    assert SimpleNamespace(signum=10).signum == stopped.value.signum
