"""Steps, prompts and groups of rounds, and the data module that serves them."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.packing import epoch_order
from dpo_lightning.data.rounds import RoundGroups, RoundPlan, RoundsDataModule
from dpo_lightning.data.tokens import TokenGroup
from tests.support.groups import ids
from tests.support.properties import examples

PLAN = RoundPlan(
    count=3,
    steps=4,
    prompts=None,
    groups_per_prompt=2,
    batch_size=6,
    offline_fraction=0.25,
    seed=5,
)


def test_steps_are_of_rounds_from_one():
    """Three rounds of four steps: steps 0-3, 4-7 and 8-11."""
    assert PLAN.total_steps == 12
    assert [PLAN.round_at(step) for step in (0, 3, 4, 11)] == [1, 1, 2, 3]
    assert [PLAN.first_step(round) for round in (1, 2, 3)] == [0, 4, 8]


def test_the_share_of_given_rows_holds_over_the_steps():
    """A quarter of six is one and a half: steps have one and two in turn, and six of four steps."""
    counts = [PLAN.given_before(step + 1) - PLAN.given_before(step) for step in range(8)]
    assert counts == [1, 2, 1, 2, 1, 2, 1, 2]
    assert all(
        len(PLAN.given_rows(step, 50)) + len(PLAN.drawn_groups(step, 50, 25)) == 6
        for step in range(12)
    )


def test_a_share_that_floats_cannot_have_is_not_one_row_short():
    """0.29 of 100 is 29, and 28.999999999999996 in floats."""
    plan = replace(PLAN, batch_size=100, offline_fraction=0.29)
    assert 0.29 * 100 < 29
    assert plan.given_before(1) == 29


def test_given_rows_come_in_the_order_of_a_run_without_rounds():
    """Of ten rows the first pass is that of seed 5; then a second pass begins."""
    rows = [row for step in range(12) for row in PLAN.given_rows(step, 10)]
    orders = epoch_order(10, seed=5, epoch=0) + epoch_order(10, seed=5, epoch=1)
    assert rows == orders[:18]
    assert PLAN.given_rows_of(2, 10) == sorted({*orders[6:12]})


def test_a_round_asks_as_many_prompts_as_its_steps_have_groups_for():
    """Four steps of six groups, six of them given: 18 drawn, of 2 a prompt, are 9 prompts."""
    assert len(PLAN.choose_prompts(1, 100)) == 9
    assert len(PLAN.choose_prompts(1, 5)) == 5
    assert len(replace(PLAN, prompts=7).choose_prompts(1, 100)) == 7
    # An odd number is rounded up.
    assert len(replace(PLAN, offline_fraction=0.3, steps=1).choose_prompts(1, 100)) == 3


def test_rounds_walk_over_all_prompts_before_one_comes_again():
    """Nine prompts a round of 27: all of them in three rounds, each once, in the seed's order."""
    rounds = [PLAN.choose_prompts(round, 27) for round in (1, 2, 3, 4)]
    assert rounds[0] + rounds[1] + rounds[2] == epoch_order(27, seed=5, epoch=0)
    assert rounds[3] == epoch_order(27, seed=5, epoch=1)[:9]
    assert replace(PLAN, seed=6).choose_prompts(1, 27) != rounds[0]


def test_no_prompt_is_twice_in_a_round_that_meets_the_end_of_a_pass():
    """Nine of ten: the second round has the last one of the first pass, and eight others."""
    for round in range(1, 30):
        chosen = PLAN.choose_prompts(round, 10)
        assert len({*chosen}) == len(chosen) == 9
    assert PLAN.choose_prompts(2, 10)[0] == epoch_order(10, seed=5, epoch=0)[9]


def numbers(plan: RoundPlan, drawn: int, prompts: int, *, round: int = 1) -> list[list[int]]:
    """Drawn groups of each step of a round."""
    first = plan.first_step(round)
    return [plan.drawn_groups(first + n, drawn, prompts) for n in range(plan.steps)]


def test_the_groups_of_a_round_are_all_seen_before_one_is_seen_again():
    """Nine prompts make 18, once each; five prompts make 10 for 18 places: eight come twice.

    Rounds have orders of their own.
    """
    for drawn, prompts, times in ((18, 9, [1] * 18), (10, 5, [1, 1, *[2] * 8])):
        seen = Counter(n for step in numbers(PLAN, drawn, prompts) for n in step)
        assert sorted(seen.values()) == times
    assert numbers(PLAN, 18, 9) != numbers(PLAN, 18, 9, round=2)


def test_a_dropped_group_leaves_its_place_empty():
    """Four steps of six, 12 prompts of two groups each; of 24 groups 15, 9, 3 and none are left.

    15 over four steps: after each of them 4, 8, 12 and 15 are done. None comes twice.
    """
    plan = replace(PLAN, offline_fraction=0.0)
    for drawn, sizes in (
        *((15, [4, 4, 4, 3]), (9, [3, 2, 2, 2])),
        *((3, [1, 1, 1, 0]), (0, [0] * 4)),
    ):
        found = numbers(plan, drawn, 12)
        assert [len(step) for step in found] == sizes
        assert sorted(n for step in found for n in step) == list(range(drawn))


def test_groups_come_as_often_as_their_prompts_have_to():
    """Six places for each of two prompts' two groups: four are seen six times, and so are three."""
    plan = replace(PLAN, offline_fraction=0.0)
    assert Counter(n for step in numbers(plan, 4, 2) for n in step) == dict.fromkeys(range(4), 6)
    assert plan.used(1, drawn=3, prompts=2) == 18
    assert Counter(n for step in numbers(plan, 3, 2) for n in step) == dict.fromkeys(range(3), 6)


def test_more_prompts_than_the_steps_have_room_for_fill_up_what_is_dropped():
    """Twenty prompts make 40 for 24 places: 30 that are left fill every step, 20 do not."""
    plan = replace(PLAN, offline_fraction=0.0, prompts=20)
    assert [len(step) for step in numbers(plan, 30, 20)] == [6] * 4
    assert [len(step) for step in numbers(plan, 20, 20)] == [5] * 4


def test_a_round_may_have_no_room_for_what_it_draws():
    """Half of one group a step, and one step a round: every other round has the given row alone."""
    plan = replace(PLAN, batch_size=1, steps=1, offline_fraction=0.5)
    for drawn in (0, 2):
        steps = [plan.drawn_groups(step, drawn, 1) for step in range(3)]
        assert [len(step) for step in steps] == [min(drawn, 1), 0, min(drawn, 1)]
    assert [plan.used(round, drawn=2, prompts=1) for round in (1, 2, 3)] == [1, 0, 1]


@settings(max_examples=examples(100))
@given(st.data())
def test_no_step_has_more_groups_than_room_and_all_that_are_used_come(data):
    plan = RoundPlan(
        count=3,
        steps=data.draw(st.integers(1, 9)),
        prompts=None,
        groups_per_prompt=data.draw(st.integers(1, 4)),
        batch_size=data.draw(st.integers(1, 9)),
        offline_fraction=data.draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9])),
        seed=1,
    )
    round, prompts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    drawn = data.draw(st.integers(0, prompts * plan.groups_per_prompt))
    steps = numbers(plan, drawn, prompts, round=round)
    assert sum(len(step) for step in steps) == plan.used(round, drawn=drawn, prompts=prompts)
    first = plan.first_step(round)
    for number, step in enumerate(steps, start=first):
        assert len(step) <= plan.drawn_before(number + 1) - plan.drawn_before(number)


def test_without_given_rows_a_step_is_drawn_whole():
    plan = replace(PLAN, offline_fraction=0.0)
    assert plan.given_rows_of(1, 10) == []
    assert len(plan.drawn_groups(0, 30, 15)) == 6


# The data module -------------------------------------------------------------------------------


def made(prompt: int, chosen: int, source: str) -> TokenGroup:
    return TokenGroup(ids(prompt), (ids(chosen), ids(2)), (1, 2), 1.0, source, "q")


class Feed:
    """Rounds whose groups say which round drew them; notes when each is asked for."""

    def __init__(self, plan: RoundPlan, prompts: int = 5) -> None:
        self.plan, self.prompts = plan, prompts
        self.begun: list[int] = []

    def begin(self, round: int) -> RoundGroups:
        self.begun.append(round)
        drawn = [made(3, 10 * round + n, f"r{round}") for n in range(10)]
        given = [made(4, 5, "given") for _ in range(10)]
        return RoundGroups(drawn, given, self.prompts)


def module_of(feed: Feed, *, start: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0):
    module = RoundsDataModule(
        feed,
        train_groups=[],
        eval_groups=[],
        batch_size=6,
        micro_batch_tokens=64,
        total_steps=feed.plan.total_steps,
        seed=5,
        shared=True,
        num_workers=workers,
    )
    module.trainer = SimpleNamespace(global_step=start, global_rank=rank, world_size=world_size)
    return module


def sources(module, batch) -> list[str]:
    rows = [row for micro in batch.counted for row in micro.rows]
    return sorted(module.train_groups[row].source for row in rows)


def test_a_round_begins_when_its_first_step_is_asked_for_and_not_before():
    feed = Feed(PLAN)
    module = module_of(feed)
    loader = module.train_dataloader()
    assert len(loader) == 12
    steps = iter(loader)
    assert feed.begun == []
    for step in range(12):
        batch = next(steps)
        assert feed.begun == list(range(1, PLAN.round_at(step) + 1))
        round = f"r{PLAN.round_at(step)}"
        given = len(PLAN.given_rows(step, 10))
        assert sources(module, batch) == ["given"] * given + [round] * (6 - given)
    assert list(steps) == []


def test_a_resumed_run_begins_inside_a_round():
    feed = Feed(PLAN)
    batches = list(module_of(feed, start=6).train_dataloader())
    assert feed.begun == [2, 3]
    assert len(batches) == 6
    whole = list(module_of(Feed(PLAN)).train_dataloader())[6:]
    assert [[m.rows for m in b.counted] for b in batches] == [
        [m.rows for m in b.counted] for b in whole
    ]


def test_a_place_that_is_empty_counts_in_the_mean_of_its_step():
    """Nine prompts made ten groups, for 18 places: a step has four of six, and counts as six.

    Where five prompts made the ten, they come again and no place is empty.
    """
    for prompts, left in ((9, 4), (5, 6)):
        batches = list(module_of(Feed(PLAN, prompts)).train_dataloader())
        assert {sum(len(micro.rows) for micro in batch.counted) for batch in batches} == {left}
        assert {batch.total_weight for batch in batches} == {6.0}


def test_ranks_share_a_step_out():
    """Two ranks have the six groups of each step between them, none twice."""
    parts = [list(module_of(Feed(PLAN), rank=r, world_size=2).train_dataloader()) for r in (0, 1)]
    for step, both in enumerate(zip(*parts, strict=True)):
        rows = [row for batch in both for micro in batch.counted for row in micro.rows]
        given = PLAN.given_rows(step, 10)
        assert sorted(rows) == sorted(
            [*PLAN.drawn_groups(step, 10, 5), *(10 + row for row in given)]
        )


@pytest.mark.slow
def test_workers_have_the_groups_of_the_round():
    feed = Feed(PLAN)
    module = module_of(feed, workers=2)
    for step, batch in enumerate(module.train_dataloader()):
        assert feed.begun[-1] == PLAN.round_at(step), "a worker ran ahead of the round"
        round = PLAN.round_at(step)
        tokens = {int(t) for micro in batch.counted for t in micro.targets if t >= 10}
        assert tokens <= {10 * round + n for n in range(10)}


def test_an_epoch_is_a_round():
    assert module_of(Feed(PLAN)).steps_per_epoch == 4
