"""Signs of a failed training: hand-made numbers on both sides of every threshold."""

import math
from dataclasses import replace
from typing import Any

import pytest

from dpo_lightning.evaluation import signs
from dpo_lightning.evaluation.signs import LIMITS, Facts, Sign, find_signs, repetition


def facts(**values: Any) -> Facts:
    return replace(Facts(metrics={}), **values)


def names(found: list[Sign]) -> list[str]:
    return [sign.name for sign in found]


FALLEN = {"eval/logratios/chosen": -5.0, "eval/logratios/rejected": -9.0}
SAME = [("a", "a")] * 4
LOOP = "and then he said " * 10
PLAIN = " ".join(f"word{i}" for i in range(40))


def easy(first: int, rows: int, accuracy: float) -> list[tuple[int, float]]:
    """Half of the pairs up to a step, then so many rows with that accuracy."""
    return [
        *((step, 0.5) for step in range(1, first)),
        *((first + i, accuracy) for i in range(rows)),
    ]


def pairs(longer: int, shorter: int, *, right_longer: float, right_shorter: float) -> Any:
    """Pairs whose better answer is longer or shorter, and the policy's accuracy on each kind."""
    return [(20, 10, right_longer)] * longer + [(10, 20, right_shorter)] * shorter


# On each line a run that has the sign, and its nearest neighbour that does not.
CASES: list[tuple[str, Facts, Facts]] = [
    (
        "hardly_moved",
        facts(metrics={"samples/kl": 0.0199}, steps=3, greedy=SAME),
        facts(metrics={"samples/kl": 0.02}, steps=3, greedy=SAME),
    ),
    (
        "hardly_moved",  # no answer was asked for
        facts(metrics={"eval/logratios/margins": -0.019}, steps=3),
        facts(metrics={"eval/logratios/margins": -0.021}, steps=3),
    ),
    (
        "hardly_moved",
        facts(metrics={"samples/kl": 0.001}, steps=3, greedy=SAME),
        facts(metrics={"samples/kl": 0.001}, steps=3, greedy=[*SAME, ("a", "b")]),
    ),
    (
        "hardly_moved",
        facts(metrics={"samples/kl": 0.001}, steps=1),
        facts(metrics={"samples/kl": 0.001}, steps=0),
    ),
    (
        "never_ends",  # 0.95 x 64 = 60.8
        facts(metrics={"samples/length": 60.8}, longest=64, preferred_tokens=32.0),
        facts(metrics={"samples/length": 60.7}, longest=64, preferred_tokens=32.0),
    ),
    (
        "never_ends",  # what is preferred is as long itself
        facts(metrics={"samples/length": 64.0}, longest=64, preferred_tokens=32.0),
        facts(metrics={"samples/length": 64.0}, longest=64, preferred_tokens=32.1),
    ),
    (
        "repeats_itself",  # 1 of 4, and 1 of 5
        facts(answers=[LOOP, PLAIN, PLAIN, PLAIN]),
        facts(answers=[LOOP, PLAIN, PLAIN, PLAIN, PLAIN]),
    ),
    (
        "repeats_itself",  # the data do it half as often, and more often than that
        facts(answers=[LOOP, PLAIN], preferred=[LOOP, PLAIN, PLAIN, PLAIN]),
        facts(answers=[LOOP, PLAIN], preferred=[LOOP, PLAIN, PLAIN]),
    ),
    (
        "both_fall",  # 5 nats of 10 tokens are 0.5 a token
        facts(
            metrics={"eval/logratios/chosen": -5.0, "eval/logratios/rejected": -9.0},
            preferred_tokens=10.0,
        ),
        facts(
            metrics={"eval/logratios/chosen": -5.0, "eval/logratios/rejected": -9.0},
            preferred_tokens=10.1,
        ),
    ),
    (
        "both_fall",  # 0.7 is 2 and more errors above one half
        facts(
            metrics={**FALLEN, "samples/win_rate": 0.7, "samples/win_rate_stderr": 0.1},
            preferred_tokens=5.0,
        ),
        facts(
            metrics={**FALLEN, "samples/win_rate": 0.7, "samples/win_rate_stderr": 0.099},
            preferred_tokens=5.0,
        ),
    ),
    (
        "both_fall",
        facts(
            metrics={
                **FALLEN,
                "controlled/expected_reward": 1.5,
                "controlled/reference_reward": 1.5,
            },
            preferred_tokens=5.0,
        ),
        facts(
            metrics={
                **FALLEN,
                "controlled/expected_reward": 1.6,
                "controlled/reference_reward": 1.5,
            },
            preferred_tokens=5.0,
        ),
    ),
    (
        "both_fall",
        facts(
            metrics={"eval/logratios/chosen": -5.0, "eval/logratios/rejected": -9.0},
            preferred_tokens=5.0,
        ),
        facts(
            metrics={"eval/logratios/chosen": -4.9, "eval/logratios/rejected": -9.0},
            preferred_tokens=5.0,
        ),
    ),
    (
        "both_fall",
        facts(
            metrics={"eval/logratios/chosen": -50.0, "eval/logratios/rejected": -5.0},
            preferred_tokens=50.0,
        ),
        facts(
            metrics={"eval/logratios/chosen": -50.0, "eval/logratios/rejected": -4.9},
            preferred_tokens=50.0,
        ),
    ),
    ("too_easy", facts(accuracies=easy(20, 5, 0.99)), facts(accuracies=easy(21, 5, 0.99))),
    ("too_easy", facts(accuracies=easy(3, 5, 1.0)), facts(accuracies=easy(3, 4, 1.0))),
    ("too_easy", facts(accuracies=easy(3, 5, 0.99)), facts(accuracies=easy(3, 5, 0.98))),
    (
        # Agreement (48 x 0.9 + 2 x 0.5) / 50 = 0.884, and with 0.85 it is 0.836.
        "follows_length",
        facts(pairs=pairs(48, 2, right_longer=0.9, right_shorter=0.5)),
        facts(pairs=pairs(48, 2, right_longer=0.85, right_shorter=0.5)),
    ),
    (
        # Agreement 0.92 and 0.88 with lengths that are right in 30 of 50.
        # Accuracy (30 x 1 + 20 x 0.125) / 50 = 0.65 is 0.05 above 0.6; with 0.15 it is 0.06.
        "follows_length",
        facts(pairs=pairs(30, 20, right_longer=1.0, right_shorter=0.1249)),
        facts(pairs=pairs(30, 20, right_longer=1.0, right_shorter=0.15)),
    ),
    (
        "follows_length",
        facts(pairs=pairs(50, 0, right_longer=1.0, right_shorter=0.0)),
        facts(pairs=pairs(49, 0, right_longer=1.0, right_shorter=0.0)),
    ),
    (
        "follows_length",  # the shorter one
        facts(pairs=pairs(0, 50, right_longer=0.0, right_shorter=1.0)),
        facts(pairs=pairs(25, 25, right_longer=1.0, right_shorter=1.0)),
    ),
]


@pytest.mark.parametrize(("name", "failed", "sound"), CASES)
def test_a_sign_is_found_from_its_threshold_on(name: str, failed: Facts, sound: Facts) -> None:
    assert names(find_signs(failed)) == [name]
    assert find_signs(sound) == []


def test_every_threshold_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the table, put out of reach, silences a sign of the cases, and has its reason."""
    for limit in LIMITS:
        assert len(LIMITS[limit].reason) > 20
        for value in (math.inf, -math.inf):
            with monkeypatch.context() as patch:
                patch.setitem(signs.LIMITS, limit, replace(LIMITS[limit], value=value))
                if any(names(find_signs(failed)) != [name] for name, failed, _ in CASES):
                    break
        else:
            raise AssertionError(f"{limit} changes nothing")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_sign_says_its_numbers_and_a_key(case: tuple[str, Facts, Facts]) -> None:
    [sign] = find_signs(case[1])
    assert sign.entry() == {"name": sign.name, "values": sign.values, "says": sign.says}
    assert all(math.isfinite(value) for value in sign.values.values())
    assert "\n" not in sign.says
    assert any(character.isdigit() for character in sign.says)
    assert any(key in sign.says for key in ("optimizer.lr", "beta", "data.train", "loss="))


def test_a_run_without_measurements_has_no_sign() -> None:
    assert find_signs(facts()) == []
    assert find_signs(facts(steps=5, longest=64, preferred_tokens=3.0, answers=["short"])) == []


def test_repetition_by_hand() -> None:
    """Ten times four words: 37 runs of four, of which 4 are different."""
    assert repetition(LOOP) == pytest.approx(1 - 4 / 37)
    assert repetition(PLAIN) == 0.0
    assert repetition("word " * 19) is None
    assert repetition("word " * 20) == pytest.approx(1 - 1 / 17)


def test_the_correlation_with_length_by_hand() -> None:
    """Preferring by length is 1; half of the pairs each way is 0."""
    [sign] = find_signs(facts(pairs=pairs(50, 0, right_longer=1.0, right_shorter=0.0)))
    assert sign.values["correlation"] == pytest.approx(1.0)
    assert sign.values["length_accuracy"] == 1.0
    assert "the longer answer in 100% of the pairs, and that alone is right in 100%" in sign.says
    [sign] = find_signs(facts(pairs=pairs(0, 50, right_longer=0.0, right_shorter=1.0)))
    assert sign.values["correlation"] == pytest.approx(-1.0)
    assert "the shorter answer" in sign.says
