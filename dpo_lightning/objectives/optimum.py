"""Objectives by the optimum that they lead to: where a policy's beta means what it says.

Imports no torch.
"""

from __future__ import annotations

from dpo_lightning.objectives.objective import ObjectiveSettings

MOST_LAMBDA = 100.0
"""Beyond it mixed logits are all but the choice of one token."""

# Their population loss is lowest at pi_ref exp(r / beta) / Z, where labels follow Bradley-Terry or
# Plackett-Luce with the reward r.
_OF_REWARDS = ("sigmoid", "robust", "softmax", "plackett_luce")
# It is so for r the probability of winning against the reference (Theorem 1 of the paper).
_OF_WINS = ("ipo_sum",)


def why_no_beta(objective: ObjectiveSettings, *, changes: bool) -> str | None:
    """A clause on why a policy between reference and optimum is not the optimum of another beta.

    Only of pi_ref exp(r / beta) / Z is the power lam, over pi_ref, the optimum of beta / lam.

    Args:
        objective: The losses.
        changes: True if beta was not the same in every step.

    Returns:
        None where it is.
    """
    if changes:
        return "beta changed over the run"
    if objective.f_divergence != "reverse_kl":
        return f"loss.f_divergence={objective.f_divergence} has an optimum of another form"
    for key, value, plain in (
        ("ld_alpha", objective.ld_alpha, 1.0),
        ("wpo", objective.wpo, False),
        ("rpo_alpha", objective.rpo_alpha, 0.0),
    ):
        if value != plain:
            return f"loss.{key}={str(value).lower()} moves the optimum"
    names = [name for name, weight in objective.terms.items() if weight]
    if len(names) == 1 and names[0] in _OF_WINS:
        return None
    for name in names:
        if name not in _OF_REWARDS:
            return f"the optimum of loss={name} is not π_ref·exp(r/β)/Z"
        if name == "sigmoid" and objective.own_options(name)["label_smoothing"]:
            return "loss.label_smoothing moves the optimum of loss=sigmoid"
    return None
