"""Decisions of a pruned sweep: who stays, who goes, and what no order of reports can change."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.sweeps.halving import Cell, Terms, decide, spent_until, surely_kept
from tests.support.properties import examples

DEFAULT = Terms((0.125, 0.25, 0.5), keep=0.5, budget=0.36)


def cell(beta: float, *values: float, rate: str = "1e-3", pool: tuple[str, ...] = ()) -> Cell:
    return Cell(f"{beta:g} {rate}", pool, (rate,), beta, 1, {1: values} if values else {})


def ask(cells, terms=DEFAULT, *, rung=0, alone=(), trials=None, spent=None):
    count = len(cells) + len(alone)
    return decide(
        cells, alone, terms, rung=rung, trials=trials or count,
        spent=count * terms.fractions[0] if spent is None else spent,
    )  # fmt: skip


# By hand ------------------------------------------------------------------------------------------


def test_eight_betas_by_hand():
    """Scores with their best at β 0.4, told apart by far; nobody else is within an error of it.

    Rung 1 keeps 4 of 8: the best, its neighbours 0.2 and 0.8, and the next by rank, which is 1.6.
    Rung 2 would keep 2, and the neighbours make it 3: 0.2, 0.4, 0.8. The last keeps 1.
    Steps: 8/8 up to the first rung, then 4·1/8 + 3·1/4 + 1·1/2: 2.75 of 8, 0.34375.
    """
    score = {0.05: 1, 0.1: 2, 0.2: 5, 0.4: 9, 0.8: 4, 1.6: 6, 3.2: 3, 6.4: 0}
    alive, spent, stages = sorted(score), 0.0, []
    for rung, end in enumerate(DEFAULT.fractions):
        begin = (0.0, *DEFAULT.fractions)[rung]
        spent += len(alive) * (end - begin)
        cells = [cell(beta, score[beta], score[beta] + beta / 100) for beta in alive]
        found = ask(cells, rung=rung, trials=8, spent=spent)
        alive = [beta for beta in alive if f"{beta:g} 1e-3" in found.kept]
        stages.append(alive)
    assert stages == [[0.2, 0.4, 0.8, 1.6], [0.2, 0.4, 0.8], [0.4]]
    assert found.spent == pytest.approx(0.34375)
    assert found.why["0.4 1e-3"] == "rank 1 of 3"


def test_the_neighbours_of_the_best_are_on_its_own_line():
    """β 1 at the large rate is best; its neighbours have that rate too, however bad they are.

    Of six cells three stay. The small rate's β 1 has the second score and no place left.
    """
    cells = [
        cell(0.5, 1, 1.1, rate="big"), cell(1, 9, 9.1, rate="big"), cell(2, 0, 0.2, rate="big"),
        cell(0.5, 2, 2.1, rate="small"), cell(1, 8, 8.2, rate="small"),
        cell(2, 3, 3.1, rate="small"),
    ]  # fmt: skip
    assert ask(cells).kept == ("0.5 big", "1 big", "2 big")
    assert ask(cells, rung=2, spent=3).kept == ("1 big", "1 small", "2 small")


def test_what_is_not_significantly_worse_stays_within_the_budget():
    """Two of four stay by rank; the third is below the best by 0.1 on average.

    Its differences are 1.1, -0.9, 1.1, -0.9: mean 0.1, error 0.577, 0.17 errors. The fourth is
    below by exactly 5 ± 0.01. With one rung at 1/2 four trials cost 2 up to it and two more 1:
    0.75 of the grid; a third makes 0.875.
    """
    best, second = cell(1, 5, 5, 5, 5, rate="a"), cell(1, 5, 4.9, 5, 4.9, rate="b")
    third, fourth = cell(1, 3.9, 5.9, 3.9, 5.9, rate="c"), cell(1, 0, 0.01, 0, 0.01, rate="d")
    cells = [best, second, third, fourth]
    for budget, kept in ((0.87, 2), (0.875, 3), (1.0, 3)):
        found = ask(cells, Terms((0.5,), 0.5, budget))
        assert len(found.kept) == kept
        assert found.spent == pytest.approx(0.75 if kept == 2 else 0.875)
    assert found.why["1 c"] == "rank 3 of 4, not significantly worse"
    assert found.pruned == ("1 d",)


def test_a_report_counts_as_the_steps_that_take_as_long():
    """The same four; a report takes a tenth of a trial: 4 (1/2 + 1/10) + 2 / 2 = 3.4, 0.85 of four.

    A third trial makes 0.975, as nothing is reported behind the last rung.
    """
    best, second = cell(1, 5, 5, 5, 5, rate="a"), cell(1, 5, 4.9, 5, 4.9, rate="b")
    third, fourth = cell(1, 3.9, 5.9, 3.9, 5.9, rate="c"), cell(1, 0, 0.01, 0, 0.01, rate="d")
    for budget, kept, spent in ((0.97, 2, 0.85), (0.98, 3, 0.975)):
        terms = Terms((0.5,), 0.5, budget, report=0.1)
        before = spent_until([4], terms.fractions, terms.report)
        found = ask([best, second, third, fourth], terms, spent=before)
        assert len(found.kept) == kept
        assert found.spent == pytest.approx(spent)


def test_reports_to_come_count_too():
    """Eight cells to 1/8 with reports of 1/16, then four, two and one, each best at the edge.

    8 (1/8 + 1/16) + 4 (1/8 + 1/16) + 3 (1/4 + 1/16) + 1/2 = 1.5 + 0.75 + 0.9375 + 0.5, where three
    may have to stay at the second rung: the best may have a neighbour on either side.
    """
    cells = [cell(beta, beta, beta + 0.001) for beta in (1, 2, 3, 4, 5, 6, 7, 8)]
    terms = Terms(DEFAULT.fractions, 0.5, 0.01, report=1 / 16)
    found = ask(cells, terms, spent=spent_until([8], terms.fractions, 1 / 16), trials=8)
    assert found.kept == ("5 1e-3", "6 1e-3", "7 1e-3", "8 1e-3")
    assert found.spent == pytest.approx(3.6875 / 8)


def test_every_loss_and_beta_keeps_its_best_rate():
    """Pools of loss and β, three rates in each: one of three stays, by its own pool's rank."""
    cells = [
        cell(beta, place + loss * 10 + beta, place + loss * 10 + beta + 0.1, rate=f"{loss}/{rate}",
             pool=(str(loss), str(beta)))
        for loss in (0, 1) for beta in (0.1, 1.0)
        for place, rate in enumerate(("small", "middle", "large"))
    ]  # fmt: skip
    found = ask(cells)
    assert found.kept == ("0.1 0/large", "0.1 1/large", "1 0/large", "1 1/large")


def test_seeds_of_a_cell_count_as_one():
    """Seed 2 alone would put b first; the mean over both seeds puts a first: 6 against 5."""
    a = Cell("a", (), (), 1.0, 2, {1: [9.0, 9.1], 2: [3.0, 3.1]})
    b = Cell("b", (), (), 1.0, 2, {1: [1.0, 1.2], 2: [9.0, 9.2]})
    found = ask([a, b], Terms((0.5,), 0.5, 0.1), trials=4)
    assert (found.kept, found.pruned) == (("a",), ("b",))


def test_a_cell_whose_trials_have_all_ended_is_neither_kept_nor_pruned():
    found = ask([cell(0.1, 1, 2), cell(1), cell(2, 0, 1.5)], Terms((0.5,), 0.5, 0.1))
    assert (found.kept, found.pruned) == (("0.1 1e-3",), ("2 1e-3",))


def test_steps_up_to_a_rung_by_hand():
    """Eight trials to 1/8, four from there to 1/4: 1 + 1/2."""
    assert spent_until([8, 4], (0.125, 0.25, 0.5)) == 1.5


# In general ---------------------------------------------------------------------------------------

BETAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
RATES = ("1e-4", "1e-3", "1e-2")


@st.composite
def grids(draw) -> list[Cell]:
    keys = draw(
        st.lists(
            st.tuples(st.sampled_from(("sigmoid", "simpo")), st.sampled_from(BETAS),
                      st.sampled_from(RATES)),
            min_size=1, max_size=12, unique=True,
        )
    )  # fmt: skip
    within = draw(st.sampled_from(("all", "loss", "loss and beta")))
    values = st.lists(st.integers(-3, 3).map(float), min_size=4, max_size=4)
    found = []
    for loss, beta, rate in keys:
        pool = {"all": (), "loss": (loss,), "loss and beta": (loss, str(beta))}[within]
        scores = draw(st.dictionaries(st.sampled_from((1, 2)), values, max_size=2))
        found.append(Cell(f"{loss} {beta} {rate}", pool, (loss, rate), beta, 2, scores))
    return found


TERMS = st.builds(
    Terms,
    st.sampled_from(((0.5,), (0.125, 0.25, 0.5), (0.3, 0.3, 0.5))),
    st.floats(0.1, 0.9),
    st.floats(0.05, 1.0),
)


def pools_of(cells) -> dict[tuple[str, ...], list[Cell]]:
    pools: dict[tuple[str, ...], list[Cell]] = {}
    for one in cells:
        if one.scores:
            pools.setdefault(one.pool, []).append(one)
    return pools


def mean(one: Cell) -> float:
    return sum(sum(v) / len(v) for v in one.scores.values()) / len(one.scores)


@given(grids(), TERMS, st.integers(0, 2), st.randoms())
@settings(max_examples=examples(40))
def test_the_order_of_reports_never_matters(cells, terms, rung, random):
    rung %= len(terms.fractions)
    mixed = [replace(one, scores=dict(reversed(one.scores.items()))) for one in cells]
    random.shuffle(mixed)
    assert ask(mixed, terms, rung=rung) == ask(cells, terms, rung=rung)


@given(grids(), TERMS, st.integers(0, 2))
@settings(max_examples=examples(40))
def test_each_pool_keeps_its_best_and_all_are_decided(cells, terms, rung):
    rung %= len(terms.fractions)
    found = ask(cells, terms, rung=rung)
    for pool in pools_of(cells).values():
        best = max(map(mean, pool))
        assert any(mean(one) == best for one in pool if one.name in found.kept)
    reported = sorted(one.name for one in cells if one.scores)
    assert sorted((*found.kept, *found.pruned)) == reported


@given(grids(), TERMS)
@settings(max_examples=examples(40))
def test_neighbours_of_the_best_stay_until_the_last_rung(cells, terms):
    """The definition, written out: of a line the next smaller and the next larger β."""
    found = ask(cells, terms, rung=0)
    if len(terms.fractions) == 1:
        return
    for pool in pools_of(cells).values():
        best = min(pool, key=lambda one: (-mean(one), one.name))
        line = sorted(one.beta for one in pool if one.line == best.line)
        place = line.index(best.beta)
        near = {*line[max(0, place - 1) : place + 2]}
        names = {one.name for one in pool if one.line == best.line and one.beta in near}
        assert names <= {*found.kept}


@given(grids(), TERMS, st.integers(0, 2))
@settings(max_examples=examples(40))
def test_who_stays_beyond_rank_and_neighbours_stays_within_the_budget(cells, terms, rung):
    rung %= len(terms.fractions)
    found = ask(cells, terms, rung=rung)
    least = ask(cells, replace(terms, budget=1e-9), rung=rung)
    assert {*least.kept} <= {*found.kept}
    if found.kept != least.kept:
        assert found.spent <= terms.budget + 1e-6
    extra = {*found.kept} - {*least.kept}
    assert all("not significantly worse" in found.why[name] for name in extra)


@given(grids(), TERMS, st.integers(0, 2), st.randoms())
@settings(max_examples=examples(60))
def test_who_runs_ahead_is_never_pruned(cells, terms, rung, random):
    """Whichever cells are still missing, and whether they report or fail."""
    rung %= len(terms.fractions)
    late = {one.name for one in cells if random.random() < 0.4}
    reported = [one for one in cells if one.name not in late]
    missing: dict[tuple[str, ...], int] = {}
    for one in cells:
        if one.name in late:
            missing[one.pool] = missing.get(one.pool, 0) + 1
    sure = surely_kept(reported, missing, terms, rung=rung)
    assert not sure & {*ask(cells, terms, rung=rung).pruned}
    if not missing:
        assert {one.name for one in reported if one.scores} >= sure


def test_a_cell_is_sure_of_its_place_by_hand():
    """Eight of a pool, six have reported, the last rung keeps four.

    Two that are missing may both come first: rank 2 is at worst 4 of 8, and if one of them fails
    3 of 7, of which three stay. Rank 3 would be 5 of 8. Before the last rung two neighbours may
    come in ahead, so that rank 2 is not sure; without anyone missing the best is.
    """
    six = [cell(beta, score, score + 0.5) for beta, score in
           zip((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), (9, 8, 7, 6, 5, 4), strict=True)]  # fmt: skip
    one = Terms((0.5,), 0.5, 0.36)
    assert surely_kept(six, {(): 2}, one, rung=0) == {"0.1 1e-3", "0.2 1e-3"}
    assert surely_kept(six, {(): 2}, DEFAULT, rung=0) == set()
    assert surely_kept(six, {}, DEFAULT, rung=0) == {"0.1 1e-3"}
