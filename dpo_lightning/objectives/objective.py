"""An objective in plain values: its losses, their options, their fit. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from dpo_lightning.objectives.registry import (
    LISTWISE_LOSSES,
    PAIRWISE_LOSSES,
    UNPAIRED_ENTRIES,
    UNPAIRED_LOSSES,
    Option,
    PairwiseLoss,
    UnpairedLoss,
    Value,
    losses_with_options,
)


def known_losses() -> tuple[str, ...]:
    """Names of all losses."""
    import dpo_lightning.objectives.losses
    import dpo_lightning.objectives.unpaired  # noqa: F401  (both register the package's own)

    return (*PAIRWISE_LOSSES, *LISTWISE_LOSSES, *UNPAIRED_LOSSES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSettings:
    """An objective in plain values: one loss or a weighted sum, and what is composed over it.

    Attributes:
        terms: Weight of each loss.
        options: Options of the losses; each takes those that are its own.
        f_divergence: A name of `DIVERGENCES`.
        f_alpha: Order of the alpha divergence.
        ld_alpha: Weight of the tokens beyond the shorter response of a pair; 1 is all of it.
        wpo: True if pairs are weighted by how likely the policy is to write them.
        rpo_alpha: Weight of an added negative log-likelihood per token of the chosen response.
    """

    terms: Mapping[str, float]
    options: Mapping[str, Value] = field(default_factory=dict)
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    ld_alpha: float = 1.0
    wpo: bool = False
    rpo_alpha: float = 0.0

    @property
    def pairwise(self) -> dict[str, PairwiseLoss]:
        """The terms that are losses on pairs."""
        known_losses()
        return {name: PAIRWISE_LOSSES[name] for name in self.terms if name in PAIRWISE_LOSSES}

    @property
    def listwise(self) -> list[str]:
        """The terms that are losses on a whole group."""
        return [name for name in self.terms if name in LISTWISE_LOSSES]

    @property
    def unpaired(self) -> dict[str, UnpairedLoss]:
        """The terms that are losses on single responses."""
        known_losses()
        return {name: UNPAIRED_ENTRIES[name] for name in self.terms if name in UNPAIRED_ENTRIES}

    @property
    def is_unpaired(self) -> bool:
        """True if single responses are examples: a pair then counts as two of them."""
        return any(name in UNPAIRED_LOSSES for name in self.terms)

    @property
    def anchor(self) -> str:
        """The point that rewards are compared with; see :class:`UnpairedLoss`."""
        return next((loss.anchor for loss in self.unpaired.values()), "none")

    @property
    def uses_reference(self) -> bool:
        """True if any term compares with a reference."""
        others = bool(self.listwise) or self.is_unpaired
        return others or any(loss.uses_reference for loss in self.pairwise.values())

    @property
    def needs_reference(self) -> list[str]:
        """The terms that have no meaning without a reference."""
        pairwise = [name for name, loss in self.pairwise.items() if loss.needs_reference]
        return [*pairwise, *self.unpaired]

    @property
    def couples(self) -> list[str]:
        """The terms that need the whole step at once."""
        return [name for name, loss in self.pairwise.items() if loss.couples]

    @property
    def desensitises(self) -> bool:
        """True if log-probabilities of single tokens are needed."""
        return self.ld_alpha != 1.0

    @property
    def needs_tokens(self) -> bool:
        """True if the loss looks at single tokens."""
        return self.desensitises or self.wpo

    def own_options(self, name: str) -> dict[str, Value]:
        """The options that a loss takes."""
        defaults = losses_with_options()[name].options
        return {key: self.options.get(key, default) for key, default in defaults.items()}

    def problems(self) -> Iterator[str]:
        """Yields the contradictions, one clause each; options by their bare names."""
        known = known_losses()
        for name, weight in self.terms.items():
            if name not in known:
                yield f"terms.{name}: unknown loss; available: {', '.join(known)}"
            if not (math.isfinite(weight) and weight >= 0):
                yield f"terms.{name}={weight}: must be a finite weight >= 0"
        if not self.terms:
            yield "terms: needs at least one loss"
        shown = ",".join(self.terms)
        for option, value in self.options.items():
            terms = self._with_options()
            entries = [e.schema[option] for e in terms if option in e.schema]
            if not entries:
                yield (
                    f"{option}={_shown(value)}: loss={shown} has no such option{self._own()}; "
                    "leave it out"
                )
            for entry in entries:
                if not entry.accepts(value):
                    yield f"{option}={_shown(value)}: must be {entry.expected()} for loss={shown}"
        yield from self._unpaired_problems()
        pairs = ", ".join(n for n, e in self.pairwise.items() if e.uses_rejected)
        if self.f_divergence != "reverse_kl":
            for name in self.terms:
                loss = self.pairwise.get(name)
                if loss is None or (loss.uses_rejected and not loss.on_margin):
                    yield (
                        f"f_divergence={self.f_divergence}: loss={name} is no function of the "
                        "margin of two responses, so the normaliser of another divergence would "
                        f"not cancel in it; losses that are: {_names(lambda e: e.on_margin)}"
                    )
            if not self.uses_reference:
                yield f"f_divergence={self.f_divergence}: loss={shown} uses no reference"
        for key, value, on in (
            ("ld_alpha", self.ld_alpha, self.desensitises),
            ("wpo", self.wpo, self.wpo),
        ):
            if on and (self.listwise or not pairs):
                yield (
                    f"{key}={_shown(value)} is about the two responses of a pair, which "
                    f"loss={shown} does not compare"
                )
            elif on and self.couples and key == "wpo":
                yield (
                    f"{key}={_shown(value)} weighs single pairs, and loss="
                    f"{','.join(self.couples)} has one loss for all pairs of a batch"
                )

    def _unpaired_problems(self) -> Iterator[str]:
        """Yields the clauses on what single responses do not go with."""
        for name in self.unpaired:
            others = [other for other in self.terms if other != name]
            if others:
                yield (
                    f"terms={{{', '.join(self.terms)}}}: {name} is a loss on single responses and "
                    f"stands alone; leave loss.terms.{name} out"
                )
                return
            if self.rpo_alpha:
                yield (
                    f"rpo_alpha={self.rpo_alpha:g} adds the likelihood of the better response of "
                    f"a group, which loss={name} does not look for; leave it out"
                )

    def _with_options(self) -> list[PairwiseLoss | UnpairedLoss]:
        return [*self.pairwise.values(), *self.unpaired.values()]

    def _own(self) -> str:
        own = [key for loss in self._with_options() for key in loss.schema]
        return f"; it has {', '.join(own)}" if own else ""


def _names(which: Callable[[PairwiseLoss], bool]) -> str:
    return ", ".join(name for name, loss in PAIRWISE_LOSSES.items() if which(loss))


def _shown(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def merged_options(losses: Iterable[PairwiseLoss | UnpairedLoss]) -> dict[str, Option]:
    """All options of some losses, each with the first one's default; bounds are the loss's own."""
    merged: dict[str, Option] = {}
    for loss in losses:
        for name, option in loss.schema.items():
            merged.setdefault(name, option)
    return merged
