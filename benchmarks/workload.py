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


SIZES = {
    # 20 million parameters: what two cores can train.
    "small": Size(8192, 384, 1024, 8, 6, 6),
    # 1.2 billion, the shape of Llama 3.2 1B with a smaller vocabulary.
    "1b": Size(32768, 2048, 8192, 16, 32, 8),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens; with ``sigma`` they are lognormal around these medians."""

    prompt: int
    response: int
    sigma: float = 0.0


SHAPES = {
    "lognormal": Shape(96, 48, 0.6),
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


def make_rows(path: Path, shape: Shape, *, count: int, vocabulary: int, seed: int = 0) -> None:
    """Writes pairs of random words; the response's end token comes on top of its length."""
    draw = np.random.default_rng(seed)

    def length(median: int) -> int:
        return int(np.clip(np.rint(median * np.exp(shape.sigma * draw.normal())), 4, LONGEST // 2))

    def text(tokens: int) -> str:
        # Not the special ones.
        return " ".join(f"w{i}" for i in draw.integers(vocabulary - len(SPECIAL), size=tokens))

    with path.open("w") as file:
        for _ in range(count):
            prompt = text(length(shape.prompt))
            chosen, rejected = (text(length(shape.response) - 1) for _ in range(2))
            row = {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
            file.write(json.dumps(row) + "\n")
