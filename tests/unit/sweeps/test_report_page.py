"""The report's page: title, links, tables, CSV, curves and labels."""

import base64
import csv
import dataclasses
import hashlib
import json
import math
import re
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpo_lightning.run.page.colours import variables
from dpo_lightning.run.page.text import seconds_text
from dpo_lightning.sweeps.report.about import about
from dpo_lightning.sweeps.report.analysis import analyse
from dpo_lightning.sweeps.report.curves import band, pooled, smoothed
from dpo_lightning.sweeps.report.figures import NARROW, WIDE, frontier_figure
from dpo_lightning.sweeps.report.labels import Label, extent, place_labels
from dpo_lightning.sweeps.report.read import read_sweep
from dpo_lightning.sweeps.report.theme import STYLE, colours_of
from dpo_lightning.sweeps.report.write import write_report
from tests.support.properties import examples
from tests.support.sweep_folders import curve, scored, scored_metrics, write_trial


@pytest.fixture
def sweep(tmp_path):
    return tmp_path / "2026-11-24_sweep"


def told(folder, *, model="stories", rows=986, train="a/b/pairs.jsonl", seconds=30.0, steps=100):
    """Adds to a trial what a run would have told of itself."""
    result = json.loads((folder / "result.json").read_text())
    result |= {"model": {"name": model}, "data": {"train_groups": rows, "eval_groups": 109}}
    result["throughput"] |= {"total_seconds": seconds}
    result["step"] = steps
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.yaml").write_text(
        json.dumps({"data": {"train": train, "batch_size": 32}, "optimizer": {"lr": 5e-4}})
    )


def trial(sweep, beta, *, seed=1, reward=5.0, kl=1.0, extra=(), **facts):
    """A finished trial of the embedded task with all that a report shows."""
    evaluation = scored([1.0, 2.0], [0.0, 3.0], [kl, kl])
    evaluation["optimum"] = [
        {"kl": x / 4, "reward": 1.5 + 2 * math.sqrt(x / 4), "beta": 1.0} for x in range(60)
    ]
    folder = write_trial(
        sweep, f"beta-{beta}_seed-{seed}", f"beta={beta}", f"seed={seed}", *extra,
        metrics=scored_metrics(evaluation) | {
            "controlled/expected_reward": reward, "controlled/kl_policy_reference": kl,
            "controlled/reference_reward": 1.5, "eval/rewards/accuracies": 0.8,
        },
        evaluation=evaluation, rows=curve(60, level=0.3),
    )  # fmt: skip
    told(folder, **facts)
    return folder


# Title, links, tables ----------------------------------------------------------------------------


def test_the_title_says_what_was_trained(sweep):
    for seed in (1, 2):
        trial(sweep, 0.1, seed=seed)
    found = about(read_sweep(sweep))
    assert found.title == "stories on pairs.jsonl: 986 rows, 100 steps, seeds 1, 2"
    assert found.facts[:2] == ("109 evaluation rows", "batches of 32 rows")
    assert found.facts[3:] == ("learning rate 0.0005", "60 s of wall time in all trials")
    write_report(sweep)
    assert f"<h1>{found.title}</h1>" in (sweep / "report.html").read_text()
    assert (sweep / "report.md").read_text().startswith(f"# {found.title}\n")


def test_where_trials_differ_the_title_says_how_many(sweep):
    trial(sweep, 0.1, train=None)
    trial(sweep, 0.2, model="other", rows=2000, train="org/data", steps=1)
    assert about(read_sweep(sweep)).title == (
        "2 models on 2 data sets: 986 to 2,000 rows, 1 to 100 steps, seed 1"
    )


@pytest.mark.parametrize("text", [None, "", "[1", "data: [1]", "\0", "data: {train: {a: 1}}"])
def test_what_is_not_known_is_left_out_of_the_title(sweep, text):
    write_trial(sweep, "a", "beta=0.1")
    if text is not None:
        (sweep / "a" / "config.yaml").write_text(text)
    title = about(read_sweep(sweep)).title
    assert title in (sweep.name, "{a: 1}: 100 steps, seed 1")


def test_the_recommended_trial_comes_first_and_each_row_opens_its_trials(sweep, monkeypatch):
    for beta, kl, rewards in ((0.1, 4.0, (4.0, 6.0)), (1.0, 1.0, (3.9, 5.9))):
        for seed, reward in enumerate(rewards, start=1):
            trial(sweep, beta, seed=seed, reward=reward, kl=kl)
    found = analyse(read_sweep(sweep))
    second = dataclasses.replace(found, pick=found.configurations[1])
    monkeypatch.setattr("dpo_lightning.sweeps.report.write.analyse", lambda *_: second)
    write_report(sweep)
    page, text = ((sweep / f"report.{kind}").read_text() for kind in ("html", "md"))
    card = page[page.index('class="pick"') : page.index("</section>")]
    assert ">Recommended<" in card
    assert '<a href="beta-1.0_seed-2/">seed 2</a>' in card
    [first, second] = [line for line in text.splitlines() if re.match(r"\| \d \| β", line)]
    assert first.startswith("| 2 | β 1.0 |")
    assert "[seed 1](beta-1.0\\_seed-1/)" in first
    assert second.startswith("| 1 | β 0.1 |")
    assert (sweep / "beta-1.0_seed-1").is_dir()


def test_the_csv_has_every_trial_with_its_numbers_in_full(sweep):
    trial(sweep, 0.1, extra=["+peft.rank=8", "name='=1+1, a'"], seconds=1 / 3)
    write_trial(sweep, "b", "beta=0.2", status="running", result=False)
    write_report(sweep)
    with (sweep / "trials.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["trial"], first["status"], first["beta"]) == (
        "beta-0.1_seed-1",
        "finished",
        "0.1",
    )
    assert float(first["wall_seconds"]) == 1 / 3
    assert float(first["controlled/expected_reward"]) == 5.0
    assert first["name"] == "'=1+1, a'"
    # A spreadsheet would compute what begins with a sign.
    assert first["'+peft.rank"] == "8"
    assert (second["trial"], second["step"], second["samples/kl"]) == ("b", "", "")
    assert 'href="trials.csv"' in (sweep / "report.html").read_text()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (9000, "2.5 h")]
)
def test_durations(seconds, text):
    assert seconds_text(seconds) == text


# The page ----------------------------------------------------------------------------------------


def test_the_page_holds_everything_itself_and_runs_its_own_script_alone(sweep):
    trial(sweep, 0.1)
    write_report(sweep)
    page = (sweep / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert not [source for source in sources if re.match(r"\w+://|//", source)]
    assert page.count("<svg") == 6  # the frontier twice, four panels
    script = re.search(r"<script>(.*)</script>", page, flags=re.S).group(1)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    used = {*re.findall(r'href="#([^"]*)"', page), *re.findall(r"url\(#([^)]*)\)", page)}
    assert used <= set(ids)
    picture = (sweep / "frontier.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert 800 < width < 2000
    assert 500 < height < 1500


def test_figures_have_both_schemes_and_say_their_numbers(sweep):
    for beta in (0.1, 1.0):
        trial(sweep, beta, kl=1 / beta)
    write_report(sweep)
    page = (sweep / "report.html").read_text()
    figures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.S))
    # No colour is left that would be the same on white and on black.
    assert re.findall(r"(?<!, )#[0-9a-f]{6}", re.sub(r'href="#[^"]*"', "", figures)) == []
    names = set(re.findall(r"var\(--([\w-]+),", figures))
    colours = colours_of(analyse(read_sweep(sweep)).configurations)
    for dark in (False, True):
        said = variables(colours, dark=dark)
        assert all(f"--{name}:" in said for name in names)
        assert said in page
    assert names >= {"figure-text", "series-0", "series-1"}
    assert "<title>β 0.1: expected reward 5.000, KL 10.00 nats</title>" in figures
    assert 'xlink:href="beta-0.1_seed-1/"' in figures


HOSTILE = '<b>"β" -- & </title>'


def test_labels_are_no_markup_in_a_figure(sweep):
    for beta in (0.1, 0.2):
        trial(sweep, beta, kl=beta, extra=[f"name={HOSTILE}{beta}"])
    write_report(sweep)
    page = (sweep / "report.html").read_text()
    assert "<b>&quot;" not in page.replace("&lt;b&gt;", "")
    assert HOSTILE not in page
    assert "&lt;b&gt;&quot;β&quot; -- &amp; &lt;/title&gt;" in page


# Labels ------------------------------------------------------------------------------------------


@settings(max_examples=examples(15))
@given(
    st.lists(
        st.tuples(st.floats(0.05, 9.5), st.floats(0, 1), st.text("β 0123", min_size=1, max_size=9)),
        min_size=1, max_size=10,
    )
)  # fmt: skip
def test_no_label_touches_the_curve_or_leaves_the_figure(drawn):
    """Points just below a curve, as policies are below the closed form."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 4.2), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        xs = np.linspace(0, 10, 200)
        [line] = axes.plot(xs, np.sqrt(xs))
        axes.set_xlim(0, 10)
        axes.set_ylim(0, 3.5)
        points = [(x, math.sqrt(x) * (1 - 0.2 * below)) for x, below, _ in drawn]
        labels = [Label(text, *point) for point, (*_, text) in zip(points, drawn, strict=True)]
        curves = [list(zip(xs, np.sqrt(xs), strict=True))]
        written = place_labels(axes, labels, points=points, curves=curves)
        figure.draw_without_rendering()
        path = line.get_path().transformed(line.get_transform())
        for text in written:
            assert not path.intersects_bbox(extent(text), filled=False)
        assert len(written) >= min(len(drawn), 2)


def test_a_label_on_the_curve_stands_elsewhere_or_nowhere(monkeypatch):
    """The curve runs level, 10 points below the point: through the first place, not the second."""
    places = ((0.0, -5.0, "center", "top"), (0.0, 9.0, "center", "bottom"))
    for offered, expected in ((places, [(0.0, 9.0)]), (places[:1], [])):
        monkeypatch.setattr("dpo_lightning.sweeps.report.labels._PLACES", offered)
        with rc_context(STYLE):
            figure = Figure(figsize=(4, 4), dpi=72)
            FigureCanvasAgg(figure)
            axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 288), ylim=(0, 288))
            written = place_labels(
                axes, [Label("β 1", 100, 100)], points=[(100, 100)], curves=[[(0, 90), (288, 90)]]
            )
        assert [text.get_position() for text in written] == expected


def test_a_label_stands_nearer_to_its_own_point_than_to_another(monkeypatch):
    """The first place, free as it is, lies 9 points below another point; the second is taken."""
    places = ((-60.0, -9.0, "center", "top"), (9.0, -4.0, "left", "top"))
    monkeypatch.setattr("dpo_lightning.sweeps.report.labels._PLACES", places)
    with rc_context(STYLE):
        figure = Figure(figsize=(4, 4), dpi=72)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 288), ylim=(0, 288))
        points = [(200.0, 100.0), (140.0, 100.0)]
        [text] = place_labels(axes, [Label("β 1", *points[0])], points=points)
    assert text.get_position() == (9.0, -4.0)


@pytest.mark.parametrize("shape", [WIDE, NARROW])
def test_a_long_label_leaves_the_plot_its_width(sweep, shape):
    """A label too long for its place is its number in the table."""
    long = "data.train=/a/very/long/folder/with/a/name/rows.jsonl"
    trial(sweep, 0.1, kl=4.0, extra=[long])
    trial(sweep, 1.0, kl=1.0, extra=[long])
    analysis = analyse(read_sweep(sweep))
    with rc_context(STYLE):
        figure, tips = frontier_figure(analysis, colours_of(analysis.configurations), shape=shape)
        figure.draw_without_rendering()
    [axes] = figure.axes
    assert axes.get_position().width > 0.8
    texts = [text.get_text() for text in axes.texts]
    assert sorted(texts) == ["#1", "#2"]
    assert all("rows.jsonl" in tip for tip in tips.values())


# Curves ------------------------------------------------------------------------------------------


def test_smoothing_keeps_lines_and_the_first_step():
    """A running mean as wide on both sides leaves a straight line as it is.

    Of 196 values a fourteenth is 14: so many on each side, and 14 at the end have fewer after than
    before them. The last is the mean of itself and of the 14 before it: 7 steps behind. The
    standard error of a mean of 0, 1, …, 28 is sqrt(70 / 28): their variance is (29^2 - 1) / 12.
    """
    steps = np.arange(196.0)
    means, errors = smoothed(steps)
    np.testing.assert_allclose(means[:-14], steps[:-14], atol=1e-9)
    assert means[-1] == pytest.approx(195 - 7)
    assert errors[100] == pytest.approx(math.sqrt(70 / 28))
    assert errors[0] == pytest.approx(0, abs=1e-6)
    noise = np.random.default_rng(0).normal(size=2000)
    means, _ = smoothed(noise)
    assert means[0] == pytest.approx(noise[0])
    # No jump at the end, which would look like a run that came apart there.
    assert np.abs(np.diff(means[-100:])).max() < 0.2
    assert smoothed(np.array([5.0, 6.0]))[0].tolist() == [5.0, 6.0]


def test_a_band_is_of_the_seeds_or_of_the_steps():
    """Two seeds: from the lower to the higher. One: 1.96 standard errors around the mean.

    Of 8 steps a fourteenth, rounded up, is 1: at the second of 0, 3, 0, 3, … the mean is of
    0, 3, 0: 1, its variance 2, its standard error sqrt(2 / 2) = 1.
    """
    steps = list(range(1, 9))
    both = band([(steps, [1.0] * 8), (steps, [3.0] * 8)])
    assert (both.low.tolist(), both.mean.tolist(), both.high.tolist()) == (
        [1.0] * 8, [2.0] * 8, [3.0] * 8,
    )  # fmt: skip
    one = band([(steps, [0.0, 3.0] * 4)])
    assert one.mean[1] == pytest.approx(1.0)
    assert one.high[1] - one.mean[1] == pytest.approx(1.959964)
    assert one.mean[1] - one.low[1] == pytest.approx(1.959964)


def test_seeds_are_averaged_over_the_steps_that_they_share():
    steps, values = pooled(
        [([1, 2, 3], [1.0, 2.0, 3.0]), ([2, 3], [4.0, 5.0]), ([], []), ([9], [0.0])]
    )
    assert steps.tolist() == [2, 3]
    assert values.tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert pooled([([], [])]) is None
    assert band([([], [])]) is None
