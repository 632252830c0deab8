"""Steps on single responses, number by number: z0 of KTO, the running mean of BCO, evaluations."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_lightning.data.evaluations import HeldOut
from dpo_lightning.data.tokens import Mismatched
from dpo_lightning.evaluation.rungs import held_out as measure_of
from dpo_lightning.objectives.objective import ObjectiveSettings
from tests.support.batches import relative
from tests.support.models import make_model
from tests.support.ranks import on_ranks
from tests.support.steps import (
    ids,
    in_turn,
    pair,
    plain_logps,
    single,
    take_steps,
    with_logratios,
    with_mismatched,
)

BETA = 0.5
KTO, BCO = (ObjectiveSettings(terms={name: 1.0}) for name in ("kto", "bco"))
WEIGHTED = ObjectiveSettings(
    terms={"kto": 1.0}, options={"desirable_weight": 2.0, "undesirable_weight": 0.5}
)
# Log-ratios of the responses, their labels, weights; of a pair the chosen one's comes first.
ROWS = [((0.5,), True, 1.0), ((-1.0,), False, 3.0), ((0.8, -0.4), None, 1.0)]
MISMATCHED = [1.4, -0.3, 0.1]
Z0 = 0.4  # their mean


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def groups(mismatched: list[float] | None = MISMATCHED):
    """A desirable response, an undesirable one of weight 3, and a pair."""
    model = make_model("llama")
    found = []
    for number, (ratios, label, weight) in enumerate(ROWS):
        own = (
            pair(number, weight=weight)
            if label is None
            else single(number, desirable=label, weight=weight)
        )
        own = with_logratios(model, own, *ratios)
        if mismatched is not None:
            other = ids(50 + number, 60, 2)
            own = with_mismatched(model, own, other, mismatched[number])
        found.append(own)
    return found


def plain_gradients(objective: ObjectiveSettings, anchor: float) -> list[torch.Tensor]:
    """Of sum of w * loss over the examples / sum of w, the anchor held, by plain forward passes."""
    model = make_model("llama")
    total, weights = torch.zeros(()), 0.0
    for group in groups():
        labels = [group.label] if group.label is not None else [True, False]
        ratios = torch.stack(plain_logps(model, group)) - torch.from_numpy(group.reference_logps)
        for ratio, label in zip(ratios, labels, strict=True):
            lead = BETA * (ratio - anchor) * (1 if label else -1)
            loss = -torch.log(torch.sigmoid(lead)) if "bco" in objective.terms else None
            loss = 1 - torch.sigmoid(lead) if loss is None else loss
            kind = "desirable_weight" if label else "undesirable_weight"
            total = total + group.weight * objective.options.get(kind, 1.0) * loss
            weights += group.weight
    (total / weights).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("micro_batch_tokens", [1000, 1])
@pytest.mark.parametrize("objective", [KTO, WEIGHTED], ids=["plain", "weighted"])
def test_a_step_of_kto_has_the_gradient_of_a_plain_loop(
    tmp_path, objective: ObjectiveSettings, micro_batch_tokens: int
):
    """z0 is that of the whole step, in whatever micro-batches; AdamW's moments are 0.1 g.

    Against 0.4 with weights 1, 3, 1, 1, whose sum is 6:
    sigmoid(-0.05), sigmoid(-0.7), sigmoid(-0.2), sigmoid(-0.4).
    """
    taken = take_steps(
        tmp_path,
        groups(),
        objective=objective,
        beta=BETA,
        batch_size=3,
        lr=1e-12,
        micro_batch_tokens=micro_batch_tokens,
    )
    [row] = [row for row in taken.rows if "train/loss" in row]
    good, bad = (objective.options.get(f"{k}desirable_weight", 1.0) for k in ("", "un"))
    each = [good * sigmoid(-0.05), bad * 3 * sigmoid(-0.7), good * sigmoid(-0.2)]
    expected = (sum(each) + bad * sigmoid(-0.4)) / 6
    assert row["train/loss"] == pytest.approx(expected, rel=1e-4)
    assert row["train/kto/z0"] == pytest.approx(Z0, rel=1e-4)
    assert row["train/logratios/desirable"] == pytest.approx((0.5 + 0.8) / 2, rel=1e-4)
    assert row["train/rewards/undesirable"] == pytest.approx(BETA * (-1.0 - 0.4) / 2, rel=1e-4)
    assert not any("accuracies" in name or "margins" in name for name in row)
    gradients = plain_gradients(objective, Z0)
    ordered = [g for g in gradients if g.ndim >= 2] + [g for g in gradients if g.ndim < 2]
    for moment, gradient in zip(taken.moments["exp_avg"], ordered, strict=True):
        assert relative(moment, 0.1 * gradient) < 1e-4


def test_a_mean_below_0_counts_as_0(tmp_path):
    taken = take_steps(
        tmp_path, groups([-2.0, 0.5, 0.3]), objective=KTO, beta=BETA, batch_size=3, lr=1e-12
    )
    assert taken.values("train/kto/z0") == [0.0]


def test_without_mismatched_responses_the_point_is_0(tmp_path):
    taken = take_steps(tmp_path, groups(None), objective=KTO, beta=BETA, batch_size=3, lr=1e-12)
    expected = (sigmoid(-0.25) + 3 * sigmoid(-0.5) + sigmoid(-0.4) + sigmoid(-0.2)) / 6
    assert taken.values("train/loss") == pytest.approx([expected], rel=1e-4)
    assert taken.values("train/kto/z0") == [0.0]


def test_a_row_of_several_steps_has_their_mean(tmp_path):
    """Of steps with one group each, z0 is 1.4, 0 (of -0.3) and 0.1."""
    taken = take_steps(
        tmp_path, in_turn(*groups()), objective=KTO, beta=BETA, steps=3, lr=1e-12,
        log_every_n_steps=3,
    )  # fmt: skip
    assert taken.values("train/kto/z0") == pytest.approx([1.4, 0.5 * (0.0 + 0.1)], rel=1e-3)


class Loop:
    """A float32 loop of BCO: one group a step, AdamW, delta the mean of what came before."""

    def __init__(self, rate: float) -> None:
        self.model = make_model("llama")
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW([*matrices, *vectors], lr=rate, weight_decay=0.0)
        self.rewards: list[float] = []
        self.losses: list[float] = []
        self.deltas: list[float] = []

    def step(self, group) -> None:
        delta = float(np.mean(self.rewards)) if self.rewards else 0.0
        ratios = torch.stack(plain_logps(self.model, group)) - torch.from_numpy(
            group.reference_logps
        )
        labels = [group.label] if group.label is not None else [True, False]
        signs = torch.tensor([1.0 if label else -1.0 for label in labels])
        loss = -torch.nn.functional.logsigmoid(signs * (BETA * ratios - delta)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.deltas.append(delta)
        self.rewards += (BETA * ratios).tolist()


def test_bco_is_a_plain_loop(tmp_path):
    """Six steps over two passes: losses and shifts, and the weights at the end."""
    rows = in_turn(*groups(None))
    taken = take_steps(tmp_path, rows, objective=BCO, beta=BETA, steps=3, lr=1e-2, weight_decay=0.0)
    loop = Loop(1e-2)
    for group in groups(None):
        loop.step(group)
    assert taken.values("train/loss") == pytest.approx(loop.losses, rel=1e-5)
    assert taken.values("train/bco/delta") == pytest.approx(loop.deltas, rel=1e-4, abs=1e-6)
    assert loop.deltas[2] != 0
    for own, other in zip(taken.module.policy.parameters(), loop.model.parameters(), strict=True):
        assert relative(own, other) < 1e-4
    assert int(taken.module.logratio_count) == 4


def test_a_running_mean_is_of_a_checkpoint(tmp_path):
    """A step from a checkpoint has the shift of the steps before it."""
    rows = in_turn(*groups(None))
    common = {"objective": BCO, "beta": BETA, "lr": 1e-2}
    whole = take_steps(tmp_path / "whole", rows, steps=3, **common)
    first = take_steps(tmp_path / "first", rows, steps=2, **common)
    first.trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = take_steps(
        tmp_path / "again", rows, steps=3, checkpoint=tmp_path / "two.ckpt", **common
    )
    assert again.values("train/bco/delta")[-1] == whole.values("train/bco/delta")[-1]
    assert again.values("train/loss")[-1] == whole.values("train/loss")[-1]
    assert torch.equal(again.module.logratio_average, whole.module.logratio_average)


# Evaluations --------------------------------------------------------------------------------------


def held_out():
    """Five groups, of which the first three are those of above."""
    model = make_model("llama")
    more = [
        with_logratios(model, single(7, desirable=True), -0.2),
        with_logratios(model, single(8, desirable=False), 0.6),
    ]
    mismatched = [with_mismatched(model, own, ids(70, 2), 0.9) for own in more]
    return [*groups(), *mismatched]


@pytest.mark.parametrize("micro_batch_tokens", [1000, 1])
def test_an_evaluation_has_the_point_of_its_own_rows(tmp_path, micro_batch_tokens: int):
    """Of the two sets z0 is 0.4 and 0.9: sigmoid(0.5 (0.9 + 0.2)), sigmoid(0.5 (0.6 - 0.9))."""
    taken = take_steps(
        tmp_path,
        groups(),
        eval_groups=held_out(),
        held_out=HeldOut((3, 2), ("a", "b")),
        objective=KTO,
        beta=BETA,
        lr=1e-12,
        micro_batch_tokens=micro_batch_tokens,
    )
    [row] = [row for row in taken.rows if "eval/loss" in row]
    first = (sigmoid(-0.05) + 3 * sigmoid(-0.7) + sigmoid(-0.2) + sigmoid(-0.4)) / 6
    assert row["eval/loss"] == row["eval/a/loss"] == pytest.approx(first, rel=1e-4)
    assert row["eval/b/loss"] == pytest.approx((sigmoid(0.55) + sigmoid(-0.15)) / 2, rel=1e-4)
    assert row["eval/kto/z0"] == pytest.approx(0.4, rel=1e-4)
    assert row["eval/b/kto/z0"] == pytest.approx(0.9, rel=1e-4)
    assert row["eval/logratios/separation"] == pytest.approx(0.65 + 0.7, rel=1e-4)
    # Desirable ones are all above undesirable ones: the entropy of two and two.
    assert row["eval/label_gain"] == pytest.approx(math.log(2), abs=1e-3)
    assert row["eval/b/label_gain"] == pytest.approx(0, abs=1e-6)


def test_an_evaluation_on_the_way_is_of_the_sample(tmp_path):
    """Of the sample, groups 0 and 4, z0 is (1.4 + 0.9) / 2; at the end all are seen."""
    taken = take_steps(
        tmp_path,
        in_turn(*groups()),
        eval_groups=held_out(),
        eval_every=1,
        held_out=HeldOut((5,), sample=(0, 4)),
        objective=KTO,
        beta=BETA,
        lr=1e-12,
        steps=2,
    )
    assert taken.values("eval/kto/z0") == pytest.approx([1.15, 3.0 / 5], rel=1e-3)
    assert taken.module.sample_metrics["eval/kto/z0"] == pytest.approx(1.15, rel=1e-3)


def test_a_rung_has_a_gain_for_each_group(tmp_path):
    """All four labels of the first set are told apart, so each gains about ln 2."""
    taken = take_steps(
        tmp_path, groups(), eval_groups=held_out()[:3], objective=KTO, beta=BETA, lr=1e-12
    )
    measure = measure_of("eval/label_gain", held_out()[:3], SimpleNamespace(received=0))
    with torch.no_grad():
        values = measure(taken.trainer, taken.module)
    assert values == pytest.approx([math.log(2)] * 3, abs=5e-3)


# On two ranks -------------------------------------------------------------------------------------


def numbers(taken) -> dict:
    names = ("train/loss", "train/grad_norm", "train/logps/desirable", "eval/loss")
    names += ("eval/label_gain", "eval/logratios/separation", taken_anchor(taken))
    return {
        "weights": {name: weight.numpy() for name, weight in taken.weights.items()},
        "metrics": {name: taken.values(name) for name in names},
    }


def taken_anchor(taken) -> str:
    return "train/kto/z0" if taken.module.objective.anchor == "mismatched" else "train/bco/delta"


def many():
    """Seven groups for steps of four and of three, with mismatched responses."""
    model = make_model("llama")
    ratios = [0.7, -0.5, 0.2, 1.0, -0.1, 0.4, -0.9]
    found = []
    for number, ratio in enumerate(ratios):
        own = single(number, desirable=number % 3 > 0, weight=1.0 + number % 2)
        if number == 4:
            own = with_logratios(model, pair(number), ratio, 0.3)
        else:
            own = with_logratios(model, own, ratio)
        found.append(with_mismatched(model, own, ids(40 + number, 2), 0.1 * number))
    return found


COMMON = {"steps": 2, "batch_size": 4, "beta": BETA, "lr": 1e-3}


def _on_two(rank: int, folder, name: str, how: dict) -> dict:
    objective = ObjectiveSettings(terms={name: 1.0})
    return numbers(
        take_steps(
            folder / "run", many(), eval_groups=held_out(), ranks=2, objective=objective,
            **COMMON, **how,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("kto", {}, marks=pytest.mark.slow),
        pytest.param("bco", {"micro_batch_tokens": 10}, marks=pytest.mark.slow),
        # Three mismatched responses in micro-batches of one: a rank measures one of them in vain.
        ("kto", {"micro_batch_tokens": 5, "equal_counts": True}),
    ],
    ids=["kto", "bco in micro-batches", "kto with fillers"],
)
def test_two_ranks_equal_one_process(tmp_path, name: str, how: dict):
    one, other = on_ranks(_on_two, tmp_path, tmp_path, name, how)
    objective = ObjectiveSettings(terms={name: 1.0})
    alone = numbers(
        take_steps(tmp_path / "one", many(), eval_groups=held_out(), objective=objective, **COMMON)
    )
    for metric, values in alone["metrics"].items():
        assert one["metrics"][metric] == pytest.approx(values, rel=1e-5, abs=1e-7), metric
    for key, weight in alone["weights"].items():
        np.testing.assert_array_equal(one["weights"][key], other["weights"][key])
        np.testing.assert_allclose(one["weights"][key], weight, rtol=1e-4, atol=1e-5)


def test_a_live_reference_counts_no_rows_for_them(tmp_path):
    """Rows of the reference are of groups; mismatched responses are none."""
    from dpo_lightning.models.scoring import Scorer
    from dpo_lightning.reference.kinds import LiveReference

    scorer = Scorer("flat")
    model = make_model("llama", seed=3)
    scorer.prepare(model)
    reference = LiveReference(model, scorer)
    bare = [
        replace(own, reference_logps=None, mismatched=Mismatched(own.mismatched.ids))
        for own in groups()
    ]
    taken = take_steps(
        tmp_path, bare, reference=reference, objective=KTO, beta=BETA, batch_size=3, lr=1e-12
    )
    assert (reference.rows, reference.computed) == (3, 3)
    own, other = make_model("llama"), make_model("llama", seed=3)
    ratios = [
        (plain_logps(own, alone)[0] - plain_logps(other, alone)[0]).item()
        for alone in (replace(g, responses=(g.mismatched.ids,), ranks=(1,)) for g in bare)
    ]
    expected = max(0.0, sum(ratios) / 3)
    assert taken.values("train/kto/z0") == pytest.approx([expected], rel=1e-3, abs=1e-6)
