"""Formulas of the device memory that training takes, part by part, apart from any run.

Counted is the busiest moment of a step: weights, gradients and optimizer states are there, and a
micro-batch is between its forward and its backward pass. The one place for such numbers: the budget
of tokens, the header's estimate and docs/memory.md all come from here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from dpo_lightning.models.layers import head_sizes, largest

GIB = 1 << 30

# NF4 with double quantization: 4 bits, an 8-bit scale for 64 weights, a float32 one for 256 scales.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# One entry of an 8-bit moment, with the float32 scale of 256.
_EIGHT_BIT_BYTES = 1 + 4 / 256
# Keys that the attention copies for each token: a prompt's stand once more for every response.
_KEY_COPIES = 2
# Scores of a layer that exist beside those kept for the backward pass: the mask added to them, the
# ones before the softmax, and their gradient.
_OTHER_SCORES = 3
# Tensors of the head's scores that exist at a time, in float32.
_HEAD_TENSORS = 3


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder, as far as its memory goes.

    Attributes:
        parameters: All weights, shared ones once.
        layers: Decoder layers.
        layer_parameters: Weights of one.
        linear_parameters: Those of its linear layers, which LoRA adapts and 4 bits hold.
        linear_sides: Sum over its linear layers of inputs and outputs; times the rank of LoRA this
            is what is trained of a layer.
        largest: Weights of the largest single tensor, as a rule the embeddings.
        vocabulary: Tokens it can write.
        hidden: Width of the residual stream.
        heads: Query heads.
        key_heads: Key and value heads.
        head_size: Entries of a head.
        intermediate: Width of the feed-forward part, of all experts that a token goes through.
    """

    parameters: int
    layers: int
    layer_parameters: int
    linear_parameters: int
    linear_sides: int
    largest: int
    vocabulary: int
    hidden: int
    heads: int
    key_heads: int
    head_size: int
    intermediate: int

    @property
    def outer(self) -> int:
        """Weights outside of the layers: embeddings, head, last norm."""
        return self.parameters - self.layers * self.layer_parameters

    def lora_parameters(self, rank: int) -> int:
        """Number of weights that LoRA of a rank trains on all linear layers of the decoder."""
        return rank * self.layers * self.linear_sides


@dataclass(frozen=True, slots=True)
class Training:
    """Facts about a training that decide its memory.

    Attributes:
        weight_bytes: Bytes of a weight as it is held: 4, or 2 for bfloat16.
        compute_bytes: Bytes of a weight and an activation in a step.
        masters: True if float32 weights stand behind a rounded copy that computes.
        autocast: True if the copy is made anew in each step, by autocast.
        optimizer: ``adamw`` or ``adamw_8bit``.
        trained: Trained weights where those are adapters beside a frozen model; None: all.
        four_bit: True if the frozen linear layers are held in NF4.
        live_reference: True if a frozen copy of the model is held.
        shards: Devices that share weights, gradients and states (FSDP2); 1 shares nothing.
        buckets: True if whole models on several devices average gradients, which DDP copies.
        whole_gradients: True if each of them adds up whole gradients until the end of a step.
        tokens: Of a micro-batch.
        checkpointing: True if activations are computed again in the backward pass.
        keys: Keys that a query meets in the mean, where attention keeps its scores (a CPU), else 0.
        head_scores: Scores of the head at a time.
        head_kept: Most that it keeps for the backward pass.
    """

    weight_bytes: int
    compute_bytes: int
    masters: bool
    autocast: bool
    optimizer: str
    trained: int | None
    four_bit: bool
    live_reference: bool
    shards: int
    buckets: bool
    whole_gradients: bool
    tokens: int
    checkpointing: bool
    keys: int
    head_scores: int
    head_kept: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one device.

    Attributes:
        weights: Of the policy, as it computes, or its shards; adapters too.
        masters: The float32 weights behind rounded ones.
        reference: A live reference.
        gradients: Of what is trained, and one more of the largest tensor while it is added.
        optimizer: The moments.
        gathered: Of a sharded model what is whole for a while; casts of autocast.
        activations: What the backward pass needs, and the gradients of one layer's.
        head: Scores over the vocabulary.
    """

    weights: int
    masters: int
    reference: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts().values())

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the tokens of a micro-batch."""
        return self.total - self.activations

    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def describe(self) -> str:
        """Parts in GiB, the large ones; ``weights 2.5, optimizer 5.0``."""
        large = {name: n for name, n in self.parts().items() if n >= 0.02 * self.total}
        return ", ".join(f"{name} {in_gib(n)}" for name, n in large.items())


def in_gib(number: float) -> str:
    """A number of bytes in GiB, to three digits or so."""
    value = number / GIB
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def activation_bytes(shape: ModelShape, *, width: int, checkpointing: bool, keys: int = 0) -> int:
    """Bytes that a token leaves for the backward pass, and one layer's gradients.

    Args:
        shape: The model's.
        width: Bytes of an activation.
        checkpointing: True if only the input of each layer stays.
        keys: Keys whose scores attention keeps for it; 0 where they are computed again.
    """
    # The layer's two norms read in float32 and write two stages each; queries and output, keys and
    # values; four stages of the feed-forward part.
    attention = (2 * shape.heads + 2 * _KEY_COPIES * shape.key_heads) * shape.head_size
    norms = width * 4 * shape.hidden + 2 * 4 * shape.hidden
    layer = norms + width * (attention + 4 * shape.intermediate)
    scores = width * shape.heads * keys
    if checkpointing:
        return shape.layers * width * shape.hidden + 2 * layer + (1 + _OTHER_SCORES) * scores
    return (shape.layers + 1) * layer + (shape.layers + _OTHER_SCORES) * scores


def footprint(shape: ModelShape, training: Training) -> Footprint:
    """Memory that a device needs.

    Args:
        shape: The model's.
        training: How it is trained.
    """
    all_weights, shards = shape.parameters, training.shards
    adapters = training.trained is not None
    trained = all_weights if training.trained is None else training.trained
    computed = training.compute_bytes
    masters = 4 * trained if training.masters else 0
    # What a trained weight, its gradient and its moments are held in.
    held = 4 if training.masters or adapters else training.weight_bytes
    if adapters:
        linear = shape.layers * shape.linear_parameters
        frozen = _NF4_BYTES if training.four_bit else computed
        weights = frozen * linear + computed * (all_weights - linear)
        weights += trained * (computed if training.masters else held)
    else:
        weights = all_weights * (computed if training.masters else held)
    eight = training.optimizer == "adamw_8bit"
    moments = 2 * trained * (_EIGHT_BIT_BYTES if eight else held)
    gradients = held * trained / shards
    gathered = 0.0
    largest = shape.lora_parameters(1) // max(shape.layers, 1) if adapters else shape.largest
    if shards > 1:
        outer = computed * shape.outer
        layers = 2 * computed * shape.layer_parameters  # the next one is fetched meanwhile
        gathered = outer + layers
        if not adapters:
            # Its gradient, and what is sent of it in float32.
            gathered += (computed + 4) * shape.layer_parameters
        if training.whole_gradients:
            gradients += 4 * trained
        else:
            gradients += computed * largest
    else:
        gradients += computed * largest
        if training.buckets:
            gradients += held * trained
        if training.autocast and held > computed:
            gathered = computed * all_weights
    return Footprint(
        weights=round(weights / shards),
        masters=round(masters / shards),
        reference=round(_reference_bytes(all_weights, training) / shards),
        gradients=round(gradients),
        optimizer=round(moments / shards),
        gathered=round(gathered),
        activations=training.tokens
        * activation_bytes(
            shape, width=computed, checkpointing=training.checkpointing, keys=training.keys
        ),
        head=_head_bytes(shape, training),
    )


def _reference_bytes(weights: int, training: Training) -> int:
    """A live copy; with adapters the frozen model is the reference."""
    if not training.live_reference or training.trained is not None:
        return 0
    return weights * (training.compute_bytes if training.masters else training.weight_bytes)


def _head_bytes(shape: ModelShape, training: Training) -> int:
    scores = training.tokens * shape.vocabulary
    # A frozen head keeps the states' gradients, and no scores.
    kept = 0 if training.trained is not None else min(scores, training.head_kept)
    states = training.tokens * shape.hidden * (4 + 2 * training.compute_bytes)
    chunk = _HEAD_TENSORS * 4 * min(scores, training.head_scores)
    return kept * training.compute_bytes + chunk + states


def shape_of_model(model: Any) -> ModelShape:
    """A transformers model's shape; it may be on the meta device, and then has no weights at all.

    Args:
        model: A causal language model.
    """
    config = model.config.get_text_config()
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    linear = [
        parameter for layer in layers for parameter in layer.parameters() if parameter.ndim >= 2
    ]
    count = max(1, len(layers))
    heads = largest(config, "num_attention_heads") or 1
    hidden = largest(config, "hidden_size") or model.get_input_embeddings().weight.shape[-1]
    experts = largest(config, "num_experts_per_tok")
    intermediate = largest(config, "intermediate_size") or 4 * hidden
    if experts:
        intermediate = experts * (largest(config, "moe_intermediate_size") or intermediate)
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=len(layers) or largest(config, "num_hidden_layers") or 1,
        layer_parameters=sum(p.numel() for layer in layers for p in layer.parameters()) // count,
        linear_parameters=sum(p.numel() for p in linear) // count,
        linear_sides=sum(len(p) + p.numel() // len(p) for p in linear) // count,
        largest=max(p.numel() for p in model.parameters()),
        vocabulary=config.vocab_size,
        hidden=hidden,
        heads=heads,
        key_heads=largest(config, "num_key_value_heads") or heads,
        head_size=max(head_sizes(config), default=hidden // heads),
        intermediate=intermediate,
    )
