"""The tables of docs/memory.md, traced: ``python -m tests.support.memory_page`` prints them."""

from __future__ import annotations

from dataclasses import replace

from transformers import LlamaConfig

from dpo_lightning.memory.footprint import AdapterFacts, Training, in_gib
from dpo_lightning.memory.lengths import GroupLengths
from dpo_lightning.memory.step_memory import StepMemory
from dpo_lightning.training.traced import traced_optimizer

DEVICES = (1, 8, 64)
TOKENS = 4096
RANK = 16
# (layers, hidden, intermediate, heads, key heads, vocabulary), head and embeddings apart but at 1B.
SHAPES = {
    "1B": (16, 2048, 8192, 32, 8, 128256),
    "8B": (32, 4096, 14336, 32, 8, 128256),
    "70B": (80, 8192, 28672, 64, 8, 128256),
}


def config_of(name: str) -> LlamaConfig:
    """A Llama of one of the sizes."""
    layers, hidden, intermediate, heads, key_heads, vocabulary = SHAPES[name]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=name == "1B",
    )


FULL = Training(
    kind="cuda",
    weight_bytes=4,
    compute_bytes=2,
    masters=True,
    autocast=False,
    optimizer="adamw",
    adapters=None,
    live_reference=False,
    shards=1,
    buckets=False,
    whole_gradients=False,
    tokens=TOKENS,
    checkpointing=True,
)


def ways() -> dict[str, Training]:
    """Ways to train on one device, by their names in the table."""
    half = replace(FULL, weight_bytes=2, masters=False)
    return {
        "float32 weights": FULL,
        "bfloat16": half,
        "bfloat16, 8-bit Adam": replace(half, optimizer="adamw_8bit"),
        "LoRA": replace(FULL, adapters=AdapterFacts(RANK)),
        "QLoRA": replace(FULL, adapters=AdapterFacts(RANK, four_bit=True)),
    }


def table() -> list[str]:
    """Lines of the table: GiB of each device."""
    lines = ["| model | trained | " + " | ".join(
        "1 device" if n == 1 else f"{n} devices" for n in DEVICES) + " |",
        "|---|---|" + "---:|" * len(DEVICES)]  # fmt: skip
    lengths = GroupLengths((512, 256, 256), (512, 256, 256))
    for name in SHAPES:
        memory = StepMemory(config_of(name), make_optimizer=traced_optimizer, lengths=lengths)
        for way, alone in ways().items():
            cells = []
            for devices in DEVICES:
                sharded = replace(alone, shards=devices, masters=alone.masters and devices == 1)
                whole = alone.adapters is not None and alone.adapters.four_bit
                if whole and devices > 1:  # on each: strategy=ddp
                    sharded = replace(alone, weight_bytes=2, masters=False, buckets=True, shards=1)
                cells.append(in_gib(memory.footprint(sharded).total))
            lines.append(f"| {name} | {way} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
