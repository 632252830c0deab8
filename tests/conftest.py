"""Settings that all tests share: one thread each, no network, data beside the checkout if any."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Two busy processes with spinning threads make every test slower and none more right.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference log-probabilities of the tests, apart from those of whoever runs them."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["DPO_LIGHTNING_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real preference data and a real tiny model; absent on most machines."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no real data beside the checkout")
    return SHARED


@dataclass(frozen=True)
class Run:
    """A finished run, as other programs see it."""

    code: int
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    @property
    def rows(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def run_train(folder: Path, *overrides: str, logger: str = "none") -> Run:
    """Trains in this process, which saves the imports, through the same front door."""
    from dpo_lightning.cli import main

    arguments = [f"hydra.run.dir={folder}", f"logger={logger}", "trainer.threads=1", *overrides]
    return Run(main(arguments), folder)


# Small and quick, but with every kind of group the task has.
TINY = (
    "data.controlled.train_groups=96",
    "data.controlled.eval_groups=40",
    "data.batch_size=16",
    "evaluation.samples=0",
)


def byte_tokenizer(*, eos: bool = True, pad: bool = True) -> Any:
    """A tokenizer of single bytes: every text is tokens, none is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **named, **({"pad_token": "<pad>"} if pad else {})
    )


def tiny_llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    values = {
        "vocab_size": 259,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaConfig(**(values | changes))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random one-layer Llama that reads bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_llama_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pairs on thirty prompts."""
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Add {i // 2} and {i % 7}.",
            "chosen": f" It is {i // 2 + i % 7}.",
            "rejected": f" No idea{'!' * (i % 4)}",
        }
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
