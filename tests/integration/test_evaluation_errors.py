"""Standard errors of a run's evaluation, from its files to the report that reads them."""

import json
import math
import sys

import pytest

from dpo_lightning.sweeps.report.write import write_report
from tests.support.runs import TINY, Run, run_train

SAMPLES = 10

# Called for the policy's answers first, and then for the reference's.
JUDGE = """
def marks(prompts, answers):
    calls.append(len(answers))
    return [1.0] * len(answers) if len(calls) == 2 else [1.0 + i % 2 for i in range(len(answers))]

calls = []
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run of two steps whose answers have the marks 1, 2, 1, 2, ..., and the reference's 1."""
    place = tmp_path_factory.mktemp("judged")
    (place / "judge_of_errors.py").write_text(JUDGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))
        run = run_train(
            place / "sweep" / "only", *TINY, "trainer.max_steps=2", f"evaluation.samples={SAMPLES}",
            "evaluation.partition_samples=0", "plugins=[judge_of_errors]",
            "evaluation.judge=judge_of_errors.marks",
        )  # fmt: skip
    del sys.modules["judge_of_errors"]
    assert run.code == 0
    return run


def evaluation(run: Run) -> dict:
    return json.loads((run.folder / "evaluation.json").read_text())


@pytest.mark.slow
def test_a_mean_of_samples_has_the_error_of_a_sample(run):
    """The errors of 10 answers, by hand.

    Marks are 0.5 off their mean 1.5: deviation 0.5 * sqrt(10 / 9), error that / sqrt(10) = 1/6. A
    mark of 1 ties with the reference and counts half, 2 wins: mean 0.75 and half of that error. The
    reference's marks do not differ. The KL is that of the rows.
    """
    metrics, rows = run.result["metrics"], evaluation(run)["samples"]
    assert [row["judge"] for row in rows] == [1.0, 2.0] * 5
    assert [row["reference_judge"] for row in rows] == [1.0] * 10
    for name, mean, error in (
        ("judge", 1.5, 1 / 6), ("win_rate", 0.75, 1 / 12), ("reference_judge", 1.0, 0.0)
    ):  # fmt: skip
        assert metrics[f"samples/{name}"] == pytest.approx(mean)
        assert metrics[f"samples/{name}_stderr"] == pytest.approx(error)
    kls = [row["kl"] for row in rows]
    mean = sum(kls) / 10
    error = math.sqrt(sum((kl - mean) ** 2 for kl in kls) / 9 / 10)
    assert metrics["samples/kl"] == pytest.approx(mean)
    assert metrics["samples/kl_stderr"] == pytest.approx(error)
    assert error > 0


def test_the_accuracy_is_the_mean_of_its_groups(run):
    """Each of the 40 evaluation groups is one pair: right, wrong, or a tie that counts half."""
    accuracies = evaluation(run)["accuracies"]
    assert len(accuracies) == 40
    assert set(accuracies) <= {0.0, 0.5, 1.0}
    assert 0 < sum(accuracies) < 40
    mean = run.result["metrics"]["eval/rewards/accuracies"]
    assert sum(accuracies) / 40 == pytest.approx(mean)


@pytest.mark.parametrize(
    "metric",
    [
        *("samples/judge", pytest.param("samples/win_rate", marks=pytest.mark.slow)),
        pytest.param("eval/rewards/accuracies", marks=pytest.mark.slow),
    ],
)
def test_a_report_has_the_errors_of_the_items(run, metric):
    """A bootstrap over n items: their spread over sqrt(n), as of all there are, so n and not n - 1.

    Of marks 0.5 / sqrt(10) = 0.158, of wins half of that. The KL has the error that its run said.
    """
    write_report(run.folder.parent, metric=metric)
    [found] = json.loads((run.folder.parent / "sweep.json").read_text())["configurations"]
    said = run.result["metrics"]
    values = evaluation(run)["accuracies"]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)
    expected = {"samples/judge": 0.158, "samples/win_rate": 0.079}.get(metric, spread)
    assert found["value"]["mean"] == pytest.approx(said[metric])
    assert found["value"]["stderr"] == pytest.approx(expected, rel=0.1)
    assert found["kl"]["mean"] == said["samples/kl"]
    assert found["kl"]["stderr"] == said["samples/kl_stderr"]
