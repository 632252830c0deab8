"""A run's page: its curves, its content, the command that writes it."""

import json
import re

import pytest

from dpo_lightning.run.page.content import make_content
from dpo_lightning.run.page.plots import Curve, averaged, panel, ticks
from dpo_lightning.run.page.write import keep_run_page, write_run_page
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


def changed(run, **entries):
    """The run's page with other entries of ``result.json``."""
    path = run / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return write_run_page(run).read_text()


@pytest.mark.parametrize(
    ("status", "error", "is_fault"),
    [
        ("finished", None, False),
        ("diverged", "step 7: the loss is nan", True),
        ("failed", "rows.jsonl:3: no prompt", True),
        ("stopped", "interrupted", True),
        ("paused", None, False),
        ("pruned", "pruned at step 2 of 16, rank 5 of 8 by eval/loss", False),
    ],
)
def test_the_page_says_how_a_run_ended(run, status, error, is_fault):
    page = changed(run, status=status, error=error)
    assert f">{status}</span>" in page
    assert ('<span class="bad">' in page, '<p class="bad">' in page) == (is_fault, is_fault)
    assert (error is None) or f">{error}</p>" in page


def test_a_resumed_run_says_where_and_draws_each_step_once(run):
    """Steps 2 and 3 were taken twice: the mean of the curve is of the later values alone."""
    assert "resumed" not in write_run_page(run).read_text()
    steps = [(1, 0.7), (2, 0.9), (3, 0.9), (2, 0.6), (3, 0.5)]
    lines = [json.dumps({"step": step, "train/loss": loss}) for step, loss in steps]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    again = {"from": "outputs/runs/x/checkpoints/step-000001.ckpt", "step": 1}
    page = changed(run, resumed=again | {"changed": {}})
    assert "<span>· resumed at step 1</span>" in page
    assert re.findall(r"training, step (\d): ([\d.]+)", page) == [
        *(("1", "0.700"), ("2", "0.600"), ("3", "0.500")),
    ]
    page = changed(run, resumed=again | {"changed": {"optimizer.lr": [1, 2]}})
    assert "<span>· resumed at step 1, with another optimizer.lr</span>" in page


@pytest.mark.parametrize(
    ("trainer", "said"),
    [("{devices: 2}", "2 devices"), ("{devices: 4, num_nodes: 2}", "8 devices"), ("{}", None)],
)
def test_a_run_of_several_ranks_says_how_many(run, trainer, said):
    (run / "config.yaml").write_text(f"beta: 0.3\ntrainer: {trainer}\n")
    facts = make_content(run).facts
    assert [fact for fact in facts if "devices" in fact] == ([said] if said else [])


def test_a_run_without_metrics_has_no_page_and_one_that_fails_is_a_line(run, caplog, monkeypatch):
    def fail(folder):
        raise OSError(f"no room for {'hf_' + 'a1B' * 11}")

    with monkeypatch.context() as patched:
        patched.setattr("dpo_lightning.run.page.write.make_content", fail)
        keep_run_page(run)
    [line] = caplog.messages
    assert line.startswith(f"{run / 'report.html'}: not written: OSError: no room for ")
    assert "a1Ba1B" not in line
    assert not (run / "report.html").exists()
    keep_run_page(run)
    assert (run / "report.html").is_file()
    (run / "report.html").unlink()
    (run / "metrics.jsonl").unlink()
    keep_run_page(run)
    assert not (run / "report.html").exists()
    assert len(caplog.messages) == 1
