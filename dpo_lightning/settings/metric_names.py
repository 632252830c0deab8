"""Names of all metrics that a run may write, and of each whether more or less of it is better.

A closed table: a name that is not in it is unknown, and one with 0 has no better or worse. A rule
adds the names of held-out sets: ``eval/<set>/loss`` has the direction of ``eval/loss``.
"""

from __future__ import annotations

import re

LARGER, SMALLER, NEITHER = 1, -1, 0

# Of responses that are compared, under train/, eval/ and eval/<set>/.
_OF_PAIRS = {
    "loss": SMALLER,
    "rewards/accuracies": LARGER,
    "rewards/margins": LARGER,
    "rewards/chosen": NEITHER,
    "rewards/rejected": NEITHER,
    "logps/chosen": NEITHER,
    "logps/rejected": NEITHER,
    "logratios/chosen": NEITHER,
    "logratios/rejected": NEITHER,
    "logratios/margins": LARGER,
    "partition/log_z": NEITHER,
    "partition/p_chosen": LARGER,
}

# Of responses that count by themselves, in the same places; the last one under eval/ alone.
_OF_EXAMPLES = {
    "loss": SMALLER,
    "rewards/desirable": NEITHER,
    "rewards/undesirable": NEITHER,
    "logps/desirable": NEITHER,
    "logps/undesirable": NEITHER,
    "logratios/desirable": NEITHER,
    "logratios/undesirable": NEITHER,
    "logratios/separation": LARGER,
    "kto/z0": NEITHER,
    "bco/delta": NEITHER,
    "label_gain": LARGER,
}
_OF_RESPONSES = _OF_PAIRS | _OF_EXAMPLES

# Of steps, under train/ alone.
_OF_STEPS = dict.fromkeys(
    ("grad_norm", "learning_rate", "skipped_steps", "overflow_skips", "loss_scale", "beta"), NEITHER
)

_WHOLE_NAMES = {
    "eval/fitted_log_loss": SMALLER,
    # Exactly known on the embedded task.
    "controlled/expected_reward": LARGER,
    "controlled/gain_ratio": LARGER,
    "controlled/kl_optimum_policy": SMALLER,
    "controlled/kl_policy_optimum": SMALLER,
    "controlled/tabular_kl_optimum_policy": SMALLER,
    "controlled/kl_policy_reference": NEITHER,
    "controlled/kl_reference_policy": NEITHER,
    "controlled/kl_optimum_reference": NEITHER,
    "controlled/reference_reward": NEITHER,
    "controlled/optimal_reward": NEITHER,
    "controlled/optimal_reward_at_kl": NEITHER,
    "controlled/bayes_accuracy": NEITHER,
    "controlled/log_z": NEITHER,
    "controlled/probability_sum": NEITHER,
    # Of answers.
    "samples/judge": LARGER,
    "samples/win_rate": LARGER,
    "samples/win_rate_low": LARGER,
    "samples/win_rate_high": LARGER,
    "samples/cut_off": SMALLER,
    "samples/kl": NEITHER,
    "samples/kl_per_token": NEITHER,
    "samples/length": NEITHER,
    "samples/reference_judge": NEITHER,
    "samples/reference_length": NEITHER,
    "samples/reference_cut_off": NEITHER,
    "samples/judge_missing": SMALLER,
    "samples/log_z": NEITHER,
    "samples/log_z_ess": NEITHER,
    # Of what a round drew, by the policy as the round began.
    "rounds/round": NEITHER,
    "rounds/prompts": NEITHER,
    "rounds/groups": NEITHER,
    "rounds/length": NEITHER,
    "rounds/mark": LARGER,
    "rounds/mark_spread": NEITHER,
    "partition/self_check": NEITHER,
    "partition/self_check_ess": NEITHER,
    "partition/self_check_tokens": NEITHER,
}

DURING_TRAINING = (
    "controlled/expected_reward",
    "controlled/gain_ratio",
    "controlled/kl_optimum_policy",
    "controlled/kl_policy_reference",
)
"""Exact metrics that each evaluation of the embedded task measures; the others come at the end."""

JUDGE_METRIC = "samples/judge"
"""Mean mark of answers, which evaluations measure where a judge marks answers by themselves."""

_ERROR = "_stderr"
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", re.ASCII)
# First parts of metric names, by which ``eval/<set>/...`` would be taken for another metric; and
# the keys of one source.
_TAKEN = frozenset({name.partition("/")[0] for name in (*_OF_RESPONSES, "fitted_log_loss")})
_TAKEN |= {"path", "weight"}


def is_set_name(name: object) -> bool:
    """True for a name that a held-out set may have in ``data.eval={name: ...}``.

    Example:
        >>> is_set_name("hard-pairs"), is_set_name("a/b"), is_set_name("rewards")
        (True, False, False)
    """
    return isinstance(name, str) and _SET_NAME.fullmatch(name) is not None and name not in _TAKEN


def set_of(metric: str) -> str | None:
    """Name of the held-out set that a metric is of; None where it names none.

    Example:
        >>> set_of("eval/hard/loss"), set_of("eval/rewards/margins")
        ('hard', None)
    """
    first, *rest = metric.split("/")
    return rest[0] if first == "eval" and len(rest) > 1 and is_set_name(rest[0]) else None


def direction(metric: str) -> int | None:
    """1 where more of a metric is better, -1 where less is, 0 where neither; None if unknown.

    Args:
        metric: A name as in ``metrics.jsonl`` and ``result.json``.

    Example:
        >>> direction("eval/loss"), direction("eval/b/rewards/accuracies"), direction("samples/kl")
        (-1, 1, 0)
    """
    if metric in _WHOLE_NAMES:
        return _WHOLE_NAMES[metric]
    if metric.endswith(_ERROR):
        return None if direction(metric.removesuffix(_ERROR)) is None else NEITHER
    prefix, _, name = metric.partition("/")
    if prefix == "train":
        return (_OF_RESPONSES | _OF_STEPS).get(name)
    if prefix != "eval":
        return None
    own = set_of(metric)
    return _OF_RESPONSES.get(name if own is None else name.partition("/")[2])


def directed(
    sets: tuple[str, ...] = (),
    *,
    exact: bool = False,
    judged: bool = False,
    unpaired: bool = False,
) -> tuple[str, ...]:
    """Metrics that evaluations measure during a training and of which more or less is better.

    Args:
        sets: Names of the held-out sets.
        exact: True on the embedded task.
        judged: True if answers are drawn on the way, and a judge marks them by themselves.
        unpaired: True if the loss is one on single responses.
    """
    table = _OF_EXAMPLES if unpaired else _OF_PAIRS
    of_responses = [name for name, better in table.items() if better]
    found = [f"eval/{name}" for name in of_responses]
    found += [f"eval/{own}/{name}" for own in sets for name in of_responses]
    if exact:
        found += [name for name in DURING_TRAINING if direction(name)]
    if judged:
        found.append(JUDGE_METRIC)
    return tuple(found)
