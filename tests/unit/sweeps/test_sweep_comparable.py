"""Trials that may be ranked together, and the origin of their KL."""

import json

import pytest

from dpo_lightning.sweeps.report.analysis import analyse
from dpo_lightning.sweeps.report.read import read_sweep
from dpo_lightning.sweeps.report.write import write_report
from tests.support.sweep_folders import scored, scored_metrics, write_trial

ACCURACY = "eval/rewards/accuracies"
BASIS = {
    "model": ["a/b", None], "reference": [None, None, None], "data.train": ["x.jsonl"],
    "data.eval": None, "held_out": "00", "judge": None,
}  # fmt: skip


def based(sweep, name: str, accuracy: float, *, drawn: dict | None = None, **changes):
    """A trial that recorded what its numbers are of."""
    folder = write_trial(
        sweep, name, f"beta={accuracy}", metrics={ACCURACY: accuracy, "samples/kl": 1.0},
        evaluation={"kl": drawn} if drawn else None,
    )  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"basis": BASIS | changes}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": ["c/d", None]}, ["model a/b", "model c/d"]),
        ({"data.train": ["y.jsonl"]}, ["data.train x.jsonl", "data.train y.jsonl"]),
        ({"data.eval": ["e.jsonl"]}, ["data.eval none", "data.eval e.jsonl"]),
        ({"held_out": "01"}, ["held-out rows 00", "held-out rows 01"]),
        ({"judge": "polite"}, ["judge none", "judge polite"]),
        ({"reference": ["r", None, None]}, ["reference none", "reference r"]),
    ],
)
def test_what_differs_in_model_rows_or_judge_is_never_ranked_together(tmp_path, change, said):
    for i, accuracy in enumerate((0.6, 0.7, 0.8)):
        based(tmp_path, f"a{i}", accuracy)
    based(tmp_path, "other", 0.9, **change)
    found = analyse(read_sweep(tmp_path))
    assert [len(found.configurations), *(len(o.configurations) for o in found.others)] == [3, 1]
    assert [found.of, found.others[0].of] == said
    report = write_report(tmp_path)
    assert report["pick"] is None
    assert report["reason"].startswith("2 rankings, of trials that cannot be compared.")
    assert [part["of"] for part in report["rankings"]] == said
    assert [part["pick"] for part in report["rankings"]] == ["β 0.8", "β 0.9"]
    assert len(report["configurations"]) == 4
    for name in ("report.html", "report.md"):
        assert f"Ranked by itself: {said[1]}" in (tmp_path / name).read_text().replace("\\", "")


def test_trials_of_one_kind_are_one_ranking(tmp_path):
    for i, accuracy in enumerate((0.6, 0.7)):
        based(tmp_path, f"a{i}", accuracy)
    found = analyse(read_sweep(tmp_path))
    assert (len(found.configurations), found.others, found.of) == (2, (), "")


def drawn(limit: int, answers: int = 64) -> dict:
    return {
        "direction": "policy || reference", "per_answer": 1.0, "per_token": 0.1,
        "answers": answers, "temperature": 1.0, "max_new_tokens": limit, "cut_off": 0.25,
    }  # fmt: skip


def test_kls_of_other_answers_share_no_axis_and_carry_their_origin(tmp_path):
    """Two at 64 tokens, one at 128; one that drew nothing goes with the most."""
    based(tmp_path, "a", 0.6, drawn=drawn(64))
    based(tmp_path, "b", 0.7, drawn=drawn(64))
    based(tmp_path, "c", 0.8, drawn=drawn(128))
    based(tmp_path, "d", 0.9)
    found = analyse(read_sweep(tmp_path))
    assert sorted(c.label for c in found.configurations) == ["β 0.6", "β 0.7", "β 0.9"]
    assert found.others[0].of == "answers 64 of at most 128 tokens at temperature 1.0"
    report = write_report(tmp_path)
    origins = {c["label"]: c["kl_origin"] for c in report["configurations"]}
    assert origins["β 0.8"] == {
        "direction": "policy || reference", "answers": 64, "temperature": 1.0,
        "max_new_tokens": 128, "per_token": 0.1, "cut_off": None,
    }  # fmt: skip
    assert origins["β 0.9"] is None
    said = (tmp_path / "report.md").read_text().replace("\\", "")
    assert "KL(policy || reference) on 64 answers at temperature 1, of at most 64 tokens" in said
    assert "| KL per token |" in said


def test_older_trials_are_told_apart_by_what_was_typed(tmp_path):
    """Other rows, and another judge; the seed and the folder make no difference."""
    for name, words, judge in (
        ("a", "data.train=x.jsonl seed=1", None), ("b", "data.train=x.jsonl seed=2", None),
        ("c", "data.train=y.jsonl", None), ("d", "data.train=x.jsonl", "s"),
    ):  # fmt: skip
        evaluation = scored([1.0, 2.0], [0.0] * 2, [1.0] * 2) | {"judge": judge}
        write_trial(
            tmp_path, name, f"beta={ord(name)}", metrics=scored_metrics(evaluation),
            evaluation=evaluation, command=f"python train.py {words} hydra.run.dir={name}",
        )  # fmt: skip
    found = analyse(read_sweep(tmp_path))
    sizes = [len(part.configurations) for part in (found, *found.others)]
    assert sizes == [2, 1, 1]


def test_a_trial_without_a_result_goes_with_those_of_its_settings(tmp_path):
    based(tmp_path, "a", 0.6)
    based(tmp_path, "b", 0.7, judge="s")
    write_trial(tmp_path, "c", "beta=0.7", "seed=2", status="failed")
    found = analyse(read_sweep(tmp_path))
    assert [[c.unfinished for c in part.configurations] for part in (found, *found.others)] == [
        [0], [1],
    ]  # fmt: skip
