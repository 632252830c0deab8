"""Meaning of each metric for a reader: one sentence, its unit, and what is normal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Meaning:
    """A metric in words.

    Attributes:
        says: One sentence.
        unit: Its unit; empty for none.
        normal: What is normal in a training that goes well; empty where nothing is.
    """

    says: str
    unit: str = ""
    normal: str = ""


_NATS = "nats"

OF_RESPONSES = {
    "loss": Meaning(
        "Mean of the loss over prompts.", "", "ln 2 = 0.693 at step 0 for sigmoid, then less"
    ),
    "rewards/accuracies": Meaning(
        "Share of pairs whose chosen response has the larger reward; a tie counts 0.5.",
        "share",
        "0.5 at step 0, 0.6 to 0.85 on held-out rows; near 1 within a few steps hints at leaks",
    ),
    "rewards/margins": Meaning(
        "Mean of chosen less rejected reward.", "reward", "0 at step 0, then more; grows with β"
    ),
    "rewards/chosen": Meaning(
        "Mean reward of the chosen: β times the log-ratio.",
        "reward",
        "often falls, by less than the rejected",
    ),
    "rewards/rejected": Meaning("Mean reward of the rejected.", "reward", "falls"),
    "logps/chosen": Meaning(
        "Mean log-probability of the chosen under the policy.", _NATS, "often falls a little"
    ),
    "logps/rejected": Meaning(
        "Mean log-probability of the rejected under the policy.", _NATS, "falls"
    ),
    "logratios/chosen": Meaning(
        "Mean log-ratio of policy over reference, of the chosen; free of β.", _NATS, "0 at step 0"
    ),
    "logratios/rejected": Meaning(
        "The same of the rejected.", _NATS, "0 at step 0, then below the chosen's"
    ),
    "logratios/margins": Meaning(
        "Chosen less rejected log-ratio; free of β, so that trials can be compared.",
        _NATS,
        "0 at step 0, then more",
    ),
    "partition/log_z": Meaning(
        "Mean log of the normaliser over the responses of a prompt.",
        _NATS,
        "ln 2 for a pair at step 0",
    ),
    "partition/p_chosen": Meaning(
        "Mean probability of the chosen that this normaliser gives.",
        "share",
        "0.5 at step 0, then more",
    ),
    "rewards/desirable": Meaning(
        "Mean reward of desirable responses: β times the log-ratio.", "reward", "0 at step 0"
    ),
    "rewards/undesirable": Meaning(
        "The same of undesirable ones.", "reward", "0 at step 0, then below the desirable ones'"
    ),
    "logps/desirable": Meaning(
        "Mean log-probability of desirable responses under the policy.", _NATS, ""
    ),
    "logps/undesirable": Meaning("The same of undesirable ones.", _NATS, "falls"),
    "logratios/desirable": Meaning(
        "Mean log-ratio of policy over reference, of desirable responses; free of β.",
        _NATS,
        "0 at step 0",
    ),
    "logratios/undesirable": Meaning(
        "The same of undesirable ones.", _NATS, "0 at step 0, then below the desirable ones'"
    ),
    "logratios/separation": Meaning(
        "Desirable less undesirable log-ratio, a difference of two means; its size goes with 1/β.",
        _NATS,
        "0 at step 0, then more",
    ),
    "kto/z0": Meaning(
        "KTO's reference point: mean log-ratio of responses to other prompts, at least 0.",
        _NATS,
        "0 at step 0; near 0, or slowly rising",
    ),
    "bco/delta": Meaning(
        "BCO's shift: mean reward of all examples of the steps before.", "reward", "0 at step 0"
    ),
    "label_gain": Meaning(
        "Nats that a held-out log-ratio tells about its label, by a logistic that is fitted to "
        "them; free of β. Under eval/ alone.",
        _NATS,
        "0 at step 0, then more; at most the labels' entropy, ln 2 = 0.693 for halves",
    ),
}
"""Under ``train/``, ``eval/`` and ``eval/<set>/``."""

OF_STEPS = {
    "grad_norm": Meaning(
        "Norm of the gradient before it is clipped.",
        "",
        "of one order of magnitude; many times its median is a sign",
    ),
    "learning_rate": Meaning("Learning rate of the step.", "", "as optimizer.schedule says"),
    "skipped_steps": Meaning(
        "Steps so far that were skipped, as loss or gradient were not finite.", "steps", "0"
    ),
    "overflow_skips": Meaning(
        "Steps so far that 16-mixed skipped to lower its loss scale.", "steps", "a few at the start"
    ),
    "loss_scale": Meaning("Loss scale of 16-mixed.", "", "a power of two, steady"),
    "beta": Meaning("β of the step, where a schedule or the margins change it.", "", ""),
}
"""Under ``train/`` alone."""

WHOLE_NAMES = {
    "eval/fitted_log_loss": Meaning(
        "Log-loss of margins with a scale that is fitted to them; pruning ranks by it.",
        _NATS,
        "below ln 2",
    ),
    "controlled/expected_reward": Meaning(
        "Exact mean true reward of the policy on the embedded task.",
        "reward",
        "above the reference's",
    ),
    "controlled/gain_ratio": Meaning(
        "Gain over the reference, over the closed form's at the same KL.", "share", "0.9 to 1"
    ),
    "controlled/kl_optimum_policy": Meaning(
        "Exact KL from the closed form's optimum to the policy.", _NATS, "falls"
    ),
    "controlled/kl_policy_optimum": Meaning(
        "Exact KL from the policy to that optimum.", _NATS, "falls"
    ),
    "controlled/tabular_kl_optimum_policy": Meaning(
        "The same of a table that is fitted to all pairs: what the data allow.", _NATS, "near 0"
    ),
    "controlled/kl_policy_reference": Meaning(
        "Exact KL from the policy to the reference.", _NATS, "grows as β falls"
    ),
    "controlled/kl_reference_policy": Meaning(
        "Exact KL from the reference to the policy.", _NATS, ""
    ),
    "controlled/kl_optimum_reference": Meaning(
        "Exact KL from the optimum to the reference.", _NATS, ""
    ),
    "controlled/reference_reward": Meaning(
        "Exact mean true reward of the reference.", "reward", ""
    ),
    "controlled/optimal_reward": Meaning(
        "Exact mean true reward of the optimum of this β.", "reward", ""
    ),
    "controlled/optimal_reward_at_kl": Meaning(
        "The closed form's reward at the policy's KL.", "reward", ""
    ),
    "controlled/bayes_accuracy": Meaning(
        "Accuracy that the true reward itself has on the drawn pairs.", "share", ""
    ),
    "controlled/log_z": Meaning("Exact mean log Z of the optimum.", _NATS, ""),
    "controlled/probability_sum": Meaning(
        "Sum of the policy's probabilities over all responses.", "", "1"
    ),
    "samples/judge": Meaning(
        "Mean mark of the policy's answers.", "marks", "above the reference's"
    ),
    "samples/win_rate": Meaning(
        "Share of the policy's answers that the judge prefers to the reference's; a tie is 0.5.",
        "share",
        "above 0.5",
    ),
    "samples/win_rate_low": Meaning(
        "Lower end of its 95% interval.", "share", "above 0.5 if the policy surely wins"
    ),
    "samples/win_rate_high": Meaning("Upper end of its 95% interval.", "share", ""),
    "samples/cut_off": Meaning(
        "Share of answers that ended at evaluation.max_new_tokens.", "share", "below 0.05"
    ),
    "samples/kl": Meaning(
        "KL from the policy to the reference, of whole answers that the policy drew.",
        "nats of an answer",
        "1 to 20",
    ),
    "samples/kl_per_token": Meaning(
        "The same over the tokens of these answers.", "nats of a token", ""
    ),
    "samples/length": Meaning(
        "Mean length of the policy's answers.", "tokens", "near the reference's"
    ),
    "samples/reference_judge": Meaning("Mean mark of the reference's answers.", "marks", ""),
    "samples/reference_length": Meaning("Mean length of the reference's answers.", "tokens", ""),
    "samples/reference_cut_off": Meaning(
        "Share of the reference's answers that were cut off.", "share", "below 0.05"
    ),
    "samples/judge_missing": Meaning(
        "Share of answers that the judge gave no mark or verdict.", "share", "0"
    ),
    "samples/log_z": Meaning(
        "Estimate of log Z by the judge's marks of the reference's answers.", _NATS, ""
    ),
    "samples/log_z_ess": Meaning("Share of these answers that count in it.", "share", "above 0.1"),
    "rounds/round": Meaning("Number of the round that begins, from 1.", "", ""),
    "rounds/prompts": Meaning("Prompts that the round asked.", "prompts", ""),
    "rounds/groups": Meaning(
        "Groups that its answers made; the others were dropped.", "groups", "most of what was asked"
    ),
    "rounds/length": Meaning(
        "Mean length of its answers.", "tokens", "near that of the round before"
    ),
    "rounds/mark": Meaning(
        "Mean mark of its answers: of the policy as the round began.", "marks", "rises"
    ),
    "rounds/mark_spread": Meaning(
        "Standard deviation of those marks.", "marks", "above 0: equal marks teach nothing"
    ),
    "partition/self_check": Meaning(
        "Estimate of log Z of the policy over the reference, which is 0.",
        _NATS,
        "0 but for its error",
    ),
    "partition/self_check_ess": Meaning(
        "Share of the sample that counts in it.", "share", "above 0.1"
    ),
    "partition/self_check_tokens": Meaning("Tokens of each answer that it looks at.", "tokens", ""),
}
"""By their whole names."""
