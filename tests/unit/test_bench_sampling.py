"""The benchmark of sampling: what it refuses to time, its arithmetic, the table that is kept."""

import json
import math

import pytest
import torch

from tests.support.benches import RESULTS, load
from tests.support.runs import ROOT


@pytest.fixture(scope="module")
def bench(monkeypatch_module):
    monkeypatch_module.syspath_prepend(str(ROOT / "benchmarks"))
    return load("sampling")


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_log_p_of_drawn_tokens_in_standard_errors(bench):
    """p = .8 .2: log p = -.2231 -1.6094, mean -.5004, variance .0398 + .5181 - .2504 = .3075.

    Of the tokens 0, 0, 1 the sum is 2 * .2773 - 1.1090 = -.5545, over sqrt(3 * .3075) = .9604.
    """
    logps = torch.tensor([0.8, 0.2]).log().expand(3, 2)
    assert bench.z_score(logps, torch.tensor([0, 0, 1])) == pytest.approx(-0.5774, abs=2e-4)


def test_nothing_is_timed_that_draws_otherwise(bench, tmp_path, monkeypatch):
    """A toy: all three ways pass; the likeliest tokens alone, or those of other noise, do not."""
    arms = bench.Arms(
        tmp_path, bench.Load("toy", prompts=2, prompt_tokens=9, answers=3, answer_tokens=6)
    )
    found = arms.check()
    assert found["same_tokens"] == 1
    assert max(abs(found[name]) for name in ("ours", "copied", "transformers")) <= 4
    ids = torch.tensor([prompt.tolist() for prompt in arms.prompts])
    rows = ids.repeat_interleave(3, 0)
    with arms._flat.plain(arms._model) as model:
        for _ in range(6):
            best = model(input_ids=rows).logits[:, -1].argmax(-1)
            rows = torch.cat([rows, best[:, None]], dim=1)
    greedy = rows[:, 9:]
    with monkeypatch.context() as patch:
        patch.setattr(arms, "transformers", lambda: greedy)
        with pytest.raises(SystemExit, match=r"transformers: log p of what it draws is .* away"):
            arms.check()
    monkeypatch.setattr(arms, "ours", arms.transformers)
    with pytest.raises(SystemExit, match="of the tokens are those expected"):
        arms.check()


def test_arms_take_turns_and_the_first_round_is_not_kept(bench):
    order = []
    arms = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    rates = bench.measure(arms, rounds=2, tokens=10)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {clock: [*map(len, own.values())] for clock, own in rates.items()} == {
        "wall": [2, 2],
        "cpu": [2, 2],
    }


def test_ratios_are_of_rounds(bench):
    """3 and 3.3 over 1 and 1.1 are 3 in both; 2 and 4 over the same are 2 and 3.64."""
    rates = {"ours": [3.0, 3.3], "copied": [2.0, 4.0], "transformers": [1.0, 1.1]}
    found = bench.ratios(rates)
    assert found["ours"] == pytest.approx([3.0, 3.0, 3.0])
    assert found["copied"][0] == pytest.approx(math.sqrt(2 * 4 / 1.1))


def test_the_page_has_the_table_of_what_is_kept(bench):
    kept = json.loads((RESULTS / "sampling.json").read_text())
    for clock, rates in kept["tokens_per_second"].items():
        assert bench.ratios(rates) == kept["ratios"][clock]
        assert all(len(own) == kept["rounds"] >= 5 for own in rates.values())
    page = (ROOT / "benchmarks" / "README.md").read_text()
    begin, end = (page.index(mark) for mark in bench.MARKS)
    assert page[begin + len(bench.MARKS[0]) : end].strip() == bench.table(kept).strip()
    # Half as fast again at least, with the whole interval.
    assert min(kept["ratios"][clock]["ours"][1] for clock in ("wall", "cpu")) >= 1.5


def test_a_toy_does_not_overwrite_what_was_measured(bench, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sampling.py", "--size", "toy"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--size toy: name another file" in capsys.readouterr().err
