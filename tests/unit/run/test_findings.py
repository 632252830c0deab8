"""Facts of a run that signs are read off: out of its files, its answers and its pairs."""

from pathlib import Path

import numpy as np

from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.run.findings import gather_facts, training_accuracies


def group(*lengths: int, ranks: tuple[int, ...] = (1, 2)) -> TokenGroup:
    responses = tuple(np.arange(length, dtype=np.int32) for length in lengths)
    return TokenGroup(np.arange(3, dtype=np.int32), responses, ranks, 1.0, "row", "key")


def facts(tmp_path: Path, **values):
    return gather_facts(
        **{
            "metrics": {"samples/kl": 0.5},
            "metrics_file": tmp_path / "metrics.jsonl",
            "steps": 7,
            "learning_rate": 1e-3,
            "greedy": [],
            "samples": [],
            "longest": 64,
            "groups": [],
            "accuracies": [],
        }
        | values
    )


def test_accuracies_are_those_of_the_training_whatever_else_the_file_holds(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert training_accuracies(path) == []
    path.write_bytes(
        b'{"step": 1, "train/rewards/accuracies": 0.5}\n'
        b'{"step": 1, "eval/rewards/accuracies": 0.9}\n'
        b"\xff\xfe\n[1]\n" + b"[" * 100_000 + b"\n"
        b'{"step": 2, "train/rewards/accuracies": null}\n'
        b'{"step": 3, "train/rewards/accuracies": 1}\n{"step": 4, "tra'
    )
    assert training_accuracies(path) == [(1, 0.5), (3, 1.0)]


def test_pairs_are_groups_of_two_that_are_ranked(tmp_path):
    groups = [group(4, 9), group(4, 9, ranks=(1, 1)), group(5, 2, 3, ranks=(1, 2, 3)), group(8, 1)]
    found = facts(tmp_path, groups=groups, accuracies=[1.0, 0.5, 0.7, 0.0])
    assert found.pairs == [(4, 9, 1.0), (8, 1, 0.0)]
    assert found.preferred_tokens == (4 + 4 + 5 + 8) / 4
    assert facts(tmp_path, groups=groups).pairs == []


def test_answers_are_those_of_the_policy(tmp_path):
    samples = [{"policy": "p", "preferred": "q", "reference": "r"}]
    found = facts(tmp_path, samples=samples, greedy=[{"before": "a", "after": "b"}])
    assert (found.answers, found.preferred, found.greedy) == (["p"], ["q"], [("a", "b")])
    assert found.longest == 64
    assert facts(tmp_path).longest is None
