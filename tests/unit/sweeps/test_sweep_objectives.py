"""Objectives side by side: best cells, device-hours, equal KL, maps, and edges of grids."""

import json

import pytest

from dpo_lightning.sweeps.report.analysis import analyse
from dpo_lightning.sweeps.report.read import read_sweep
from dpo_lightning.sweeps.report.write import write_report
from tests.support.sweep_folders import write_trial

REWARD = "controlled/expected_reward"
EXACT_KL = "controlled/kl_policy_reference"


def cell(sweep, loss: str, beta: float, reward: float, kl: float, *more: str, devices: int = 1):
    """A trial of an hour."""
    folder = write_trial(
        sweep, f"{loss}-{beta}-{'-'.join(more)}", f"loss={loss}", f"beta={beta}", *more,
        metrics={REWARD: reward, EXACT_KL: kl, "controlled/reference_reward": 1.0},
    )  # fmt: skip
    for name, changes in (
        ("result.json", {"throughput": {"total_seconds": 3600.0}}),
        ("trial.json", {"devices": [f"cuda:{i}" for i in range(devices)]}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))


def test_each_objective_has_its_best_cell_its_cost_and_its_reward_at_equal_kl(tmp_path):
    """sigmoid: (KL, reward) (2, 3), (6, 5); simpo: (1, 2), (4, 4). Both reach KL 4.

    At 4 sigmoid is on the line from (2, 3) to (6, 5): 4. Without any cell at or below the common
    KL the reference, (0, 1), is the other end: a lone (8, 4.8) is at 1 + 3.8 * 4 / 8 = 2.9 there.
    """
    cell(tmp_path, "sigmoid", 0.1, 5.0, 6.0, devices=2)
    cell(tmp_path, "sigmoid", 0.5, 3.0, 2.0)
    cell(tmp_path, "simpo", 2.0, 4.0, 4.0)
    cell(tmp_path, "simpo", 5.0, 2.0, 1.0)
    cell(tmp_path, "ipo", 0.1, 4.8, 8.0)
    write_trial(tmp_path, "broken", "loss=ipo", "beta=9", status="failed")
    found = analyse(read_sweep(tmp_path)).objectives
    assert found.kl == 4.0
    told = {o.name: (o.best.beta, o.cells, o.tried, o.device_hours, o.at_kl) for o in found.rows}
    assert told == {
        "sigmoid": (0.1, 2, 2, pytest.approx(3.0), pytest.approx(4.0)),
        "ipo": (0.1, 1, 2, pytest.approx(1.0), pytest.approx(2.9)),
        "simpo": (2.0, 2, 2, pytest.approx(2.0), pytest.approx(4.0)),
    }
    report = write_report(tmp_path)
    assert [row["name"] for row in report["objectives"]["rows"]] == ["sigmoid", "ipo", "simpo"]
    said = (tmp_path / "report.md").read_text()
    assert "## Objectives" in said
    assert "| expected reward at KL 4.00 |" in said
    assert "1 of 2" in said


def test_a_budget_is_the_kl_of_the_comparison_where_it_is_smaller(tmp_path):
    from dpo_lightning.sweeps.report.pick import PickRule

    cell(tmp_path, "sigmoid", 0.1, 5.0, 6.0)
    cell(tmp_path, "simpo", 2.0, 4.0, 4.0)
    found = analyse(read_sweep(tmp_path), None, PickRule(kl_budget=2.0)).objectives
    # From (0, 1): 1 + 4 * 2 / 6 and 1 + 3 * 2 / 4.
    assert found.kl == 2.0
    assert [row.at_kl for row in found.rows] == pytest.approx([1 + 8 / 6, 2.5])


def test_several_betas_and_rates_are_a_map(tmp_path):
    """Of two cells of one beta and rate the better one counts; one that is missing is empty."""
    for beta, rate, reward, gamma in (
        (2, 1e-6, 3.0, 0.5), (2, 1e-6, 4.0, 1.0), (2, 5e-7, 2.0, 0.5), (10, 1e-6, 1.5, 0.5),
    ):  # fmt: skip
        cell(tmp_path, "simpo", beta, reward, 1.0, f"optimizer.lr={rate}", f"loss.gamma={gamma}")
    cell(tmp_path, "sigmoid", 0.1, 5.0, 6.0, "optimizer.lr=1e-06")
    found = {o.name: o.grid for o in analyse(read_sweep(tmp_path)).objectives.rows}
    assert found["sigmoid"] is None
    grid = found["simpo"]
    assert (grid.betas, grid.rates) == ((2.0, 10.0), (5e-7, 1e-6))
    assert grid.cells == ((2.0, 4.0), (None, 1.5))
    write_report(tmp_path)
    said = (tmp_path / "report.md").read_text()
    assert "## β and learning rate, simpo" in said
    assert "| 10 | – | 1.50 |" in said


@pytest.mark.parametrize(
    ("rewards", "end", "values"),
    [((5.0, 4.0, 3.0), "smallest", "0.005,0.0025"), ((3.0, 4.0, 5.0), "largest", "0.08,0.16")],
)
def test_at_the_edge_the_command_that_extends_the_grid_is_said(tmp_path, rewards, end, values):
    """β 0.01, 0.02, 0.04: a factor of two beyond, twice, 0.005 and 0.0025, or 0.08 and 0.16."""
    for beta, reward in zip((0.01, 0.02, 0.04), rewards, strict=True):
        cell(tmp_path, "ipo", beta, reward, 1.0, "seed=3")
    report = write_report(tmp_path)
    [edge] = report["objectives"]["rows"][0]["edges"]
    words = edge["command"].split()
    assert words[-1] == f"hydra.sweep.dir={tmp_path}"
    assert {"-m", "loss=ipo", "seed=3", f"beta={values}"} <= set(words)
    for name in ("report.html", "report.md"):
        said = (tmp_path / name).read_text()
        assert f"At the edge: the best cell of ipo has the {end} β" in said
        assert edge["command"] in said


def test_a_best_cell_inside_its_grid_is_at_no_edge(tmp_path):
    for beta, reward in ((0.1, 3.0), (0.2, 5.0), (0.4, 4.0)):
        cell(tmp_path, "ipo", beta, reward, 1.0, "data.batch_size=8", f"loss.gamma={-beta}")
    [objective] = analyse(read_sweep(tmp_path)).objectives.rows
    assert objective.edges == ()
    assert "At the edge" not in (write_report(tmp_path) and (tmp_path / "report.md").read_text())


def test_what_makes_a_loss_another_one_is_an_objective_of_its_own(tmp_path):
    for more in ("reference=none", "reference=auto", "loss.f_divergence=js_divergence",
                 "reference.sync_every=64", "reference.sync_every=null"):  # fmt: skip
        cell(tmp_path, "sigmoid", 0.1, 3.0, 1.0, more)
    names = [o.name for o in analyse(read_sweep(tmp_path)).objectives.rows]
    assert sorted(names) == [
        "sigmoid, f_divergence js_divergence", "sigmoid, reference auto", "sigmoid, reference none",
        "sigmoid, reference.sync_every 64", "sigmoid, reference.sync_every null",
    ]  # fmt: skip
