"""The work that every arm does: a random Llama, a tokenizer of words, and rows of given lengths.

Each word of a row is one token, so all arms see the same ids, in the order of the file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

SPECIAL = ("<s>", "</s>", "<pad>")


@dataclass(frozen=True, slots=True)
class Size:
    """A model's shape."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int

    def describe(self) -> dict[str, int]:
        """The shape as a dict, for the results."""
        return asdict(self)


SIZES = {
    # 0.1 million parameters: what shows that a program runs.
    "toy": Size(512, 64, 128, 2, 2, 2),
    # 20 million parameters: what two cores can train.
    "small": Size(8192, 384, 1024, 8, 6, 6),
    # 0.4 billion: all of its weights are trained on a card of 24 GB.
    "half": Size(32768, 1024, 4096, 24, 16, 8),
    # 1.2 billion, the shape of Llama 3.2 1B with a smaller vocabulary.
    "1b": Size(32768, 2048, 8192, 16, 32, 8),
    # 7.2 billion, the shape of Llama 3.1 8B with a smaller vocabulary.
    "8b": Size(32768, 4096, 14336, 32, 32, 8),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens; with ``sigma`` they are lognormal around these medians."""

    prompt: int
    response: int
    sigma: float = 0.0


SHAPES = {
    "lognormal": Shape(96, 48, 0.6),
    # Half of those lengths, for what trains many runs.
    "short": Shape(48, 24, 0.6),
    "64/128": Shape(64, 128),
    "128/128": Shape(128, 128),
    "256/64": Shape(256, 64),
}
LONGEST = 1024


def make_model(folder: Path, size: Size) -> None:
    """Writes a random Llama and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(size.vocabulary - len(SPECIAL))]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        max_position_embeddings=2 * LONGEST,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "size.json").write_text(json.dumps(asdict(size)))


def make_adapter(model: Path) -> Path:
    """Writes a LoRA adapter of rank 16 on all linear layers, from which all arms start alike."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = model / "adapter"
    if not folder.exists():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        settings = LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        get_peft_model(base, settings).save_pretrained(str(folder))
    return folder


def make_rows(
    path: Path,
    shape: Shape,
    *,
    count: int,
    vocabulary: int,
    seed: int = 0,
    longest: int = LONGEST // 2,
) -> None:
    """Writes pairs of random words; the response's end token comes on top of its length."""
    draw = np.random.default_rng(seed)

    def length(median: int) -> int:
        return int(np.clip(np.rint(median * np.exp(shape.sigma * draw.normal())), 4, longest))

    def text(tokens: int) -> str:
        # Not the special ones.
        return " ".join(f"w{i}" for i in draw.integers(vocabulary - len(SPECIAL), size=tokens))

    with path.open("w") as file:
        for _ in range(count):
            prompt = text(length(shape.prompt))
            chosen, rejected = (text(length(shape.response) - 1) for _ in range(2))
            row = {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
            file.write(json.dumps(row) + "\n")


@dataclass(frozen=True, slots=True)
class Workload:
    """A model and its rows on disk.

    Attributes:
        model: The model's folder.
        rows: The rows.
        ordered: The same rows in the order in which they are trained on.
        lengths: Tokens of prompt, chosen and rejected response of the ordered rows.
        size: The model's shape.
    """

    model: Path
    rows: Path
    ordered: Path
    lengths: tuple[tuple[int, int, int], ...]
    size: Size

    @classmethod
    def make(cls, folder: Path, size: Size, shape: Shape, *, rows: int) -> Workload:
        """Writes a model, its tokenizer and rows, and returns the workload."""
        from dpo_lightning.data.packing import epoch_order

        folder.mkdir(parents=True)
        make_model(folder / "model", size)
        path, ordered = folder / "rows.jsonl", folder / "ordered.jsonl"
        make_rows(path, shape, count=rows, vocabulary=size.vocabulary)
        lines = path.read_text().splitlines()
        # A run with seed 1 takes them in this order; TRL is told to keep to the file's.
        lines = [lines[i] for i in epoch_order(rows, seed=1, epoch=0)]
        ordered.write_text("".join(f"{line}\n" for line in lines))
        parsed = [json.loads(line) for line in lines]
        # A response ends with a token that is not in its text.
        lengths = tuple(
            (
                len(row["prompt"].split()),
                len(row["chosen"].split()) + 1,
                len(row["rejected"].split()) + 1,
            )
            for row in parsed
        )
        return cls(folder / "model", path, ordered, lengths, size)

    def options(self) -> dict[str, Path]:
        """Options of an arm: the model and its rows."""
        return {"model": self.model, "rows": self.rows, "ordered": self.ordered}

    def flops(self, pairs: int, steps: int, *, frozen: bool = False) -> list[float]:
        """FLOPs that each step needs at least: each prompt once, no padding, no reference.

        3 (2 N T + 2 H (C + R) + attention) for a pair, with N the weights of the layers and H those
        of the head. Frozen weights have no gradient, which takes a third of their products away.
        """
        passes = 2 if frozen else 3
        size = self.size
        key_width = size.hidden * size.key_heads // size.heads
        layer = 2 * size.hidden * (size.hidden + key_width) + 3 * size.hidden * size.intermediate
        weights = size.layers * layer
        head = size.vocabulary * size.hidden
        found = []
        for step in range(steps):
            total = 0.0
            for p, c, r in self.lengths[step * pairs : (step + 1) * pairs]:
                attention = 2 * size.layers * size.hidden * ((p + c) ** 2 + (p + r) ** 2 - p**2)
                products = 2 * weights * (p + c + r) + 2 * head * (c + r)
                total += passes * products + 3 * attention
            found.append(total)
        return found
