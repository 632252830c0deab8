"""The losses against those of TRL 1.16.0: its own code is run.

The numbers that it gave are pinned too, `PINNED`, the mean loss of one batch: a new version of TRL
that computes something else is seen as such.
TRL's code runs here without its models: `_compute_loss` of an object that has the settings of a
trainer, and of a "model" that returns given log-probabilities of tokens. It computes in float64 but
for the alpha divergence, which it knows in half and single precision alone.

The same definition: sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot,
aot_unpaired, apo_zero, apo_down, discopop and sigmoid_norm, each f-divergence of those on the
margin, ld_alpha and wpo; simpo, and the preference part of cpo and orpo, from its experimental
trainers.

Another definition, or nothing to compare with:

- sft: TRL averages over all tokens of a batch, so long responses weigh more and a response's share
  depends on the others. Here a response counts once: the mean of its tokens, then over responses.
  The two are the same for chosen responses of one length.
- cpo's likelihood: likewise over all tokens of a batch. The preference part is the same.
- orpo's likelihood: over the prompt and the response, and over all tokens of a batch. The odds
  ratio is the same.
- kto_pair: TRL has no such loss any more. Its KTO estimates one reference point from responses of
  other prompts; here each half of the batch gives the other its own. With one given reference
  point for both, the formula is the same.
- sigmoid, robust and exo_pair: TRL has label smoothing for robust, exo_pair and AOT, where it is
  the same; in `sigmoid` of its DPO it is ignored, in that of its CPO it is what it is here.
- exo_pair: TRL takes the logarithms of the label smoothing in float32.
- the alpha divergence: TRL's exp is constant beyond 80 nats and has no gradient there, here it goes
  on as a line from 25. Its forward KL overflows. Below that they are the same.
- discopop: TRL's is inf * 0 = NaN from -89 nats (float32) on; here it is finite.
- slic, ipo_sum, odpo: TRL has them under other names, if at all. CPO's `hinge` is slic for beta and
  delta 1; its `ipo` without a reference is on logps per token, as `ipo` is here.
"""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dpo_lightning.objectives import PAIRWISE_LOSSES, pairwise_loss
from dpo_lightning.objectives.comparison import Tokens
from dpo_lightning.objectives.objective import ObjectiveSettings
from tests.support.compared import compare_tensors

# Log-probabilities of the tokens of four pairs of responses, of unequal lengths.
CHOSEN = [
    [-0.5, -1.25, -0.25, -2.0],
    [-3.0, -0.75],
    [-0.125, -0.5, -4.5, -1.0, -0.25, -0.625],
    [-2.25, -1.7, -0.375],
]
REJECTED = [
    [-1.0, -2.5, -0.75],
    [-0.5, -1.75, -2.0, -0.25, -1.125],
    [-5.0, -0.25],
    [-0.875, -3.25, -1.5, -0.5],
]
REFERENCE_CHOSEN = [
    [-0.75, -1.5, -0.5, -1.75],
    [-2.0, -1.25],
    [-0.25, -0.75, -3.0, -1.5, -0.5, -0.25],
    [-3.0, -1.0, -1.25],
]
REFERENCE_REJECTED = [
    [-0.5, -2.0, -1.0],
    [-1.0, -1.5, -1.25, -0.5, -0.875],
    [-3.5, -0.625],
    [-1.125, -3.5, -0.25, -0.75],
]
PROMPT = 3
LENGTHS = [[len(row) for row in side] for side in (CHOSEN, REJECTED)]

BETA = 0.3
SMOOTHED = {"label_smoothing": 0.2}

# Each comparison: the loss, its options, and what is composed over it.
CASES = {
    "sigmoid": ("sigmoid", {}, {}),
    "hinge": ("hinge", {}, {}),
    "ipo": ("ipo", {}, {}),
    "exo_pair": ("exo_pair", {}, {}),
    "exo_pair-smoothed": ("exo_pair", SMOOTHED, {}),
    "nca_pair": ("nca_pair", {}, {}),
    "robust": ("robust", {}, {}),
    "robust-smoothed": ("robust", SMOOTHED, {}),
    "bco_pair": ("bco_pair", {}, {}),
    "sppo_hard": ("sppo_hard", {}, {}),
    "aot": ("aot", {}, {}),
    "aot-smoothed": ("aot", SMOOTHED, {}),
    "aot_unpaired": ("aot_unpaired", {}, {}),
    "aot_unpaired-smoothed": ("aot_unpaired", SMOOTHED, {}),
    "apo_zero": ("apo_zero", {}, {}),
    "apo_down": ("apo_down", {}, {}),
    "discopop": ("discopop", {}, {}),
    "discopop-tau": ("discopop", {"discopop_tau": 0.5}, {}),
    "sigmoid_norm": ("sigmoid_norm", {}, {}),
}
DIVERGENCES = {
    "forward_kl": {"f_divergence": "forward_kl"},
    "js": {"f_divergence": "js_divergence"},
    "alpha_0.5": {"f_divergence": "alpha_divergence", "f_alpha": 0.5},
    "alpha_2": {"f_divergence": "alpha_divergence", "f_alpha": 2.0},
    "alpha_1": {"f_divergence": "alpha_divergence", "f_alpha": 1.0},
}
ON_MARGIN = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
CASES |= {
    f"{name}-{label}": (name, SMOOTHED if name in ("exo_pair", "robust") else {}, divergence)
    for name in ON_MARGIN
    for label, divergence in DIVERGENCES.items()
}
BY_TOKEN = ("sigmoid", "ipo", "apo_down", "sigmoid_norm", "aot")
CASES |= {f"{name}-ld": (name, {}, {"ld_alpha": 0.25}) for name in BY_TOKEN}
CASES |= {f"{name}-wpo": (name, {}, {"wpo": True}) for name in BY_TOKEN if name != "aot"}
CASES |= {"sigmoid-ld-wpo-js": ("sigmoid", {}, {"ld_alpha": 0.25, "wpo": True} | DIVERGENCES["js"])}

SAME = {name for name, _, _ in CASES.values()}
# Compared by a test of its own below, or with nothing to be compared with.
OTHERWISE = {"sft", "cpo", "orpo", "simpo", "kto_pair", "slic", "ipo_sum", "odpo"}

# The mean loss of the batch, as TRL 1.16.0 computed it with torch 2.13.0 on a CPU.
PINNED = {
    "sigmoid": 0.589204666925,
    "hinge": 0.77125,
    "ipo": 2.00016059028,
    "exo_pair": 2.38122923445,
    "exo_pair-smoothed": 0.155101212999,
    "nca_pair": 1.34044368594,
    "robust": 0.589204666925,
    "robust-smoothed": 0.512954666925,
    "bco_pair": 1.28382820596,
    "sppo_hard": 4.07545138889,
    "aot": 0.589204666925,
    "aot-smoothed": 0.634954666925,
    "aot_unpaired": 0.587813402074,
    "aot_unpaired-smoothed": 0.633563402074,
    "apo_zero": 0.943155996106,
    "apo_down": 0.946720202672,
    "discopop": 0.763788093581,
    "discopop-tau": 0.717220617585,
    "sigmoid_norm": 0.653577703544,
    "sigmoid-forward_kl": 0.566774062589,
    "sigmoid-js": 0.636779149159,
    "sigmoid-alpha_0.5": 0.5817607,
    "sigmoid-alpha_2": 0.58578157,
    "sigmoid-alpha_1": 0.589204666925,
    "hinge-forward_kl": 0.720559296938,
    "hinge-js": 0.882088110126,
    "hinge-alpha_0.5": 0.75541413,
    "hinge-alpha_2": 0.75704449,
    "hinge-alpha_1": 0.77125,
    "ipo-forward_kl": 1.81347512898,
    "ipo-js": 2.32638894067,
    "ipo-alpha_0.5": 1.9268836,
    "ipo-alpha_2": 2.0209546,
    "ipo-alpha_1": 2.00016059028,
    "exo_pair-forward_kl": 0.140676835045,
    "exo_pair-js": 0.184969933345,
    "exo_pair-alpha_0.5": 0.15009725,
    "exo_pair-alpha_2": 0.15438224,
    "exo_pair-alpha_1": 0.155101212999,
    "robust-forward_kl": 0.473627161568,
    "robust-js": 0.597475185868,
    "robust-alpha_0.5": 0.5002321,
    "robust-alpha_2": 0.50479639,
    "robust-alpha_1": 0.512954666925,
    "discopop-forward_kl": 0.729346758473,
    "discopop-js": 0.840148789929,
    "discopop-alpha_0.5": 0.75436187,
    "discopop-alpha_2": 0.7463361,
    "discopop-alpha_1": 0.763788093581,
    "sigmoid_norm-forward_kl": 0.640291654002,
    "sigmoid_norm-js": 0.671450034101,
    "sigmoid_norm-alpha_0.5": 0.64881641,
    "sigmoid_norm-alpha_2": 0.65438545,
    "sigmoid_norm-alpha_1": 0.653577703544,
    "sigmoid-ld": 0.572216141292,
    "ipo-ld": 1.9659491645,
    "apo_down-ld": 0.954198950064,
    "sigmoid_norm-ld": 0.649763942108,
    "aot-ld": 0.571134015714,
    "sigmoid-wpo": 0.352957692049,
    "ipo-wpo": 1.21330852046,
    "apo_down-wpo": 0.57276202294,
    "sigmoid_norm-wpo": 0.395119929214,
    "sigmoid-ld-wpo-js": 0.378076959042,
}


def test_every_loss_is_compared_or_is_said_to_differ():
    built_in = {
        name
        for name, entry in PAIRWISE_LOSSES.items()
        if entry.fn.__module__ == "dpo_lightning.objectives.losses"
    }
    assert built_in == SAME | OTHERWISE
    assert not SAME & OTHERWISE
    assert set(ON_MARGIN) == {n for n in SAME if PAIRWISE_LOSSES[n].on_margin}
    assert set(PINNED) == set(CASES)


def dtype_of(composed):
    """TRL looks up where to clamp by type, and float64 is none that it knows."""
    alpha = composed.get("f_divergence") == "alpha_divergence" and composed["f_alpha"] != 1.0
    return torch.float32 if alpha else torch.float64


def flat(*sides, dtype=torch.float64):
    return torch.tensor([value for side in sides for row in side for value in row], dtype=dtype)


def collisions(logps):
    """Log of the summed squared probabilities of all tokens: made up, at least that of this one."""
    return logps * 0.75 - 0.125


def ours(name, options, composed):
    """The mean over the batch, and its gradient with respect to each response's log-probability."""
    dtype = dtype_of(composed)
    tokens, reference = flat(CHOSEN, REJECTED), flat(REFERENCE_CHOSEN, REFERENCE_REJECTED)
    tokens, reference = tokens.to(dtype).requires_grad_(), reference.to(dtype)
    lengths = torch.tensor(LENGTHS[0] + LENGTHS[1])
    response = torch.arange(8).repeat_interleave(lengths)
    places = torch.arange(4)
    # A group's responses are neighbours: the chosen and then the rejected one of each pair.
    order = torch.stack([places, places + 4], 1).flatten()
    by_group = torch.cat([(response == i).nonzero()[:, 0] for i in order])
    sums = torch.zeros(8, dtype=dtype)
    policy = sums.index_add(0, response, tokens)[order]
    objective = ObjectiveSettings(terms={name: 1.0}, options=options, **composed)
    assert list(objective.problems()) == []
    compared = compare_tensors(
        objective,
        policy_logps=policy,
        reference_logps=sums.index_add(0, response, reference)[order],
        lengths=lengths[order],
        group=places.repeat_interleave(2),
        rank=torch.tensor([1, 2]).repeat(4),
        weight=torch.ones(4),
        chosen=places * 2,
        rejected=places * 2 + 1,
        beta=BETA,
        tokens=Tokens(
            policy_logps=tokens[by_group],
            reference_logps=reference[by_group],
            collisions=collisions(tokens.detach())[by_group] if objective.wpo else None,
            response=torch.arange(8).repeat_interleave(lengths[order]),
        )
        if objective.needs_tokens
        else None,
    )
    loss = compared.loss / 4
    loss.backward()
    assert tokens.grad is not None
    return loss.item(), tokens.grad


class Given(torch.nn.Module):
    """A "model" that returns given log-probabilities of tokens, (B, T) behind the prompt."""

    is_gradient_checkpointing = False

    def __init__(self, logps):
        super().__init__()
        self.logps = logps

    def forward(self, **inputs):
        zeros = torch.zeros_like(self.logps)
        return SimpleNamespace(
            log_probs=self.logps,
            log_sum_sq_probs=collisions(self.logps.detach()),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def padded(tokens):
    """Log-probabilities (8, places) as TRL shifts them: 0 in the prompt and behind a response."""
    widest = max(max(side) for side in LENGTHS)
    lengths = LENGTHS[0] + LENGTHS[1]
    rows = []
    for part in tokens.split(lengths):
        front, back = tokens.new_zeros(PROMPT - 1), tokens.new_zeros(widest - len(part))
        rows.append(torch.cat([front, part, back]))
    return torch.stack(rows)


def trls(name, options, composed):
    """Loss and gradients by TRL's own code."""
    from trl.trainer.dpo_trainer import DPOTrainer

    dtype = dtype_of(composed)
    tokens = flat(CHOSEN, REJECTED, dtype=dtype).requires_grad_()
    policy = Given(padded(tokens))
    reference = Given(padded(flat(REFERENCE_CHOSEN, REFERENCE_REJECTED, dtype=dtype)))
    mask = torch.cat([torch.zeros(8, PROMPT), padded(torch.ones(len(tokens)))[:, PROMPT - 1 :]], 1)
    trainer = SimpleNamespace(
        model=policy,
        ref_model=reference,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x
        ),
        args=SimpleNamespace(
            gradient_checkpointing_kwargs=None,
            discopop_tau=options.get("discopop_tau", 0.05),
        ),
        aux_loss_enabled=False,
        ld_alpha=composed.get("ld_alpha"),
        precompute_ref_logps=False,
        f_divergence_type=composed.get("f_divergence", "reverse_kl"),
        f_alpha_divergence_coef=composed.get("f_alpha", 0.5),
        loss_types=[name],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=options.get(
            "label_smoothing", PAIRWISE_LOSSES[name].options.get("label_smoothing", 0.0)
        ),
        use_weighting=composed.get("wpo", False),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones(mask.shape, dtype=torch.long),
        "attention_mask": torch.ones(mask.shape, dtype=torch.long),
        "completion_mask": mask.long(),
    }
    loss = DPOTrainer._compute_loss(trainer, policy, inputs, False)
    loss.backward()
    assert tokens.grad is not None
    return loss.item(), tokens.grad


def tolerance(name, composed):
    # TRL's logarithms of the label smoothing are float32.
    return 2e-6 if dtype_of(composed) == torch.float32 else 1e-6 if name == "exo_pair" else 1e-12


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_that_trl_gave(case):
    name, options, composed = CASES[case]
    value, _ = ours(name, options, composed)
    assert value == pytest.approx(PINNED[case], rel=max(tolerance(name, composed), 1e-9))


@pytest.mark.parametrize("case", CASES)
def test_trls_own_code(case):
    """The mean of the batch, and the gradient that each token gets of it."""
    name, options, composed = CASES[case]
    value, slopes = ours(name, options, composed)
    theirs, their_slopes = trls(name, options, composed)
    rel = tolerance(name, composed)
    assert value == pytest.approx(theirs, rel=rel)
    assert theirs == pytest.approx(PINNED[case], rel=max(rel, 1e-9))
    torch.testing.assert_close(slopes, their_slopes, rtol=10 * rel, atol=rel)


def ours_of(name, chosen, rejected, lengths, **options):
    """Arguments without a reference; each is a list over pairs."""
    return pairwise_loss(
        name,
        policy_chosen_logps=torch.tensor(chosen, dtype=torch.float64),
        policy_rejected_logps=torch.tensor(rejected, dtype=torch.float64),
        reference_chosen_logps=None,
        reference_rejected_logps=None,
        chosen_lengths=torch.tensor(lengths[0]),
        rejected_lengths=torch.tensor(lengths[1]),
        **options,
    )


CHOSEN_LOGPS = [sum(row) for row in CHOSEN]
REJECTED_LOGPS = [sum(row) for row in REJECTED]
CHOSEN_MEANS = [sum(row) / len(row) for row in CHOSEN]
REJECTED_MEANS = [sum(row) / len(row) for row in REJECTED]

# Of each pair, from TRL 1.16.0: `CPOTrainer.cpo_loss` and `ORPOTrainer.odds_ratio_loss`, the
# latter in float32 and with its sign.
PINNED_PAIRS = {
    "simpo": [0.652348318392, 2.35020655892, 0.108458671008, 1.01875389398],
    "cpo": [0.671350140827, 0.563437281595, 0.884711754673, 0.567162736271],
    "sigmoid": [0.671350140827, 0.563437281595, 0.884711754673, 0.567162736271],
    "slic": [0.75, 0, 2.75, 0],
    "hinge": [0.925, 0.4375, 1.525, 0.46],
    "ipo": [1.5625, 5.84027777778, 0.0434027777778, 2.48719184028],
    "orpo": [0.13150361, 0.38874373, 0.047791049, 0.19107895],
}
# TRL's setting of loss_type, beta, label smoothing; whether it is given logps per token.
EXPERIMENTAL = {
    "simpo": ("simpo", 2.0, 0.0, True),
    "cpo": ("sigmoid", 0.3, 0.2, False),
    "sigmoid": ("sigmoid", 0.3, 0.2, False),
    "slic": ("hinge", 1.0, 0.0, False),
    "hinge": ("hinge", 0.3, 0.0, False),
    "ipo": ("ipo", 0.3, 0.0, True),
}


def ours_without_reference(name):
    _, beta, smoothing, _ = EXPERIMENTAL[name]
    options = {"label_smoothing": smoothing} if smoothing else {}
    if name == "cpo":
        options["cpo_alpha"] = 0.0
    if name == "simpo":
        options["gamma"] = 0.75
    return ours_of(name, CHOSEN_LOGPS, REJECTED_LOGPS, LENGTHS, beta=beta, **options)


@pytest.mark.parametrize("name", EXPERIMENTAL)
def test_the_numbers_of_trls_cpo(name):
    """SimPO, CPO without its likelihood, SLiC; DPO, its hinge and IPO without a reference."""
    assert ours_without_reference(name).tolist() == pytest.approx(PINNED_PAIRS[name], rel=1e-9)


def cpo_of_trl(name):
    from trl.experimental.cpo import CPOTrainer

    kind, beta, smoothing, per_token = EXPERIMENTAL[name]
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type=kind,
        beta=beta,
        label_smoothing=smoothing,
        simpo_gamma=0.75,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    sides = (CHOSEN_MEANS, REJECTED_MEANS) if per_token else (CHOSEN_LOGPS, REJECTED_LOGPS)
    sides = (torch.tensor(side, dtype=torch.float64) for side in sides)
    return CPOTrainer.cpo_loss(trainer, *sides)[0]


@pytest.mark.parametrize("name", EXPERIMENTAL)
def test_trls_own_cpo(name):
    torch.testing.assert_close(
        cpo_of_trl(name), ours_without_reference(name), rtol=1e-12, atol=1e-12
    )


def odds_of_ours():
    values = ours_of("orpo", CHOSEN_LOGPS, REJECTED_LOGPS, LENGTHS, beta=0.3)
    return values + torch.tensor(CHOSEN_MEANS, dtype=torch.float64)


def test_the_numbers_of_trls_orpo():
    assert odds_of_ours().tolist() == pytest.approx(PINNED_PAIRS["orpo"], rel=1e-6)


def orpo_of_trl():
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device=torch.device("cpu")))
    sides = (torch.tensor(side, dtype=torch.float64) for side in (CHOSEN_MEANS, REJECTED_MEANS))
    return -ORPOTrainer.odds_ratio_loss(trainer, *sides)[0]


def test_trls_own_orpo():
    torch.testing.assert_close(orpo_of_trl().double(), odds_of_ours(), rtol=1e-6, atol=1e-7)


# What is not the same -----------------------------------------------------------------------------


def test_sft_weighs_responses_where_trl_weighs_tokens():
    """Sums -4, -3.75, -7, -4.325 on 4, 2, 6, 3 tokens.

    Ours (1 + 1.875 + 1.166667 + 1.441667) / 4 = 5.483333 / 4 = 1.370833; TRL's 19.075 / 15 =
    1.271667.
    """
    value, _ = ours("sft", {}, {})
    assert value == pytest.approx(1.370833, abs=1e-6)
    assert abs(value - 1.271667) > 0.09


def test_sft_of_trl_is_the_mean_over_tokens():
    value, _ = trls("sft", {}, {})
    assert value == pytest.approx(1.271667, abs=1e-6)
    one_length = ours_of("sft", CHOSEN_LOGPS[:1], REJECTED_LOGPS[:1], [[4], [3]], beta=1.0)
    assert one_length.item() == -sum(CHOSEN[0]) / 4


def test_kto_is_trls_formula_with_one_reference_point():
    """1 - sigmoid(beta (s+ - z)) and 1 - sigmoid(beta (z - s-)), their mean, with z given.

    Scores whose means are both 0 have z = 0 on both sides, which TRL has for a batch whose
    estimate is not above 0.
    """
    chosen, rejected = [2.0, -2.0], [-1.0, 1.0]
    values = pairwise_loss(
        "kto_pair",
        policy_chosen_logps=torch.tensor(chosen) - 9,
        policy_rejected_logps=torch.tensor(rejected) - 9,
        reference_chosen_logps=torch.full((2,), -9.0),
        reference_rejected_logps=torch.full((2,), -9.0),
        chosen_lengths=torch.ones(2),
        rejected_lengths=torch.ones(2),
        beta=BETA,
    )

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    expected = [
        (1 - sigmoid(BETA * c) + 1 - sigmoid(-BETA * r)) / 2
        for c, r in zip(chosen, rejected, strict=True)
    ]
    assert values.tolist() == pytest.approx(expected, rel=1e-6)


def test_sigmoid_smooths_where_trls_does_not():
    """The one option of a loss of the same name that means something here and nothing there."""
    plain, _ = ours("sigmoid", {}, {})
    smoothed, _ = ours("sigmoid", SMOOTHED, {})
    assert plain == pytest.approx(PINNED["sigmoid"], rel=1e-9)
    assert abs(smoothed - plain) > 1e-3
