"""A run's page: its curves, its content, the command that writes it."""

import json
import re

import pytest

from dpo_lightning.run.page.content import make_content
from dpo_lightning.run.page.plots import Curve, averaged, panel, ticks
from dpo_lightning.run.page.write import write_run_page
from dpo_lightning.sweeps.report.write import main, write_report
from tests.support.sweep_folders import write_trial

HOSTILE = '<b>"β" </title>'


@pytest.fixture
def run(tmp_path):
    """A run of 300 steps with all that its page shows."""
    rows = [{"step": step, "train/loss": 0.69 - step / 1000} for step in range(1, 301)]
    rows[-1] |= {"eval/loss": 0.5}
    folder = write_trial(
        tmp_path / "sweep", "beta-0.1", "beta=0.1", metrics={"eval/loss": 0.5}, rows=rows,
        evaluation={
            "answers": [{"prompt": HOSTILE, "before": "first", "after": "then"}],
            "samples": [{"prompt": "q", "policy": "p", "reference": "r", "judge": 7.25}],
        },
    )  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    result |= {"signs": [{"says": "the policy hardly moved"}], "exported_step": 300}
    result["data"] = {"dropped": {"too_long": 3, "identical_responses": 0}}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.yaml").write_text("beta: 0.3\nseed: 1\nname: x\ndata: {batch_size: 17}\n")
    (folder / "model").mkdir()
    return folder


def test_ticks_are_round_and_few():
    """Over 0 to 1 a step of 0.1 gives 11, of 0.2 6, of 0.5 3: the first that is at most 5."""
    assert ticks(0, 1) == [0, 0.5, 1]
    assert ticks(-3, 40) == [0, 10, 20, 30, 40]


def test_many_points_become_means_of_equal_parts():
    """Ten values in two parts: steps 0 to 4 and 5 to 9, whose squares sum to 30 and 255."""
    points = [(float(x), float(x * x)) for x in range(10)]
    assert averaged(points, 2) == [(2.0, 6.0), (7.0, 51.0)]
    assert averaged(points, 10) == points


def test_a_panel_without_a_point_is_none_and_a_level_curve_has_a_height():
    assert panel("loss", [Curve("training", [])]) is None
    assert "nan" not in panel("loss", [Curve("training", [(1, 0.5), (2, 0.5)])])


def test_the_axis_of_steps_has_whole_numbers_and_is_the_runs():
    """One evaluation at step 3 of a run of 1 to 4: a panel of its own would have half steps."""
    svg = panel("KL", [Curve("evaluation", [(3, 0.5)])], steps=(1, 4))
    assert svg is not None
    numbers = re.findall(r'text-anchor: middle">([^<]*)<', svg)
    assert numbers == ["1", "2", "3", "4", "step"]
    assert panel("KL", [Curve("evaluation", [(3, 0.5)])]).count("middle") == 4  # 2, 3, 4, step


def test_the_page_has_what_the_files_say(run):
    found = make_content(run)
    assert found.signs == ["the policy hardly moved"]
    assert found.dropped == [("too long", "3")]
    assert found.settings == [("beta", "0.3", "0.1"), ("data.batch_size", "17", "32")]
    assert found.exported == "model/ has the weights of step 300."
    assert len(found.panels) == 1
    assert found.answers[0][1] == [("policy, after", "then"), ("policy, before", "first")]
    assert found.answers[1][1][0] == ("policy, drawn, judge's mark 7.25", "p")
    page = write_run_page(run).read_text()
    assert HOSTILE not in page
    assert not re.findall(r'(?:src|href)="(?:\w+:)?//', page)


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "evaluation.json", "config.yaml"])
def test_a_damaged_file_leaves_the_rest_of_the_page(run, name):
    (run / name).write_bytes(b'{"metrics": [1, \xff\n[[[')
    assert "Curves" in write_run_page(run).read_text() or name == "metrics.jsonl"


def test_report_writes_the_page_of_a_run_and_a_sweep_links_to_it(run, capsys):
    assert main([str(run), "--metric", "eval/loss"]) == 2
    said = capsys.readouterr().err
    assert "leave --metric out" in said
    assert main([str(run)]) == 0
    write_report(run.parent)
    assert 'href="beta-0.1/report.html"' in (run.parent / "report.html").read_text()
    (run / "metrics.jsonl").unlink()
    assert main([str(run)]) == 2
