"""Three ways to write answers token by token, several to a prompt.

*Shared*: prompts are computed once and their keys are there once, for models whose attention is
ours. *Cached*: prompts are computed once and their keys copied for each answer, for models with
a cache of keys and values in transformers. *Whole*: all of an answer is computed anew for each
token, for all others.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from dpo_lightning.data.tokens import Ids
from dpo_lightning.evaluation.sampling import left_padded
from dpo_lightning.models.decoding import Decoding
from dpo_lightning.models.head import LogitsTransform
from dpo_lightning.models.loading import max_positions
from dpo_lightning.models.rope import RopeLengths, heed_lengths, lengths_known
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import run_whole

Way = Literal["shared", "cached", "whole"]


class Writer(Protocol):
    """Gives the scores of next tokens, and is given the tokens."""

    def begin(self, prompts: Sequence[Ids], owners: Sequence[int]) -> Tensor:
        """Scores of the first tokens of answers, (N, V), float32.

        Args:
            prompts: Token ids of each prompt, (P,).
            owners: The prompt of each answer, ascending.
        """

    def next(self, tokens: Tensor) -> Tensor:
        """Scores behind one more token of each answer, (N,), int64 -> (N, V), float32."""

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with some of the answers; their numbers, ascending."""


@torch.no_grad()
def way_of(model: Any, scorer: Scorer, longest: int) -> tuple[Way, str | None]:
    """The way in which a model's answers are written.

    Args:
        model: A transformers causal language model.
        scorer: The scorer that prepared it.
        longest: Longest prompt and answer together.

    Returns:
        The way; for the slow one the reason.
    """
    lengths = RopeLengths.of(model.config, max_length=longest)
    if lengths:
        first = min((*lengths.steps, *lengths.slopes))
        return "whole", (
            f"its rotary embeddings change behind {first:,} tokens, and so do the keys of what is "
            "written already"
        )
    if scorer.shared:
        return "shared", None
    with scorer.plain(model):
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        past = _past(model(input_ids=token, use_cache=True))
    if past is None:
        return "whole", f"a {model.config.model_type} model has no cache of keys and values alone"
    return "cached", None


@contextlib.contextmanager
def open_writer(model: Any, scorer: Scorer, way: Way, *, pad: int) -> Iterator[Writer]:
    """A writer for as long as the context lasts; the model is in eval mode meanwhile.

    Args:
        model: A transformers causal language model.
        scorer: The scorer that prepared it.
        way: How its answers are written.
        pad: Any token id, to stand where nothing is.
    """
    if way == "shared":
        scorer.prepare(model)
        training = model.training
        model.eval()
        try:
            yield SharedWriter(model)
        finally:
            model.train(training)
        return
    with scorer.plain(model):
        yield CachedWriter(model, pad) if way == "cached" else WholeWriter(model)


class SharedWriter:
    """Writes with the keys of a prompt there once for all of its answers.

    Args:
        model: A transformers causal language model whose attention is ours, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._decoding: Decoding | None = None
        self._positions = max_positions(model.config)

    def begin(self, prompts: Sequence[Ids], owners: Sequence[int]) -> Tensor:
        """See :class:`Writer`."""
        lengths = [len(prompt) for prompt in prompts]
        ids = np.stack(
            [np.pad(prompt, (0, max(lengths) - len(prompt)), "edge") for prompt in prompts]
        )
        device = self._model.device
        self._decoding = Decoding(lengths, device)
        tokens = torch.from_numpy(ids.astype(np.int64)).to(device)
        last = torch.tensor(lengths, device=device) - 1
        scores = self._scores(tokens, torch.arange(tokens.shape[1], device=device)[None], last)
        assert self._decoding.layers, "the model's attention is not ours"
        self._decoding.begin(owners)
        return scores[torch.tensor([*owners], device=device)]

    def next(self, tokens: Tensor) -> Tensor:
        """See :class:`Writer`."""
        assert self._decoding is not None
        self._decoding.advance()
        positions = _within(self._decoding.positions, self._positions)
        return self._scores(tokens[:, None], positions[:, None], torch.zeros_like(tokens))

    def keep(self, rows: Sequence[int]) -> None:
        """See :class:`Writer`."""
        assert self._decoding is not None
        self._decoding.keep(rows)

    def _scores(self, tokens: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        """Scores behind the last token of each row; tokens (n, T), last (n,) -> (n, V)."""
        decoding = self._decoding

        def scores(model: Any) -> Tensor:
            hidden = model.base_model(
                input_ids=tokens,
                position_ids=positions.expand(len(tokens), -1),
                use_cache=False,
                group_plan=decoding,
            ).last_hidden_state
            states = hidden[torch.arange(len(last), device=last.device), last]
            head = model.get_output_embeddings()
            found: Tensor = F.linear(states, head.weight.to(states.dtype), head.bias)
            return _wide(LogitsTransform.of(model.config)(found))

        return run_whole(self._model, scores)


class CachedWriter:
    """Writes with the cache of transformers, in which each answer has its prompt's keys.

    Args:
        model: A transformers causal language model as it was made, in eval mode.
        pad: Any token id, to stand where nothing is.
    """

    def __init__(self, model: Any, pad: int) -> None:
        self._model = model
        self._pad = pad
        self._past: Any = None
        self._mask = torch.zeros(0)
        self._positions = max_positions(model.config)
        self._options = _last_alone(model)

    def begin(self, prompts: Sequence[Ids], owners: Sequence[int]) -> Tensor:
        """See :class:`Writer`."""
        ids, mask = (x.to(self._model.device) for x in left_padded(prompts, self._pad))
        self._mask = mask
        scores = self._scores(ids, (mask.cumsum(1) - 1).clamp(min=0))
        rows = torch.tensor([*owners], device=mask.device)
        self._select(rows)
        return scores[rows]

    def next(self, tokens: Tensor) -> Tensor:
        """See :class:`Writer`."""
        self._mask = torch.cat([self._mask, torch.ones_like(tokens)[:, None]], dim=1)
        positions = _within(self._mask.sum(1) - 1, self._positions)
        return self._scores(tokens[:, None], positions[:, None])

    def keep(self, rows: Sequence[int]) -> None:
        """See :class:`Writer`."""
        self._select(torch.tensor([*rows], device=self._mask.device))

    def _select(self, rows: Tensor) -> None:
        self._past.batch_select_indices(rows)
        self._mask = self._mask[rows]

    def _scores(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._past,
            use_cache=True,
            **self._options,
        )
        self._past = output.past_key_values
        return _wide(output.logits[:, -1])


class WholeWriter:
    """Writes by whole passes, in which rows of one length stand together, so that none is padded.

    Args:
        model: A transformers causal language model as it was made, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._rows: list[list[int]] = []
        self._options = _last_alone(model)
        heed_lengths(model)

    def begin(self, prompts: Sequence[Ids], owners: Sequence[int]) -> Tensor:
        """See :class:`Writer`."""
        self._rows = [prompts[owner].tolist() for owner in owners]
        return self._scores()

    def next(self, tokens: Tensor) -> Tensor:
        """See :class:`Writer`."""
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.append(token)
        return self._scores()

    def keep(self, rows: Sequence[int]) -> None:
        """See :class:`Writer`."""
        self._rows = [self._rows[row] for row in rows]

    def _scores(self) -> Tensor:
        device, lengths = self._model.device, [len(row) for row in self._rows]
        found, order = [], []
        for length in sorted(set(lengths)):
            here = [number for number, own in enumerate(lengths) if own == length]
            ids = torch.tensor([self._rows[number] for number in here], device=device)
            # All of a pass are of one length, so that each has the factors of its own.
            with lengths_known([(length, None)]):
                output = self._model(input_ids=ids, use_cache=False, **self._options)
            found.append(_wide(output.logits[:, -1]))
            order += here
        return torch.cat(found)[torch.tensor(order, device=device).argsort()]


def _past(output: Any) -> Cache | None:
    """A cache of which rows can be taken, or None."""
    past = getattr(output, "past_key_values", None)
    if not isinstance(past, Cache) or not past.layers:
        return None
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return past if all(type(layer) in known for layer in past.layers) else None


def _last_alone(model: Any) -> dict[str, Any]:
    """Arguments that make a forward pass give the scores of the last place alone."""
    parameters = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}


def _within(positions: Tensor, most: int | None) -> Tensor:
    """Positions that the model has: an answer that has ended may wait behind them."""
    return positions if most is None else positions.clamp(max=most - 1)


def _wide(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
