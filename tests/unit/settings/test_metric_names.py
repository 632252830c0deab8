"""Directions of metrics: by hand for those that select, and one for each that the code writes."""

import ast
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.evaluation.judges import Judged
from dpo_lightning.evaluation.verdicts import judged_metrics
from dpo_lightning.settings.conduct import PRUNE_METRICS, RANKING_METRICS
from dpo_lightning.settings.metric_names import directed, direction, is_set_name, set_of
from tests.support.properties import examples
from tests.support.runs import ROOT


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        *(("eval/loss", -1), ("train/loss", -1), ("eval/rewards/accuracies", 1)),
        *(("eval/rewards/margins", 1), ("eval/logratios/margins", 1), ("eval/partition/log_z", 0)),
        # Both of them fall in a good training, as often as not.
        *(("eval/rewards/chosen", 0), ("eval/logps/rejected", 0), ("eval/partition/p_chosen", 1)),
        *(("eval/logratios/separation", 1), ("eval/label_gain", 1), ("train/kto/z0", 0)),
        *(("train/rewards/desirable", 0), ("eval/b/bco/delta", 0)),
        *(("eval/hard-1/loss", -1), ("eval/b/rewards/accuracies", 1), ("eval/b/logps/chosen", 0)),
        *(("controlled/expected_reward", 1), ("controlled/gain_ratio", 1)),
        *(("controlled/kl_optimum_policy", -1), ("controlled/kl_policy_reference", 0)),
        *(("samples/judge", 1), ("samples/win_rate", 1), ("samples/cut_off", -1)),
        *(("samples/kl", 0), ("samples/judge_stderr", 0), ("train/grad_norm", 0)),
        *(("eval/lost", None), ("loss", None), ("eval/grad_norm", None), ("eval/b/c/loss", None)),
        *(("train/b/loss", None), ("samples/nothing_stderr", None), ("", None), ("eval/", None)),
    ],
)
def test_the_direction_of_a_metric(metric: str, expected: int | None) -> None:
    assert direction(metric) == expected


def test_what_ranks_and_prunes_trials_has_the_same_direction():
    assert [direction(name) for name in RANKING_METRICS] == [1] * len(RANKING_METRICS)
    of_losses = {name: direction(name) for name in PRUNE_METRICS if name.endswith("loss")}
    assert of_losses == {"eval/fitted_log_loss": -1}
    assert [direction(name) for name in PRUNE_METRICS if name not in of_losses] == [1] * 4


@settings(max_examples=examples(50))
@given(st.text("ab_/9", max_size=3) | st.sampled_from(["rewards", "loss", "path", "partition"]))
def test_a_set_has_the_directions_of_all_held_out_rows(name: str) -> None:
    """And no name of a set makes another metric's name."""
    if not is_set_name(name):
        assert set_of(f"eval/{name}/loss") != name
        return
    for metric in directed():
        own = metric.replace("eval/", f"eval/{name}/")
        assert direction(own) == direction(metric)
        assert set_of(own) == name
        assert set_of(metric) is None


def written_in(file: str, function: str) -> set[str]:
    """Texts that are keys of dicts in a function, or of assignments to them."""
    tree = ast.parse((ROOT / "dpo_lightning" / file).read_text())
    [found] = [n for n in ast.walk(tree) if getattr(n, "name", "") == function]
    keys = [key for n in ast.walk(found) if isinstance(n, ast.Dict) for key in n.keys]
    subscripts = [n for n in ast.walk(found) if isinstance(n, ast.Subscript)]
    keys += [n.slice for n in subscripts if isinstance(n.ctx, ast.Store)]
    return {str(key.value) for key in keys if isinstance(key, ast.Constant)}


def test_each_metric_in_the_code_has_a_direction():
    """A metric that is written anew is red here until the table says which way it goes."""
    responses = written_in("objectives/comparison.py", "metrics_from_sums")
    assert {"loss", "rewards/margins", "partition/p_chosen"} <= responses
    names = {f"{prefix}/{name}" for prefix in ("train", "eval", "eval/b") for name in responses}
    names |= {f"train/{name}" for name in written_in("training/module.py", "_log_step")}
    names |= {f"controlled/{name}" for name in written_in("data/controlled.py", "report")}
    assert len(names) > 50
    assert {name for name in names if direction(name) is None} == set()


METRIC = re.compile(r'"((?:train|eval|samples|partition|controlled)(?:/[a-z_]+){1,2})"')


def test_each_metric_that_the_code_names_has_a_direction():
    """Whole names, wherever they stand, but for the old ones that are read."""
    files = [own for own in (ROOT / "dpo_lightning").rglob("*.py") if own.name != "renamed.py"]
    names = {name for path in files for name in METRIC.findall(path.read_text())}
    # These are of responses, under train/ and eval/.
    names -= written_in("objectives/comparison.py", "metrics_from_sums")
    assert {"samples/cut_off", "samples/judge_missing", "partition/self_check_tokens"} <= names
    assert "samples/win_rate_low" in names
    assert {name for name in names if direction(name) is None} == set()


def test_each_metric_of_a_judge_has_a_direction():
    """Means of marks and of wins, and their errors, are named by parts."""
    judged = Judged([1.0, 0.0], [3.0, 1.0], [2.0, 1.0], facts={"questions": 4})
    names = {*judged_metrics(judged, ["a", "b"])}
    means = {f"samples/{name}" for name in ("judge", "reference_judge", "win_rate")}
    assert means | {f"{name}_stderr" for name in means} <= names
    assert {name for name in names if direction(name) is None} == set()
