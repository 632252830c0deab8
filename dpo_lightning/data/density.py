"""Weights of undesirable responses by their prompts.

Where people praise answers to other questions than they complain about, a label can be told from
the prompt alone, and a loss on single responses learns that instead of what a good answer is. BCO
(https://arxiv.org/abs/2404.04656, underlying distribution matching) weighs each undesirable
response by p(prompt | desirable) / p(prompt | undesirable): so weighted, both kinds have the same
prompts. The ratio is the odds of a classifier that takes both kinds for equally frequent.

The paper's classifier reads embeddings of another model. This one reads the tokens of a prompt,
so that nothing has to be loaded: a logistic regression on their counts, rare ones above frequent
ones (tf-idf). A training row's ratio comes from a classifier that has not seen the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_lightning.data.groups import conversation_of
from dpo_lightning.data.held_out import lot_of
from dpo_lightning.data.splits import PreparedData, group_id
from dpo_lightning.data.tokens import TokenGroup

_Floats = npt.NDArray[np.float64]

_FOLDS = 5
# Of fewer conversations the parts are of rows: too little would be left to learn a prompt from.
_FEW_CONVERSATIONS = 100
# Rows that classifiers learn from: a fixed sample by content.
_MOST_ROWS = 20_000
# A token of fewer rows tells one of them from another, and nothing of the others.
_LEAST_ROWS = 5
# Digits of a weight: what a sum in another order changes lies behind them.
_DIGITS = 3


def add_density_weights(data: PreparedData, bounds: Sequence[float]) -> None:
    """Multiplies the weight of each undesirable response by the density ratio of its prompt.

    Pairs have a response of either kind behind one prompt, and keep their weight. Held-out rows are
    weighed by what the training rows tell.

    Args:
        data: The groups; changed, with a note.
        bounds: The least and the largest ratio.
    """
    labelled = [group for group in data.train if group.label is not None]
    if len({group.label for group in labelled}) < 2:
        data.notes.append(
            "data.density_ratio: the training rows have no labels of both kinds, so none is weighed"
        )
        return
    ordered = sorted(labelled, key=lambda group: (group_id(group), group.weight))[:_MOST_ROWS]
    matching = _Matching.fit(ordered, (bounds[0], bounds[1]))
    ratios = matching.held_apart(_undesirable(data.train))
    data.train = _weighed(data.train, ratios)
    data.eval = _weighed(data.eval, matching.of_others(_undesirable(data.eval)))
    data.notes.append(
        f"data.density_ratio: undesirable rows weigh {ratios.min():.3g} to {ratios.max():.3g} by "
        f"their prompts, {ratios.mean():.3g} in the mean; {np.isin(ratios, bounds).mean():.0%} are "
        "at a bound"
    )


def _undesirable(groups: Sequence[TokenGroup]) -> list[TokenGroup]:
    """The responses that are weighed."""
    return [group for group in groups if group.label is False]


def _weighed(groups: Sequence[TokenGroup], ratios: _Floats) -> list[TokenGroup]:
    """The groups, of which the undesirable ones have their weight times their ratio."""
    rest = iter(ratios.tolist())
    return [
        replace(group, weight=group.weight * next(rest)) if group.label is False else group
        for group in groups
    ]


@dataclass(frozen=True, slots=True)
class _Matching:
    """Classifiers of the two kinds of labels by prompts, over a vocabulary of V token ids.

    Attributes:
        rarity: Weight of each token, (V,): the logarithm of rows by rows that have it; 0 where few
            have.
        by_rows: True if the parts are of rows, False if they are of conversations.
        apart: A column for each part of the rows, learned from the other parts, (V + 1, 5): the
            weights of tokens, and an offset.
        whole: The same, learned from all rows, (V + 1, 1).
        bounds: The least and the largest ratio.
    """

    rarity: _Floats
    by_rows: bool
    apart: _Floats
    whole: _Floats
    bounds: tuple[float, float]

    @classmethod
    def fit(cls, groups: Sequence[TokenGroup], bounds: tuple[float, float]) -> _Matching:
        """Learns from labelled groups of both kinds."""
        seen = np.zeros(1 + max(int(group.prompt.max()) for group in groups))
        for group in groups:
            seen[np.unique(group.prompt)] += 1
        rarity = np.where(seen < _LEAST_ROWS, 0, np.log((1 + len(groups)) / (1 + seen)))
        features = _features(groups, rarity)
        desirable = np.array([group.label is True for group in groups])
        weight = np.array([group.weight for group in groups])
        conversations = {conversation_of(group.prompt_key) for group in groups}
        by_rows = len(conversations) < _FEW_CONVERSATIONS
        folds = _folds(groups, by_rows)
        apart = [_logistic(features, desirable, weight * (folds != fold)) for fold in range(_FOLDS)]
        whole = _logistic(features, desirable, weight)
        return cls(rarity, by_rows, np.stack(apart, axis=1), whole[:, None], bounds)

    def held_apart(self, groups: Sequence[TokenGroup]) -> _Floats:
        """Ratio of each group by the classifier that knows nothing of its part, (n,)."""
        ratios = self._ratios(groups, self.apart)
        return ratios[np.arange(len(groups)), _folds(groups, self.by_rows)]

    def of_others(self, groups: Sequence[TokenGroup]) -> _Floats:
        """Ratio of each group, of which nothing was learned, (n,)."""
        return self._ratios(groups, self.whole)[:, 0]

    def _ratios(self, groups: Sequence[TokenGroup], classifiers: _Floats) -> _Floats:
        """Odds of a desirable label by each classifier, within the bounds, (n, classifiers)."""
        logits = _features(groups, self.rarity) @ classifiers[:-1] + classifiers[-1]
        low, high = self.bounds
        ratios = np.exp(np.clip(logits, np.log(low), np.log(high)))
        rounded = [float(f"{ratio:.{_DIGITS}g}") for ratio in ratios.ravel()]
        return np.clip(np.array(rounded).reshape(ratios.shape), low, high)


def _folds(groups: Sequence[TokenGroup], by_rows: bool) -> npt.NDArray[np.int64]:
    """The part that each group is in, 0 to 4, (n,)."""
    keys = [group_id(group) if by_rows else conversation_of(group.prompt_key) for group in groups]
    return np.array([lot_of(key) % _FOLDS for key in keys], dtype=np.int64)


def _features(groups: Sequence[TokenGroup], rarity: _Floats) -> Any:
    """Rare tokens of each prompt, a sparse (n, V) whose rows have the length 1, or 0."""
    from scipy.sparse import csr_array

    columns, values, ends = [], [], [0]
    for group in groups:
        ids, counts = np.unique(group.prompt, return_counts=True)
        known = ids < len(rarity)  # others were not learned from
        own = np.log1p(counts[known]) * rarity[ids[known]]
        columns.append(ids[known])
        values.append(own / max(np.linalg.norm(own), np.finfo(float).tiny))
        ends.append(ends[-1] + len(own))
    data = np.concatenate(values) if values else np.zeros(0)
    where = np.concatenate(columns) if columns else np.zeros(0, dtype=np.int32)
    return csr_array((data, where, np.array(ends)), shape=(len(groups), len(rarity)))


def _logistic(features: Any, desirable: npt.NDArray[np.bool_], weight: _Floats) -> _Floats:
    """Logistic regression of both kinds at equal mass, with the ridge that scikit-learn has.

    Minimises sum(m * log-loss) + |w|^2 / 2, in which the offset is free and each kind's masses m
    add up to half of the number of rows that have weight.

    Args:
        features: Sparse, (n, V).
        desirable: The label of each row, (n,).
        weight: Of each row, (n,); 0 leaves it out.

    Returns:
        Weights of the features, and the offset, (V + 1,); zeros where a kind has no row.
    """
    from scipy.optimize import minimize

    start = np.zeros(features.shape[1] + 1)
    sides = weight[desirable].sum(), weight[~desirable].sum()
    if min(sides) <= 0:
        return start
    mass = weight * np.where(desirable, *(0.5 / side for side in sides)) * (weight > 0).sum()
    sign = np.where(desirable, 1.0, -1.0)

    def loss(values: _Floats) -> tuple[float, _Floats]:
        leads = sign * (features @ values[:-1] + values[-1])
        # The slope of log(1 + exp(-lead)), without an overflow.
        slope = -mass * sign * np.exp(-np.logaddexp(0, leads))
        ridge = 0.5 * float(values[:-1] @ values[:-1])
        total = float(mass @ np.logaddexp(0, -leads)) + ridge
        return total, np.append(features.T @ slope + values[:-1], slope.sum())

    found: _Floats = minimize(loss, start, jac=True, method="L-BFGS-B").x
    return found
