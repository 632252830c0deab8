"""Comparisons: who may be compared, in which metrics, and tests whose errors are as they say."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.run.opened import open_named
from dpo_lightning.sweeps.compare.command import compare
from dpo_lightning.sweeps.compare.differences import differences, holm, prompt_differences
from dpo_lightning.sweeps.compare.fit import check_comparable, metrics_to_compare
from dpo_lightning.sweeps.compare.page import comparison_page
from dpo_lightning.sweeps.compare.subjects import (
    Subject,
    group_items,
    labels_of,
    recorded,
    sample_items,
)
from dpo_lightning.sweeps.report import statistics

ACCURACY, KL, LOSS = "eval/rewards/accuracies", "samples/kl", "eval/loss"


def subject(
    label: str, values: Any, *, metric: str = ACCURACY, beta: float | None = 0.1, **settings: Any
) -> Subject:
    """A policy with a value for each of so many prompts."""
    names = [f"p{n:03}-g" for n in range(len(values))]
    own = {key.replace("__", "."): value for key, value in settings.items()}
    items = {metric: group_items(names, list(values))}
    return Subject(label, f"runs/{label}", beta, items, Counter(names), own)


def test_a_difference_by_hand():
    """b has 1, 1, 1, 0 and a has 0, 1, 1, 1: differences 1, 0, 0, -1 of mean 0.

    With 1, 1, 0, 0 in the place of a the differences are 0, 0, 1, 0: of 2^4 flips every one has a
    mean of 1/4 or -1/4, so p = 1.
    """
    b = subject("b", [1, 1, 1, 0])
    [even], _ = differences([subject("a", [0, 1, 1, 1]), b], [ACCURACY])
    assert (even.difference, even.p, even.items, even.prompts) == (0.0, 1.0, 4, 4)
    [more], _ = differences([subject("a", [1, 1, 0, 0]), b], [ACCURACY])
    assert (more.value_a, more.value_b, more.difference, more.p) == (0.5, 0.75, 0.25, 1.0)
    assert (more.a, more.b, more.better) == ("a", "b", "higher")
    low, high = more.interval
    assert low <= 0.25 <= high


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        *((ACCURACY, "higher"), (LOSS, "lower"), ("eval/fitted_log_loss", "lower"), (KL, None)),
        *(("eval/logratios/margins", "higher"), ("eval/logratios/chosen", None)),
        # It falls in a good training, as often as not.
        ("eval/logratios/rejected", None),
    ],
)
def test_the_better_side_is_the_metrics_own(metric: str, better: str | None):
    sides = [subject(label, [0.0, 1.0, 2.0], metric=metric) for label in "ab"]
    [found], _ = differences(sides, [metric])
    assert found.better == better


def test_p_is_exact_for_few_prompts():
    """Five differences of one sign: of 32 flips two have a mean as large, p = 2 / 32."""
    [found], _ = differences([subject("a", [0] * 5), subject("b", [1, 1, 1, 1, 1])], [ACCURACY])
    assert found.p == pytest.approx(2 / 32)


def test_a_policy_with_itself_is_no_difference():
    own = subject("a", np.random.default_rng(0).normal(size=60))
    [found], _ = differences([own, own], [ACCURACY])
    assert (found.difference, found.interval, found.p) == (0.0, (0.0, 0.0), 1.0)


def test_items_of_a_prompt_are_flipped_together():
    """Two prompts with 3 and 1 items: their differences are sums, scaled to the mean over items."""
    names = ["p-a", "p-b", "p-b", "q-a"]
    keys = list(group_items(names, [0, 0, 0, 0]))
    assert keys == [("p-a", 0), ("p-b", 0), ("p-b", 1), ("q-a", 0)]
    b = dict(zip(keys, [1.0, 1.0, 0.0, 4.0], strict=True))
    found = prompt_differences(dict.fromkeys(keys, 0.0), b, keys, ["p", "p", "p", "q"])
    assert found.tolist() == [1.0, 2.0]
    assert found.mean() == sum(b.values()) / 4


@pytest.mark.parametrize("draw", ["shares", "normal"])
def test_of_pairs_from_one_distribution_few_are_found_different(monkeypatch, draw: str):
    """P(p <= 0.05) <= 0.09 over 200 pairs: at 0.05 more than 18 of 200 come once in 150 times."""
    monkeypatch.setattr(statistics, "PERMUTATIONS", 199)
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    rng = np.random.default_rng(5)

    def values() -> Any:
        # What two policies share of an item is in both.
        return (
            rng.integers(0, 2, 40).astype(float)
            if draw == "shares"
            else rng.normal(size=40) + shared
        )

    found = []
    for _ in range(200):
        shared = rng.normal(size=40)
        [own], _ = differences([subject("a", values()), subject("b", values())], [ACCURACY])
        found.append(own.p)
    assert 0 < sum(p <= 0.05 for p in found) <= 18
    assert max(found) > 0.9


def test_a_true_difference_is_found():
    rng = np.random.default_rng(1)
    base = rng.normal(size=80)
    near = base + rng.normal(size=80) * 0.3 + 0.3
    [found], _ = differences([subject("a", base), subject("b", near)], [ACCURACY])
    assert found.p < 0.001
    assert found.interval[0] > 0


def test_with_three_policies_p_is_corrected():
    """Holm: the least p times 3, the next times 2, and never less than the one before."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5]) == [0.5]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    rng = np.random.default_rng(2)
    three = [subject(name, rng.normal(size=30)) for name in "abc"]
    found, _ = differences(three, [ACCURACY])
    assert [(own.a, own.b) for own in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [own.p for own in found] == holm([own.p_alone for own in found])
    assert [own.p for own in found] != [own.p_alone for own in found]


def test_one_prompt_is_no_comparison():
    found, notes = differences([subject("a", [1]), subject("b", [0])], [ACCURACY])
    assert found == []
    assert notes == [f"Not compared: {ACCURACY}. Fewer than two prompts have it in all policies."]
    with pytest.raises(UserError, match="there is nothing to compare"):
        compare([subject("a", [1]), subject("b", [0])])


# Who may be compared ----------------------------------------------------------------------------


def refusal(*subjects: Subject) -> str:
    with pytest.raises(UserError) as caught:
        check_comparable(subjects)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "a", "b", "said"),
    [
        ("data__max_length", 128, 256, "data.max_length is 128 in a and 256 in b"),
        ("data__truncation", "drop", "prompt", "data.truncation is drop in a and prompt in b"),
        ("data__chat_template", None, "t.jinja", "data.chat_template is null in a and t.jinja"),
        ("data__template_date", "2026-01-01", "2026-01-02", "data.template_date is 2026-01-01"),
    ],
)
def test_another_template_or_limit_is_refused_by_name(key: str, a: Any, b: Any, said: str):
    one, other = subject("a", [1, 0], **{key: a}), subject("b", [1, 0], **{key: b})
    assert said in refusal(one, other)
    check_comparable([one, one])


def test_longest_answers_matter_where_there_are_answers():
    key = "evaluation__max_new_tokens"
    one, other = (subject(x, [1, 0], metric=KL, **{key: n}) for x, n in (("a", 64), ("b", 32)))
    assert "evaluation.max_new_tokens is 64 in a and 32 in b" in refusal(one, other)
    check_comparable([subject("a", [1, 0], **{key: 64}), subject("b", [1, 0], **{key: 32})])


def test_other_rows_are_refused_with_the_settings_that_made_them():
    one = subject("a", [1, 0, 1], data__eval="x.jsonl", data__split_seed=0)
    other = subject("b", [1, 0], data__eval="y.jsonl", data__split_seed=0)
    assert refusal(one, other) == (
        "runs/a and runs/b are not compared: their held-out rows differ: 3 and 2, of which 2 "
        "are the same (data.eval is x.jsonl in a and y.jsonl in b); data.eval=<file or hub id> "
        "evaluates both on the same rows"
    )
    # Each pair of several is looked at.
    assert "runs/b" in refusal(subject("a", [1, 0, 1]), subject("c", [1, 1, 1]), other)


def with_metrics(label: str, beta: float | None, **settings: Any) -> Subject:
    names = (ACCURACY, "eval/fitted_log_loss", LOSS, "eval/logratios/margins", KL)
    own = subject(label, [1, 0], beta=beta, **settings)
    return Subject(
        label, own.name, beta, dict.fromkeys(names, own.items[ACCURACY]), own.rows, own.settings
    )


def test_metrics_that_scale_with_beta_are_left_out_and_said():
    one, other = with_metrics("a", 0.1), with_metrics("b", 0.5)
    metrics, notes = metrics_to_compare([one, other])
    assert metrics == [ACCURACY, "eval/fitted_log_loss", KL]
    assert notes == [
        f"Not compared: {LOSS}, eval/logratios/margins. They scale with β, which is 0.1, 0.5."
    ]
    assert metrics_to_compare([one, one])[0] == list(one.items)
    unknown, notes = metrics_to_compare([one, with_metrics("b", None)])
    assert LOSS not in unknown
    assert "which is 0.1, unknown." in notes[0]


def test_other_losses_and_references_are_left_out_and_said():
    one = with_metrics("a", 0.1, loss={"name": "sigmoid"})
    metrics, notes = metrics_to_compare([one, with_metrics("b", 0.1, loss={"name": "ipo"})])
    assert LOSS not in metrics
    assert "eval/logratios/margins" in metrics
    assert notes == [f"Not compared: {LOSS}. The losses differ."]
    other = with_metrics("b", 0.1, loss={"name": "sigmoid"}, reference__pretrained="r")
    metrics, notes = metrics_to_compare([one, other])
    assert metrics == [ACCURACY]
    assert "against the reference, and the references differ" in notes[0]


def test_labels_tell_policies_apart():
    assert labels_of(["runs/a", "runs/b/"]) == ["a", "b"]
    assert labels_of(["x/a", "y/a", "y/a"]) == ["x/a", "y/a", "y/a (2)"]


# Read and shown ---------------------------------------------------------------------------------


def finished(folder: Path, accuracies: list[float], **evaluation: Any) -> Path:
    """The folder of a run that has finished, as far as a comparison reads it."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_text("")
    (folder / "config.yaml").write_text("beta: 0.5\ndata:\n  max_length: 8\nloss: {name: ipo}\n")
    (folder / "result.json").write_text(json.dumps({"beta": 0.5, "metrics": {"x": 1}}))
    groups = [f"p{n}-g" for n in range(len(accuracies))]
    content = {"accuracies": accuracies, "groups": groups} | evaluation
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def row(prompt: str, kl: float, score: float | None = None) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "preferred": "good",
        "policy": f"<b>{prompt}</b> {kl}",
        "kl": kl,
        "score": score,
        "reference_score": 1.0,
    }


def test_a_run_has_its_values_in_its_folder(tmp_path):
    samples = [row("q", 1.0, 2.0), row("r", 2.0, 1.0), row("q", 3.0, 0.0)]
    opened = open_named(str(finished(tmp_path / "a", [1.0, 0.5], samples=samples)))
    found = recorded(opened, "a")
    assert found is not None
    assert found.items[ACCURACY] == {("p0-g", 0): 1.0, ("p1-g", 0): 0.5}
    assert found.items[KL] == {("q", 0): 1.0, ("r", 0): 2.0, ("q", 1): 3.0}
    assert list(found.items["samples/win_rate"].values()) == [1.0, 0.5, 0.0]
    assert (found.beta, found.settings["data.max_length"]) == (0.5, 8)
    assert found.settings["loss.name"] == "ipo"
    # What is not whole is computed again.
    (tmp_path / "a" / "evaluation.json").write_text('{"accuracies": [1], "groups": ["a", "b"]}')
    assert recorded(opened, "a") is None


def test_answers_without_a_judge_have_no_score():
    assert {*sample_items([row("q", 1.0), row("r", math.nan)])} == {KL}


def test_the_page_has_all_in_itself_and_no_text_is_markup(tmp_path):
    samples = [row("q", 1.0), row("r & <i>s</i>", 2.0)]
    names = [str(finished(tmp_path / x, [1.0, 0.0, 1.0], samples=samples)) for x in ("a", "b<x>")]
    labels = labels_of(names)
    subjects = [recorded(open_named(n), x) for n, x in zip(names, labels, strict=True)]
    found = compare([own for own in subjects if own is not None])
    page = comparison_page(found, [own for own in subjects if own is not None])
    assert "&lt;b&gt;q&lt;/b&gt; 1.0" in page
    assert "r &amp; &lt;i&gt;s&lt;/i&gt;" in page
    assert "b&lt;x&gt;" in page
    assert not re.search(r"<(b|i|x|script|link rel=.stylesheet)>", page)
    assert "http" not in page.replace("http-equiv", "")
    for own in found["differences"]:
        assert f">{own['metric']}<" in page
    assert {own["p"] for own in found["differences"]} == {1.0}
    assert [own["label"] for own in found["runs"]] == labels
