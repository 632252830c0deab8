"""The frontier of one policy in a report: its table, its answers, its points in the picture."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from dpo_lightning.sweeps.report.analysis import analyse
from dpo_lightning.sweeps.report.one_policy import draw_policies, policy_frontiers
from dpo_lightning.sweeps.report.read import read_sweep
from dpo_lightning.sweeps.report.write import write_report
from tests.support.sweep_folders import write_trial

REWARD, KL = "controlled/expected_reward", "controlled/kl_policy_reference"


def point(lam: float, method: str, **more: Any) -> dict[str, Any]:
    return {
        "lambda": lam,
        "beta": None if lam == 0 else 0.5 / lam,
        "method": method,
        "reward": 1 + lam,
        "reward_interval": [0.75 + lam, 1.25 + lam],
        "kl": 2 * lam,
        "kl_interval": [2 * lam - 0.1, 2 * lam + 0.1],
        "ess": 16.0,
    } | more


def said(text: str) -> list[dict[str, str]]:
    return [{"prompt": f"prompt {i}", "response": f"{text} {i}"} for i in range(2)]


FOUND = {
    "axis": "beta",
    "points": [
        point(0, "decoded", samples=said("none")),
        point(0.5, "decoded", samples=said("half"), gain_ratio=0.97),
        point(0.5, "weights", ess=31.4, gain_ratio=0.98),
    ],
    "not_shown": [{"lambda": 5, "beta": 0.1, "why": "its answers are worth 2.0 a prompt"}],
    "notes": ["β is 0.5/λ."],
    "drawn": {"as_run": True},
}


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Two trials, of which one was asked for its frontier."""
    for beta in ("0.5", "1"):
        write_trial(tmp_path, f"beta-{beta}", f"beta={beta}", metrics={REWARD: 2.0, KL: 2.0})
    (tmp_path / "beta-0.5" / "interpolation.json").write_text(json.dumps(FOUND))
    return tmp_path


def test_points_are_rows_and_what_is_hidden_is_named(sweep):
    [found] = policy_frontiers(read_sweep(sweep).trials)
    assert found.label == "beta-0.5"
    assert found.heads == (
        *("β", "λ", "way", "reward", "KL in nats", "answers worth", "gain / best at this KL"),
    )
    assert found.rows == (
        ("–", "0", "decoded", "1.00 ± 0.25", "0.00 ± 0.10", "16.0", "–"),
        ("1.00", "0.500", "decoded", "1.50 ± 0.25", "1.00 ± 0.10", "16.0", "0.970"),
        ("1.00", "0.500", "by weights", "1.50 ± 0.25", "1.00 ± 0.10", "31.4", "0.980"),
    )
    assert found.notes == (
        "β is 0.5/λ.",
        "Not shown: λ 5.00 by weights, as its answers are worth 2.0 a prompt.",
    )


def test_answers_stand_side_by_side(sweep):
    [found] = policy_frontiers(read_sweep(sweep).trials)
    assert found.places == ("reference", "β 1.00")
    assert found.answers == (
        ("prompt 0", ("none 0", "half 0")),
        ("prompt 1", ("none 1", "half 1")),
    )


def test_a_place_without_a_beta_is_a_lambda(sweep):
    points = [p | {"beta": None} for p in FOUND["points"]]
    changed = FOUND | {"axis": "lambda", "points": points}
    (sweep / "beta-0.5" / "interpolation.json").write_text(json.dumps(changed))
    [found] = policy_frontiers(read_sweep(sweep).trials)
    assert found.heads[0] == "λ"
    assert found.places == ("reference", "λ 0.500")


def test_pages_have_it(sweep):
    write_report(sweep)
    for name in ("report.html", "report.md"):
        text = (sweep / name).read_text()
        assert text.count("The frontier of one policy: beta-0.5") == 1
        assert "1.50 ± 0.25" in text
        assert "half 1" in text


@pytest.mark.slow
@pytest.mark.parametrize("text", ["{", "[]", '{"points": 3}', '{"points": [{"lambda": "x"}]}', ""])
def test_a_damaged_file_stops_no_report(sweep, text: str):
    (sweep / "beta-0.5" / "interpolation.json").write_text(text)
    write_report(sweep)
    assert "The frontier of one policy" not in (sweep / "report.md").read_text()


def lines(sweep: Path, metric: str | None = None) -> dict[str, list[tuple[float, float]]]:
    """Lines that are drawn, by their labels."""
    axes = Figure().add_subplot()
    draw_policies(axes, analyse(read_sweep(sweep), metric))
    return {
        str(line.get_label()): list(zip(*map(list, line.get_data()), strict=True))
        for line in axes.get_lines()
    }


def test_the_picture_has_both_kinds_of_points(sweep):
    assert lines(sweep) == {
        "one policy, by weights": [(1.0, 1.5)],
        "one policy, decoded": [(0.0, 1.0), (1.0, 1.5)],
    }


def test_points_of_other_marks_stay_out_of_the_picture(sweep):
    """A judge that was named later, and a sweep that is ranked by accuracy."""
    other = FOUND | {"drawn": {"as_run": False}}
    (sweep / "beta-1" / "interpolation.json").write_text(json.dumps(other))
    assert len(lines(sweep)) == 2
    (sweep / "beta-0.5" / "interpolation.json").write_text(json.dumps(other))
    assert lines(sweep) == {}
    (sweep / "beta-0.5" / "interpolation.json").write_text(json.dumps(FOUND))
    for trial in sweep.glob("beta-*"):
        result = json.loads((trial / "result.json").read_text())
        result["metrics"] = {"eval/rewards/accuracies": 0.7, KL: 1.0}
        (trial / "result.json").write_text(json.dumps(result))
    assert lines(sweep) == {}
