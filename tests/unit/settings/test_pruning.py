"""Settings of a pruned sweep: what an open one comes to, and what is refused before a trial."""

import copy

import pytest

from dpo_lightning import cli
from dpo_lightning.errors import UserError
from dpo_lightning.settings.pruning import PruneSettings, pool_of, prune_settings
from dpo_lightning.settings.schema import Config


def config(beta: float = 0.1, lr: float | None = None, **changes) -> Config:
    made = Config(beta=beta)
    made.sweep.prune = "halving"
    made.optimizer.lr = lr
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        setattr(getattr(made, section) if section else made, name, value)
    return made


RATES = [config(lr=rate) for rate in (1e-6, 1e-5)]


def test_without_a_judge_every_loss_and_beta_keeps_its_best_rate():
    assert prune_settings(RATES) == PruneSettings(
        at=(0.125, 0.25, 0.5),
        keep=0.5,
        within=("loss", "beta", "reference"),
        metric="eval/fitted_log_loss",
        budget=0.36,
    )


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({"evaluation__judge": "brevity"}, "samples/judge"),
        (
            {"evaluation__judge": "endpoint", "evaluation__judge_form": "marks"},
            "samples/judge",
        ),
        ({"sweep__prune_metric": "controlled/expected_reward"}, "controlled/expected_reward"),
    ],
)
def test_with_a_judge_all_are_compared(changes, metric):
    found = prune_settings([config(beta, **changes) for beta in (0.1, 1)])
    assert (found.metric, found.within) == (metric, ())


def test_an_endpoint_that_compares_pairs_gives_no_mark_to_prune_by():
    found = prune_settings([replace_judge(one, "endpoint") for one in RATES])
    assert found.metric == "eval/fitted_log_loss"


def replace_judge(one: Config, judge: str) -> Config:
    changed = copy.deepcopy(one)
    changed.evaluation.judge = judge
    return changed


def test_what_is_set_wins():
    changes = {"sweep__prune_within": [], "sweep__prune_metric": "eval/rewards/accuracies"}
    found = prune_settings([config(beta, **changes) for beta in (0.1, 1)])
    assert (found.metric, found.within) == ("eval/rewards/accuracies", ())


def test_pools_are_of_whole_sections_and_of_single_settings():
    one, other = config(0.1), config(0.1)
    other.loss.label_smoothing = 0.1
    assert pool_of(one, ["beta", "optimizer.lr"]) == pool_of(other, ["beta", "optimizer.lr"])
    assert pool_of(one, ["loss"]) != pool_of(other, ["loss"])
    assert pool_of(one, []) == ()


def test_a_sweep_that_is_not_pruned_has_no_settings():
    assert prune_settings([Config(), Config(beta=1)]) is None


@pytest.mark.parametrize(
    ("configs", "said"),
    [
        ([config(0.1), config(1)], "no two trials are equal in loss,beta,reference"),
        ([config(seed=1), config(seed=2)], "no two trials are equal in"),
        (
            [config(seed=s, sweep__prune_within=[]) for s in (1, 2)],
            "there is one trial but for its seeds",
        ),
        ([*RATES, config(evaluation__judge="x")], "all trials of a sweep are pruned alike"),
        ([*RATES, config(sweep__prune="none")], "all trials of a sweep are pruned alike"),
    ],
)
def test_what_cannot_be_pruned_is_refused(configs, said):
    with pytest.raises(UserError, match=said):
        prune_settings(configs)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sweep.prune=halving", "sweep.prune=halving is for a sweep: add -m"),
        ("-m beta=1,2 sweep.prune=halving", "sweep.prune_within=[] compares all of them"),
        (
            "-m optimizer.lr=1,2 sweep.prune=halving hydra/launcher=basic",
            "this launcher runs each trial to its end; use hydra/launcher=devices",
        ),
        (
            "-m optimizer.lr=1,2 sweep.prune=halving hydra.sweeper.max_batch_size=1",
            "all trials have to be known when the sweep begins",
        ),
        ("-m beta=1,2 sweep.prune=half", "sweep.prune=half: must be one of none, halving"),
        ("-m beta=1,2 sweep.prune=halving sweep.prune_at=[0.5,0.2]", "in rising order"),
        ("-m beta=1,2 sweep.prune=halving sweep.prune_within=[betta]", "a list of settings"),
        ("-m beta=1,2 sweep.prune=halving sweep.prune_metric=x", "one of controlled/expected"),
    ],
)
def test_a_wrong_line_is_answered_in_one_before_anything_is_made(
    line, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*line.split(), "logger=none"]) == 2
    [answer] = capsys.readouterr().err.splitlines()
    assert said in answer
    assert list(tmp_path.iterdir()) == []
