"""Device memory that training takes, part by part, and the facts that decide it."""

from __future__ import annotations

from dataclasses import dataclass, fields

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """An adapter beside a frozen model, as far as its memory goes.

    Attributes:
        rank: Of LoRA.
        modules: Names of the adapted modules; None for all linear layers but the head.
        dora: True if directions and lengths are trained apart.
        four_bit: True if the frozen linear layers are held in NF4.
    """

    rank: int
    modules: tuple[str, ...] | None = None
    dora: bool = False
    four_bit: bool = False


@dataclass(frozen=True, slots=True)
class Training:
    """Facts about a training that decide its memory.

    Attributes:
        kind: Kind of device.
        weight_bytes: Bytes of a weight as it is held: 4, or 2 for bfloat16.
        compute_bytes: Bytes of a weight and an activation in a step.
        masters: True if float32 weights stand behind a rounded copy that computes.
        autocast: True if the copy is made anew in each step, by autocast.
        optimizer: Name of the optimizer.
        adapters: What is trained beside a frozen model; None: all weights are.
        live_reference: True if a frozen copy of the model is held.
        shards: Devices that share weights, gradients and states (FSDP2); 1 shares nothing.
        buckets: True if whole models on several devices average gradients, which DDP copies.
        whole_gradients: True if each of them adds up whole gradients until the end of a step; None:
            not decided.
        tokens: Of a micro-batch.
        checkpointing: True if activations are computed again in the backward pass.
        moving_reference: True if the live reference follows the policy.
    """

    kind: str
    weight_bytes: int
    compute_bytes: int
    masters: bool
    autocast: bool
    optimizer: str
    adapters: AdapterFacts | None
    live_reference: bool
    shards: int
    buckets: bool
    whole_gradients: bool | None
    tokens: int
    checkpointing: bool
    moving_reference: bool = False


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one device at the busiest moment of a step.

    Attributes:
        weights: Of the policy, as it computes, or its shards; adapters too.
        masters: The float32 weights behind rounded ones.
        reference: A live reference, and the float32 values of one that moves.
        gradients: Of what is trained.
        optimizer: The moments.
        gathered: Of a sharded model what is whole for a while; DDP's buckets; 4-bit weights that
            are unpacked.
        activations: All else: what the backward pass needs, temporaries, the head's scores,
            autocast's copies.
        device: The CUDA context, and what fragments take.
    """

    weights: int
    masters: int
    reference: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    device: int

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


def in_gib(size: float) -> str:
    """A number of GiB, to three digits."""
    value = size / GIB
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"
