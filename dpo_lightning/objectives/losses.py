"""The losses on pairs: a chosen and a rejected response to one prompt, one small function each.

All of them see responses only through their log-probabilities, so the intractable Z(x) of the
closed-form optimum never appears: it is the same for both responses and cancels in the margin.

Settings are checked against the signatures below before torch is imported, so nothing here imports
it at the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from dpo_lightning.objectives.registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[
    float,
    {"least": 0, "below": 0.5, "help": "Share of labels that are taken to be wrong."},
]
"""A share of labels that are taken to be wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogps:
    """Inputs of a pairwise loss. Tensors are (B,), floating, at least float32.

    The reference's logps are both None when there is no reference. The rejected side may be None
    for a loss that does not use it.

    Attributes:
        policy_chosen_logps: Log-probabilities of the chosen responses under the policy.
        policy_rejected_logps: Of the rejected ones.
        reference_chosen_logps: The same under the reference.
        reference_rejected_logps: Of the rejected ones.
        chosen_lengths: Tokens of the chosen responses.
        rejected_lengths: Of the rejected ones.
        target_margin: Lead that the reward of the chosen one is to have, or None for 0.
        link: Takes log-ratios to scores, for an f-divergence other than the reverse KL.

    Example:
        One pair of margin 2, as a loss is called with it:

        >>> import torch
        >>> pairs = PairLogps(
        ...     policy_chosen_logps=torch.tensor([-4.0]),  # (B,)
        ...     policy_rejected_logps=torch.tensor([-9.0]),
        ...     reference_chosen_logps=torch.tensor([-5.0]),
        ...     reference_rejected_logps=torch.tensor([-8.0]),
        ...     chosen_lengths=torch.tensor([3]),
        ...     rejected_lengths=torch.tensor([4]),
        ... )
        >>> pairs.margin()  # (B,)
        tensor([2.])
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor | None
    reference_chosen_logps: Tensor | None
    reference_rejected_logps: Tensor | None
    chosen_lengths: Tensor
    rejected_lengths: Tensor | None
    target_margin: Tensor | None = None
    link: Callable[[Tensor], Tensor] | None = None

    def chosen_scores(self) -> Tensor:
        """The chosen logratios behind the link, (B,); plain logps without a reference."""
        if self.reference_chosen_logps is None:
            return self.policy_chosen_logps
        logratios = self.policy_chosen_logps - self.reference_chosen_logps
        return logratios if self.link is None else self.link(logratios)

    def rejected_scores(self) -> Tensor:
        """The rejected logratios behind the link, (B,); plain logps without a reference."""
        assert self.policy_rejected_logps is not None
        if self.reference_rejected_logps is None:
            return self.policy_rejected_logps
        logratios = self.policy_rejected_logps - self.reference_rejected_logps
        return logratios if self.link is None else self.link(logratios)

    def margin(self) -> Tensor:
        """The chosen score minus the rejected one, (B,).

        The logratios come first: policy and reference are close, so each of these differences is
        exact or nearly so, while chosen minus rejected of long responses would round.
        """
        return self.chosen_scores() - self.rejected_scores()

    def mean_margin(self) -> Tensor:
        """The margin of scores per token: each divided by its response's length, (B,)."""
        assert self.rejected_lengths is not None
        chosen = self.chosen_scores() / self.chosen_lengths
        return chosen - self.rejected_scores() / self.rejected_lengths

    def nll(self) -> Tensor:
        """Negative log-likelihood of the chosen responses per token, (B,)."""
        return -self.policy_chosen_logps / self.chosen_lengths


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), finite wherever x is."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends."""
    near = x > -math.log(2)
    # Each branch sees only arguments that it can take, so that no gradient is NaN.
    small = (-x.where(near, x.new_full((), -1.0)).expm1()).log()
    large = (-x.where(~near, x.new_full((), -1.0)).exp()).log1p()
    return small.where(near, large)


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of a label that is wrong with probability `label_smoothing`."""
    return -(1 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)


# Losses on the margin --------------------------------------------------------------------------


@register_loss("sigmoid", paper="https://arxiv.org/abs/2305.18290", on_margin=True)
def _sigmoid(pairs: PairLogps, *, beta: float, label_smoothing: Share = 0.0) -> Tensor:
    """DPO, Eq. 7: -log sigmoid(beta * margin).

    With label smoothing e it is the conservative form: each label is wrong with probability e
    (https://ericmitchell.ai/cdpo.pdf, Eq. 3). Without a reference it is -log(exp(beta * lp+) / Z)
    with Z = exp(beta * lp+) + exp(beta * lp-), the normaliser over the two responses; dividing
    both terms by the numerator's gives the same sigmoid, on the difference of the plain logps.
    """
    return _smoothed(beta * pairs.margin(), label_smoothing)


@register_loss("hinge", paper="https://arxiv.org/abs/2309.06657", on_margin=True)
def _hinge(pairs: PairLogps, *, beta: float) -> Tensor:
    """The hinge of RSO: max(0, 1 - beta * margin)."""
    return (1 - beta * pairs.margin()).relu()


@register_loss("ipo", paper="https://arxiv.org/abs/2310.12036", on_margin=True)
def _ipo(pairs: PairLogps, *, beta: float) -> Tensor:
    """IPO, Eq. 17, on scores per token, as its authors confirmed: (mean margin - 1/(2 beta))^2."""
    return (pairs.mean_margin() - 1 / (2 * beta)).square()


@register_loss("ipo_sum", paper="https://arxiv.org/abs/2310.12036", on_margin=True)
def _ipo_sum(pairs: PairLogps, *, beta: float) -> Tensor:
    """IPO, Eq. 17, on summed scores, as in the original repository: (margin - 1/(2 beta))^2."""
    return (pairs.margin() - 1 / (2 * beta)).square()


@register_loss("robust", paper="https://arxiv.org/abs/2403.00409", on_margin=True)
def _robust(pairs: PairLogps, *, beta: float, label_smoothing: Share = 0.0) -> Tensor:
    """Robust DPO: unbiased where a share e of the labels is flipped.

    ((1 - e) * loss - e * loss of the flipped label) / (1 - 2 e); not bounded below.
    """
    logits = beta * pairs.margin()
    kept = -(1 - label_smoothing) * log_sigmoid(logits)
    flipped = -label_smoothing * log_sigmoid(-logits)
    return (kept - flipped) / (1 - 2 * label_smoothing)


@register_loss("exo_pair", paper="https://arxiv.org/abs/2402.00856", on_margin=True)
def _exo_pair(
    pairs: PairLogps,
    *,
    beta: float,
    label_smoothing: Annotated[
        float, {"above": 0, "below": 0.5, "help": "Share of labels that are taken to be wrong."}
    ] = 1e-3,
) -> Tensor:
    """EXO, Eq. 16 with K = 2: KL of the policy's choice from the smoothed label, reverse of DPO's.

    q = sigmoid(beta * margin): q log(q / (1 - e)) + (1 - q) log((1 - q) / e).
    """
    logits = beta * pairs.margin()
    right = logits.sigmoid() * (log_sigmoid(logits) - math.log1p(-label_smoothing))
    wrong = (-logits).sigmoid() * (log_sigmoid(-logits) - math.log(label_smoothing))
    return right + wrong


@register_loss("discopop", paper="https://arxiv.org/abs/2406.08414", on_margin=True)
def _discopop(
    pairs: PairLogps,
    *,
    beta: float,
    discopop_tau: Annotated[
        float,
        {"above": 0, "below": 1, "help": "Temperature of the margin that mixes the two losses."},
    ] = 0.05,
) -> Tensor:
    """DiscoPOP, Eq. 5: logistic and exponential loss, mixed by sigmoid(beta * margin / tau).

    exp(-x) * sigmoid(x / tau) is computed as one exponential: apart they are inf * 0.
    Not monotone: its slope at 0 is (1 - ln 2) / (4 tau) - 3/4, above 0 for tau below 0.1.
    """
    logits = beta * pairs.margin()
    logistic = -log_sigmoid(logits) * (-logits / discopop_tau).sigmoid()
    return logistic + (log_sigmoid(logits / discopop_tau) - logits).exp()


@register_loss("sigmoid_norm", paper="https://arxiv.org/abs/2411.15124", on_margin=True)
def _sigmoid_norm(pairs: PairLogps, *, beta: float) -> Tensor:
    """Length-normalised DPO (Tulu 3, Eq. 6): -log sigmoid(beta * margin of scores per token)."""
    return -log_sigmoid(beta * pairs.mean_margin())


@register_loss("odpo", paper="https://arxiv.org/abs/2402.10571", on_margin=True)
def _odpo(pairs: PairLogps, *, beta: float) -> Tensor:
    """DPO with an offset: -log sigmoid(beta * margin - target margin of the row)."""
    offset = 0.0 if pairs.target_margin is None else pairs.target_margin
    return -log_sigmoid(beta * pairs.margin() - offset)


# Losses on each response's own distance from the reference --------------------------------------


@register_loss("nca_pair", paper="https://arxiv.org/abs/2402.05369", reference="needed")
def _nca_pair(pairs: PairLogps, *, beta: float) -> Tensor:
    """NCA with K = 2: the chosen reward up, both a little down."""
    chosen, rejected = beta * pairs.chosen_scores(), beta * pairs.rejected_scores()
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


@register_loss("bco_pair", paper="https://arxiv.org/abs/2404.04656", reference="needed")
def _bco_pair(pairs: PairLogps, *, beta: float) -> Tensor:
    """BCO on pairs, without the running reward shift (0 here)."""
    chosen, rejected = beta * pairs.chosen_scores(), beta * pairs.rejected_scores()
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


@register_loss("sppo_hard", paper="https://arxiv.org/abs/2405.00675", reference="needed")
def _sppo_hard(pairs: PairLogps, *, beta: float) -> Tensor:
    """SPPO, Eq. 4.7 with hard labels: (s+ - 1/(2 beta))^2 + (s- + 1/(2 beta))^2."""
    half = 0.5 / beta
    return (pairs.chosen_scores() - half).square() + (pairs.rejected_scores() + half).square()


@register_loss("apo_zero", paper="https://arxiv.org/abs/2408.06266", reference="needed")
def _apo_zero(pairs: PairLogps, *, beta: float) -> Tensor:
    """APO-zero, Eq. 7: chosen up and rejected down; for chosen better than the model's answers."""
    return (-beta * pairs.chosen_scores()).sigmoid() + (beta * pairs.rejected_scores()).sigmoid()


@register_loss("apo_down", paper="https://arxiv.org/abs/2408.06266", reference="needed")
def _apo_down(pairs: PairLogps, *, beta: float) -> Tensor:
    """APO-down, Eq. 8: both down, rejected more; for chosen worse than the model's answers."""
    return (beta * pairs.chosen_scores()).sigmoid() + (-beta * pairs.margin()).sigmoid()


# Losses over all pairs of a batch ---------------------------------------------------------------


@register_loss(
    "kto_pair", paper="https://arxiv.org/abs/2402.01306", reference="needed", couples=True
)
def _kto_pair(pairs: PairLogps, *, beta: float) -> Tensor:
    """KTO, Eq. 7, on pairs: each half of the batch gives the other one its reference point.

    The mean of 1 - sigmoid(beta * (s+ - z-)) and 1 - sigmoid(beta * (z+ - s-)), z the mean score of
    a half, at least 0. On pairs the gradient goes through z too, as in the trainers that have this
    form; KTO itself, on single responses, holds z fixed.
    """
    chosen, rejected = pairs.chosen_scores(), pairs.rejected_scores()
    of_chosen, of_rejected = (s.mean().clamp(min=0) for s in (chosen, rejected))
    above = (beta * (of_rejected - chosen)).sigmoid()
    return 0.5 * (above + (beta * (rejected - of_chosen)).sigmoid())


@register_loss("aot", paper="https://arxiv.org/abs/2406.05882", couples=True)
def _aot(pairs: PairLogps, *, beta: float, label_smoothing: Share = 0.0) -> Tensor:
    """AOT on pairs: quantiles of the policy's margins over those of the reference's."""
    assert pairs.policy_rejected_logps is not None
    policy = pairs.policy_chosen_logps - pairs.policy_rejected_logps
    if pairs.reference_chosen_logps is None or pairs.reference_rejected_logps is None:
        reference = policy.new_zeros(()).expand_as(policy)
    else:
        reference = pairs.reference_chosen_logps - pairs.reference_rejected_logps
    margins, order = policy.sort()
    losses = _smoothed(beta * (margins - reference.sort().values), label_smoothing)
    # Each loss goes back to the pair whose policy margin is in it.
    return losses[order.argsort()]


@register_loss("aot_unpaired", paper="https://arxiv.org/abs/2406.05882", couples=True)
def _aot_unpaired(pairs: PairLogps, *, beta: float, label_smoothing: Share = 0.0) -> Tensor:
    """AOT without pairing: quantiles of the chosen scores over the rejected ones'."""
    chosen, order = pairs.chosen_scores().sort()
    margins = chosen - pairs.rejected_scores().sort().values
    return _smoothed(beta * margins, label_smoothing)[order.argsort()]


# Losses without a reference -----------------------------------------------------------------------


@register_loss(
    "sft",
    paper="maximum likelihood of the best response: where a reference comes from",
    reference="unused",
    uses_rejected=False,
)
def _sft(pairs: PairLogps, *, beta: float) -> Tensor:
    """Negative log-likelihood per token of the chosen response; no beta."""
    del beta
    return pairs.nll()


@register_loss("simpo", paper="https://arxiv.org/abs/2405.14734", reference="unused")
def _simpo(
    pairs: PairLogps,
    *,
    beta: float,
    gamma: Annotated[
        float, {"least": 0, "help": "Reward margin that a chosen response should be ahead by."}
    ] = 0.5,
) -> Tensor:
    """SimPO, Eq. 6: -log sigmoid(beta * (lp+/|y+| - lp-/|y-|) - gamma)."""
    return -log_sigmoid(beta * _without_reference(pairs).mean_margin() - gamma)


@register_loss("orpo", paper="https://arxiv.org/abs/2403.07691", reference="unused")
def _orpo(pairs: PairLogps, *, beta: float) -> Tensor:
    """ORPO, Eq. 6: likelihood of the chosen one plus beta (its lambda) times the odds-ratio loss.

    The odds of a response are those of its mean probability per token, p = exp(lp / |y|).
    """
    assert pairs.policy_rejected_logps is not None
    assert pairs.rejected_lengths is not None
    # A response of probability 1 has infinite odds.
    chosen = (pairs.policy_chosen_logps / pairs.chosen_lengths).clamp(max=-1e-6)
    rejected = (pairs.policy_rejected_logps / pairs.rejected_lengths).clamp(max=-1e-6)
    log_odds_ratio = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return pairs.nll() - beta * log_sigmoid(log_odds_ratio)


@register_loss("cpo", paper="https://arxiv.org/abs/2401.08417", reference="unused")
def _cpo(
    pairs: PairLogps,
    *,
    beta: float,
    label_smoothing: Share = 0.0,
    cpo_alpha: Annotated[float, {"least": 0, "help": "Weight of the likelihood term."}] = 1.0,
) -> Tensor:
    """CPO: DPO without a reference plus alpha times the likelihood of the chosen one."""
    logits = beta * _without_reference(pairs).margin()
    return _smoothed(logits, label_smoothing) + cpo_alpha * pairs.nll()


@register_loss("slic", paper="https://arxiv.org/abs/2305.10425", reference="unused")
def _slic(
    pairs: PairLogps,
    *,
    beta: float,
    delta: Annotated[
        float, {"above": 0, "help": "Margin of log-probability up to which a pair costs."}
    ] = 1.0,
) -> Tensor:
    """SLiC-HF, Eq. 1 without its regulariser (`rpo_alpha` adds it): max(0, delta - lp+ + lp-).

    No beta: delta is in nats.
    """
    del beta
    return (delta - _without_reference(pairs).margin()).relu()


def _without_reference(pairs: PairLogps) -> PairLogps:
    """Pairs whose scores are plain logps."""
    from dataclasses import replace

    return replace(pairs, reference_chosen_logps=None, reference_rejected_logps=None)
