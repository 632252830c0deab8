"""Chooses the scoring path of a model by trying it on a tiny group."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from dpo_lightning.data.packing import collate_groups
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.models.layers import largest
from dpo_lightning.models.rope import RopeLengths
from dpo_lightning.models.scoring import Scorer

# Largest difference of a token's log-probability that rounding can explain, by dtype.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def choose_path(model: Any, *, max_length: int) -> tuple[Scorer, str | None]:
    """Chooses the flat path where the model gives the same numbers on it, else the padded one.

    The model is left with the attention that the chosen path needs.

    Args:
        model: A transformers causal language model, on any device.
        max_length: Longest prompt + response of the data, in tokens.

    Returns:
        The scorer, and why it is the padded one (None for the flat path).
    """
    own_attention = model.config._attn_implementation
    lengths = RopeLengths.of(model.config, max_length=max_length)
    flat = Scorer("flat", lengths)
    reason = _why_not_flat(model, flat, max_length)
    if reason is None:
        return flat, None
    if model.config._attn_implementation != own_attention:
        model.set_attn_implementation(own_attention)
    padded = Scorer("padded", lengths)
    padded.prepare(model)
    return padded, reason


@torch.no_grad()
def why_unfit(model: Any) -> str | None:
    """Tries a model on a line of ids.

    Returns:
        Why responses cannot be scored by it; None if they can.
    """
    # Of some families, GPT-NeoX among them, the entry means nothing.
    is_encoder = getattr(model.config, "is_decoder", None) is False
    if is_encoder and type(model.config) in MODEL_FOR_MASKED_LM_MAPPING:
        return "it is an encoder, whose tokens see those behind them"
    vocabulary = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, 16)
    rows = torch.from_numpy(np.stack([ids, ids])).to(next(model.parameters()).device)
    rows[1, -4:] = (rows[1, -4:] + 1) % vocabulary
    training = model.training
    model.eval()
    try:
        logits = model(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            position_ids=torch.arange(rows.shape[1], device=rows.device).expand_as(rows),
            use_cache=False,
        ).logits.float()
    except Exception as error:  # whatever a family raises that wants more than ids
        text = " ".join(str(error).split())[:150]
        return f"its forward pass of token ids fails ({type(error).__name__}: {text})"
    finally:
        model.train(training)
    if not logits.isfinite().all():
        return "its scores of a line of ids are no numbers"
    scale = logits.abs().max().item()
    rounding = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    if (logits[0, :-4] - logits[1, :-4]).abs().max().item() > rounding * scale:
        return "it is an encoder: a token's score depends on those behind it"
    return None


def known_unshared(model: Any, *, max_length: int) -> str | None:
    """The reason why no prompt can be shared, as far as a model's class and config tell.

    Args:
        model: A transformers causal language model, with weights or without.
        max_length: Longest prompt + response of the data, in tokens.

    Returns:
        The reason; None where only a trial with the weights can tell.
    """
    config = model.config.get_text_config()
    chunk = largest(config, "attention_chunk_size")
    if chunk is not None and max_length > chunk:
        return f"it attends in chunks of {chunk} tokens"
    if getattr(config, "attn_temperature_tuning", None):
        return "it scales attention by the place in a row, not in a sequence"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    return None


@torch.no_grad()
def _why_not_flat(model: Any, flat: Scorer, max_length: int) -> str | None:
    config = model.config.get_text_config()
    known = known_unshared(model, max_length=max_length)
    if known is not None:
        return known
    # Two groups: none may see what stands beside it.
    groups = [_probe_group(config.vocab_size, seed) for seed in (0, 1)]
    batch = collate_groups(groups, [0, 1])
    batch = batch.to(next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        padded = Scorer("padded", flat.lengths)
        padded.prepare(model)
        expected = padded.token_logps(model, batch, None)
        flat.prepare(model)
        plan = flat.plan(batch)
        assert plan is not None
        actual = flat.token_logps(model, batch, plan)
        flat.heads = dict(plan.heads)
    except (NotImplementedError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"trying it failed ({' '.join(str(error).split())[:120]})"
    finally:
        model.train(training)
    window = largest(config, "sliding_window")
    if not getattr(config, "use_sliding_window", True):
        window = None
    if window is not None and max_length > window and plan.windows == {None}:
        return f"its layers do not pass on their window of {window} tokens"
    difference = (actual - expected).abs().max().item()
    dtype = next(model.parameters()).dtype
    if not difference <= _TOLERANCE.get(dtype, 1e-3):
        return f"its log-probabilities differ by {difference:.2g} from the plain forward pass"
    return None


def _probe_group(vocabulary: int, seed: int) -> TokenGroup:
    """Responses of different lengths behind a prompt, in ids spread over the vocabulary."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, 24).astype(np.int32)
    responses = (ids[9:13], ids[13:20], ids[20:])
    return TokenGroup(ids[:9], responses, (1, 2, 3), 1.0, "probe", "probe")
