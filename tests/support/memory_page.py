"""The table of docs/memory.md, written by the formulas: ``python -m tests.support.memory_page``."""

from __future__ import annotations

from dataclasses import replace

from dpo_lightning.memory.footprint import ModelShape, Training, footprint, in_gib

DEVICES = (1, 8, 64)
TOKENS = 4096
RANK = 16
# (layers, hidden, intermediate, heads, key heads, vocabulary), head and embeddings apart but at 1B.
SHAPES = {
    "1B": (16, 2048, 8192, 32, 8, 128256),
    "8B": (32, 4096, 14336, 32, 8, 128256),
    "70B": (80, 8192, 28672, 64, 8, 128256),
}


def shape(name: str) -> ModelShape:
    """The shape of a Llama, by hand: four attention and three feed-forward matrices, two norms."""
    layers, hidden, intermediate, heads, key_heads, vocabulary = SHAPES[name]
    size = hidden // heads
    sides = [(hidden, hidden), (hidden, key_heads * size), (hidden, key_heads * size),
             (hidden, hidden), *[(hidden, intermediate)] * 3]  # fmt: skip
    linear = sum(a * b for a, b in sides)
    layer = linear + 2 * hidden
    embeddings = vocabulary * hidden * (1 if name == "1B" else 2)
    return ModelShape(
        parameters=layers * layer + embeddings + hidden,
        layers=layers,
        layer_parameters=layer,
        linear_parameters=linear,
        linear_sides=sum(a + b for a, b in sides),
        largest=vocabulary * hidden,
        vocabulary=vocabulary,
        hidden=hidden,
        heads=heads,
        key_heads=key_heads,
        head_size=size,
        intermediate=intermediate,
    )


FULL = Training(
    weight_bytes=4, compute_bytes=2, masters=True, autocast=False, optimizer="adamw",
    trained=None, four_bit=False, live_reference=False, shards=1, buckets=False,
    whole_gradients=False,
    tokens=TOKENS, checkpointing=True, keys=0, head_scores=1 << 25, head_kept=1 << 27,
)  # fmt: skip


def ways(model: ModelShape) -> dict[str, Training]:
    """Ways to train on one device, by their names in the table."""
    half = replace(FULL, weight_bytes=2, masters=False)
    lora = replace(FULL, trained=model.lora_parameters(RANK))
    return {
        "float32 weights": FULL,
        "bfloat16": half,
        "bfloat16, 8-bit Adam": replace(half, optimizer="adamw_8bit"),
        "LoRA": lora,
        "QLoRA": replace(lora, four_bit=True),
    }


def table() -> list[str]:
    """Lines of the table: GiB of each device."""
    lines = ["| model | trained | " + " | ".join(
        "1 device" if n == 1 else f"{n} devices" for n in DEVICES) + " |",
        "|---|---|" + "---:|" * len(DEVICES)]  # fmt: skip
    for name in SHAPES:
        model = shape(name)
        for way, alone in ways(model).items():
            cells = []
            for devices in DEVICES:
                sharded = replace(alone, shards=devices, masters=alone.masters and devices == 1)
                if alone.trained is not None and devices > 1:  # whole on each: strategy=ddp
                    sharded = replace(alone, weight_bytes=2, masters=False, buckets=True)
                cells.append(in_gib(footprint(model, sharded).total))
            lines.append(f"| {name} | {way} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
