"""Log-probabilities of the responses of a micro-batch under a causal language model.

Two paths give the same numbers: *flat* computes a prompt once for all its responses and pads
nothing; *padded* is the plain forward pass of any causal language model, one row per response.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dpo_lightning.data.gathers import Gathers
from dpo_lightning.data.greedy import pack
from dpo_lightning.data.packing import GroupBatch
from dpo_lightning.models.attention import GROUP_ATTENTION, AttentionPlan
from dpo_lightning.models.devices import is_cuda, on_device
from dpo_lightning.models.head import (
    LogitsTransform,
    collision_logps,
    token_logps,
    token_logps_and_collisions,
)
from dpo_lightning.models.kernel import HeadShape, Kernel, type_fault
from dpo_lightning.models.kernel_check import varlen_fault
from dpo_lightning.models.rope import RopeLengths, heed_lengths, lengths_known
from dpo_lightning.models.sharding import is_sharded, run_whole

ScoringPath = Literal["flat", "padded"]

# Rows of the padded path share a forward pass while it holds at most this many places a token.
_PADDING = 1.25

_NO_LENGTHS = RopeLengths()


@dataclass(frozen=True, slots=True)
class TokenScores:
    """A model's scores of the scored tokens of a micro-batch.

    Attributes:
        logps: Log-probability of each, shape (S,), float32.
        collisions: ``log sum_v p_v^2`` of the distribution that each was drawn from, shape (S,),
            float32, without a gradient.
    """

    logps: Tensor
    collisions: Tensor


class Scorer:
    """Scores micro-batches on one path; policy and reference share a scorer, and so its kernels.

    Args:
        path: The path.
        lengths: Lengths at which the models' rotary embeddings change.
        heads: Heads of the models' layers, as a forward pass showed them, and of how many each.

    Attributes:
        path: The path.
        lengths: Those lengths.
        heads: Those heads.
    """

    def __init__(
        self,
        path: ScoringPath,
        lengths: RopeLengths = _NO_LENGTHS,
        heads: Mapping[HeadShape, int] | None = None,
    ) -> None:
        self.path: ScoringPath = path
        self.lengths = lengths
        self.heads = dict(heads or {})
        self._tried: dict[HeadShape, str | None] = {}
        self._kernel: Kernel | None = None
        self._wide_scores = False
        self._own_attention: str | None = None

    @property
    def kernel(self) -> str:
        """Name of the kernels: two names where the numbers are not the same."""
        names: list[str] = [self.path]
        if self._kernel is not None:
            few = [] if all(fault is None for fault in self._tried.values()) else [self._share()]
            names += [" in ".join(["any lengths", *few])]
        return ", ".join([*names, *(["float32 scores"] if self._wide_scores else [])])

    @property
    def attention(self) -> str:
        """Attention of the policy's layers, in words."""
        if self.path == "padded":
            return "the model's own, over padded rows"
        shared, otherwise = "prompts shared", "in batches of like length"
        faults = "; ".join(dict.fromkeys(f for f in self._tried.values() if f is not None))
        if self._kernel is None:
            return f"{shared}, {otherwise}" + (f" ({faults})" if faults else "")
        if not faults:
            return f"{shared}, flash kernel"
        return (
            f"{shared}, flash kernel in {self._share()} layers, the others {otherwise} ({faults})"
        )

    def _share(self) -> str:
        """Layers that the kernel takes, out of all."""
        taken = [n for shape, n in self.heads.items() if self._tried[shape] is None]
        return f"{sum(taken)} of {sum(self.heads.values())}"

    def choose_kernel(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Tries the kernel for any lengths where there may be one, with each layer's heads.

        Args:
            device: Device that the models will run on.
            dtype: Type that they compute in.

        Returns:
            Why layers of a GPU go without it.
        """
        self._kernel, self._tried, self._wide_scores = None, {}, False
        if self.path != "flat" or not is_cuda(device):
            return None
        type_said = type_fault(dtype)
        self._wide_scores = type_said is None
        for shape in self.heads:
            fault = type_said or shape.fault()
            self._tried[shape] = fault or varlen_fault(device, dtype, shape)
        if None in self._tried.values():
            self._kernel = Kernel(self._tried)
        faults = dict.fromkeys(fault for fault in self._tried.values() if fault is not None)
        return "; ".join(faults) or None

    def suppose_kernel(self) -> None:
        """Takes the kernel for any lengths as right wherever it may be used: for a trace."""
        self._kernel = Kernel({}, supposed=True)

    @property
    def shared(self) -> bool:
        """True if a prompt is computed once for all its responses."""
        return self.path == "flat"

    @property
    def gathers(self) -> Gathers:
        """Gathers that a micro-batch brings along for attention, made before the step."""
        if self.path == "padded" or self.lengths:
            return "none"  # its rows are plain ones, or it may be laid out anew
        if self._kernel is None:
            return "buckets"
        return "both" if any(self._tried.values()) else "sequences"

    def prepare(self, model: Any) -> None:
        """Switches a transformers model to the attention that this path needs."""
        if self.lengths:
            heed_lengths(model)
        if self.path == "flat" and model.config._attn_implementation != GROUP_ATTENTION:
            self._own_attention = model.config._attn_implementation
            model.set_attn_implementation(GROUP_ATTENTION)

    def release(self, model: Any) -> None:
        """Gives a model that was prepared its own attention back."""
        if self._own_attention is not None:
            model.set_attn_implementation(self._own_attention)

    @contextlib.contextmanager
    def plain(self, model: Any) -> Iterator[Any]:
        """The model as transformers made it, in eval mode: for generation and plain forwards."""
        training = model.training
        model.eval()
        self.release(model)
        try:
            yield model
        finally:
            if self._own_attention is not None:
                model.set_attn_implementation(GROUP_ATTENTION)
            model.train(training)

    def plan(self, batch: GroupBatch) -> AttentionPlan | None:
        """The attention plan of a micro-batch, to be shared by the models that score it."""
        if self.path != "flat":
            return None
        if not self.lengths:
            return AttentionPlan(batch, kernel=self._kernel)
        laid, order = self.lengths.lay_out(batch)
        together = [(sum(own), own[0] + max(own[1:])) for own in laid.segments]
        parts = self.lengths.parts(together, laid.input_ids.device)
        return AttentionPlan(laid, kernel=self._kernel, order=order, parts=parts)

    def token_logps(self, model: Any, batch: GroupBatch, plan: AttentionPlan | None) -> Tensor:
        """Log-probability of each scored token, shape (S,), float32."""
        if plan is not None:
            logps = run_whole(model, lambda model: token_logps(*_flat_inputs(model, batch, plan)))
            return logps if plan.order is None else logps.index_select(0, plan.order)
        score = _padded_scores(
            model, batch, lambda *scores: (_target_logps(*scores),), self.lengths
        )
        return score[0]

    def token_scores(
        self, model: Any, batch: GroupBatch, plan: AttentionPlan | None
    ) -> TokenScores:
        """Log-probability of each scored token, and the collisions beside it, in one pass."""
        if plan is not None:
            logps, collisions = run_whole(
                model, lambda model: token_logps_and_collisions(*_flat_inputs(model, batch, plan))
            )
            if plan.order is not None:
                logps, collisions = (x.index_select(0, plan.order) for x in (logps, collisions))
            return TokenScores(logps, collisions)
        return TokenScores(
            *_padded_scores(
                model,
                batch,
                lambda logits, targets: (_target_logps(logits, targets), collision_logps(logits)),
                self.lengths,
            )
        )

    def logps(self, model: Any, batch: GroupBatch, plan: AttentionPlan | None = None) -> Tensor:
        """Log-probability of each response: the sum over its tokens, EOS included.

        Args:
            model: A transformers causal language model, prepared by this scorer.
            batch: The micro-batch.
            plan: From :meth:`plan`; made here when not given.

        Returns:
            Shape (N,), float32.
        """
        plan = self.plan(batch) if plan is None else plan
        tokens = self.token_logps(model, batch, plan)
        total = torch.zeros(len(batch.lengths), dtype=torch.float32, device=tokens.device)
        return total.index_add(0, batch.response, tokens)


def _flat_inputs(
    model: Any, batch: GroupBatch, plan: AttentionPlan
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, LogitsTransform]:
    """Inputs of the head: states (S, d), weight (V, d), bias (V,), targets (S,), transform."""
    if plan.order is not None:
        batch = plan.batch
    with lengths_known(plan.parts):
        hidden = model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            group_plan=plan,
        ).last_hidden_state[0]
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise NotImplementedError(f"a head of type {type(head).__name__}")
    return (
        hidden.index_select(0, batch.score_from),
        head.weight,
        head.bias,
        batch.targets,
        LogitsTransform.of(model.config),
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """One response behind its prompt, as a row of the padded path."""

    prompt: int  # place of the prompt in the flat batch
    prompt_length: int
    response: int  # place of the response
    length: int
    scored: int  # place of its first token among the scored ones

    @property
    def width(self) -> int:
        return self.prompt_length + self.length


def _padded_scores(
    model: Any,
    batch: GroupBatch,
    score: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    lengths: RopeLengths,
) -> tuple[Tensor, ...]:
    """One row ``[P | y_k]`` per response; rows of like widths share a plain forward pass.

    Args:
        model: A transformers causal language model.
        batch: The micro-batch.
        score: Takes the vocabulary scores of n tokens, (n, V), float32, and the tokens, (n,),
            int64, and gives numbers of each, (n,).
        lengths: Lengths at which the model's rotary embeddings change.

    Returns:
        Those numbers of all scored tokens, each of shape (S,).
    """
    rows = []
    cursor = scored = 0
    for prompt_length, *responses in batch.segments:
        place = cursor + prompt_length
        for length in responses:
            rows.append(_Row(cursor, prompt_length, place, length, scored))
            place += length
            scored += length
        cursor = place
    scores, places = [], []
    # Ranks that share a model's weights meet in each forward pass: as many on each, one.
    for part in [rows] if is_sharded(model) else _like_widths(rows):
        width = max(row.width for row in part)
        rope = lengths.parts([(width, row.width) for row in part], batch.targets.device)
        with lengths_known(rope if lengths else ()):
            scores.append(score(*_rows_logits(model, batch, part)))
        places += [row.scored + t for row in part for t in range(row.length)]
    order = on_device(torch.from_numpy(np.argsort(places)), batch.targets.device)
    return tuple(torch.cat(parts).index_select(0, order) for parts in zip(*scores, strict=True))


def _like_widths(rows: list[_Row]) -> list[list[_Row]]:
    """Rows in parts of which padding is a small share, widest first."""

    def join(load: tuple[int, int, int], row: _Row) -> tuple[int, int, int] | None:
        widest, count, tokens = load[0], load[1] + 1, load[2] + row.width
        return (widest, count, tokens) if widest * count <= _PADDING * tokens else None

    widest_first = sorted(rows, key=lambda row: -row.width)
    return pack(widest_first, start=lambda row: (row.width, 1, row.width), join=join)


def _target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target, shape (n,), under scores of shape (n, V)."""
    return -F.cross_entropy(logits, targets, reduction="none")


def _rows_logits(model: Any, batch: GroupBatch, rows: list[_Row]) -> tuple[Tensor, Tensor]:
    """Vocabulary scores of the response tokens of rows, row after row, float32, and the tokens."""
    device = batch.input_ids.device
    # An unused place repeats a real token: any id will do behind the mask, and none is a pad token.
    index = torch.zeros(len(rows), max(row.width for row in rows), dtype=torch.int64)
    mask = torch.zeros_like(index)
    for i, row in enumerate(rows):
        index[i, : row.prompt_length] = torch.arange(row.prompt, row.prompt + row.prompt_length)
        index[i, row.prompt_length : row.width] = torch.arange(
            row.response, row.response + row.length
        )
        mask[i, : row.width] = 1
    mask = on_device(mask, device)
    logits = model(
        input_ids=batch.input_ids[on_device(index, device)],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).logits
    owner = [i for i, row in enumerate(rows) for _ in range(row.length)]
    source = [row.prompt_length - 1 + t for row in rows for t in range(row.length)]
    target = [row.scored + t for row in rows for t in range(row.length)]
    rows_of, places, scored = (on_device(torch.tensor(x), device) for x in (owner, source, target))
    return logits[rows_of, places].float(), batch.targets[scored]
