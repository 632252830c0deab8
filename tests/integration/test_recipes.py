"""The published recipes of ``conf/experiment/recipes``: each as far as it goes without its GPUs."""

import json
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM

from dpo_lightning import preflight
from dpo_lightning.settings.schema import CONF, Config
from dpo_lightning.settings.store import register
from dpo_lightning.settings.validation import validate
from tests.support.inspected import inspect_json
from tests.support.models import byte_tokenizer, tiny_llama_config

RECIPES = sorted(path.stem for path in (CONF / "experiment" / "recipes").glob("*.yaml"))

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

INSTRUCT = [
    *("beta=2.5", "loss.gamma=1.375", "optimizer.lr=1e-6"),
    "model.pretrained=meta-llama/Meta-Llama-3-8B-Instruct",
    *("data.train=princeton-nlp/llama3-ultrafeedback", "data.train_split=train"),
    "data.eval_split=test",
]
"""The other start of SimPO, as the recipe's comment has it."""


def composed(*words: str) -> Config:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return validate(compose("config", [*words]))


def spoken(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a model of bytes with 4,096 positions, and of rows in the data sets' form.

    Both data sets hold whole conversations under ``chosen`` and ``rejected``; UltraFeedback has two
    splits, which are a folder's files here.
    """
    folder = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(0)
    config = tiny_llama_config(max_position_embeddings=4096)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    for split, count in (("train", 200), ("train_prefs", 200), ("test_prefs", 8)):
        rows = [
            {
                "prompt": f"{split} {i}",
                "chosen": spoken(f"{split} {i}", f"yes {i}"),
                "rejected": spoken(f"{split} {i}", f"no {i}"),
            }
            for i in range(count)
        ]
        path = folder / "rows" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"model.pretrained={folder / 'model'}", f"data.train={folder / 'rows'}"]


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (
            ["recipes/zephyr_dpo"],
            {
                *{("beta", 0.01), ("optimizer.lr", 5e-7), ("optimizer.schedule", "cosine")},
                *{("loss.name", "sigmoid"), ("data.max_length", 1024)},
                *{("model.pretrained", "alignment-handbook/zephyr-7b-sft-full")},
                *{("data.train", "HuggingFaceH4/ultrafeedback_binarized")},
            },
        ),
        (
            ["recipes/simpo_llama3_8b"],
            {
                *{("beta", 2.0), ("loss.gamma", 1.0), ("optimizer.lr", 6e-7)},
                *{("loss.name", "simpo"), ("data.max_length", 2048)},
                *{("model.pretrained", "princeton-nlp/Llama-3-Base-8B-SFT")},
            },
        ),
        (
            ["recipes/simpo_llama3_8b", *INSTRUCT],
            {("beta", 2.5), ("loss.gamma", 1.375), ("data.eval_split", "test")},
        ),
        (
            ["recipes/olmo2_dpo"],
            {
                *{("beta", 5.0), ("optimizer.lr", 1e-6), ("optimizer.schedule", "linear")},
                *{("loss.name", "sigmoid_norm"), ("data.max_length", 2048)},
                *{("data.train", "allenai/olmo-2-1124-7b-preference-mix")},
            },
        ),
    ],
    ids=["zephyr_dpo", "simpo_llama3_8b", "simpo-instruct", "olmo2_dpo"],
)
def test_a_recipe_has_the_published_settings(words: list[str], facts: set) -> None:
    """gamma_beta_ratio times beta is gamma: 0.5 x 2 = 1, and 0.55 x 2.5 = 1.375.

    The batches are 8 x 2 x 8, 2 x 16 x 4 and 1 x 4 x 32 pairs, 128 in all three.
    """
    config = composed(f"experiment={words[0]}", *words[1:])
    found = {(key, value_of(config, key)) for key, _ in facts}
    assert found == facts
    assert (config.data.batch_size, config.trainer.max_epochs) == (128, 1)
    assert (config.optimizer.warmup, config.optimizer.weight_decay) == (0.1, 0.0)
    assert (config.strategy.name, config.seed) == ("fsdp", 42)


def value_of(config: Config, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_its_sources_and_that_it_was_not_run(name: str) -> None:
    text = (CONF / "experiment" / "recipes" / f"{name}.yaml").read_text()
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert "NOT RUN HERE" in comment
    assert "Figures to reach" in comment
    assert "arXiv" in comment
    assert f"experiment=recipes/{name}`" in comment
    assert text.startswith("# @package _global_\n")
    # The file that the settings are of, as it was at a commit; and whose figures these are.
    settings, figures = comment.split("Settings: ")[1].split("Figures to reach")
    assert re.match(r"[\w-]+/[\w-]+, \S+\.(yaml|sh) at [0-9a-f]{7}\b", settings)
    figures = figures.split("Different here")[0]
    assert re.search(r"\d\.\d", figures)
    assert re.search(r"README of [\w-]+/[\w-]+ at [0-9a-f]{7}|model cards?\b", figures)


@pytest.mark.slow  # reads and tokenizes two hundred rows with a model
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_inspects_on_a_stand_in(name: str, stand_in: list[str], capsys) -> None:
    """Two hundred rows and batches of 128 are two steps; OLMo holds one prompt of them out."""
    found = inspect_json(capsys, f"experiment=recipes/{name}", *stand_in)
    held_out = 1 if name == "olmo2_dpo" else 8
    used = 199 if name == "olmo2_dpo" else 200
    assert (found["groups"]["train"], found["groups"]["eval"]) == (used, held_out)
    assert found["plan"]["steps"] == 2
    assert found["dropped"] == {}
    assert found["refused"] == []
    # Nothing of the rows is lost: the prompt that is said twice is in the conversation.
    assert found["rows"]["train"]["unread"] in ([], ["prompt"])


@pytest.mark.slow  # traces a step of each
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_preflights_on_a_stand_in(name: str, stand_in: list[str], capsys) -> None:
    code = preflight.main([f"experiment=recipes/{name}", *stand_in, "--gib=80"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "strategy fsdp" in said.out


def test_a_wrong_recipe_is_answered_with_those_there_are(capsys, monkeypatch, tmp_path: Path):
    from dpo_lightning import cli

    monkeypatch.chdir(tmp_path)
    assert cli.main(["experiment=recipes/zephyr"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: experiment=recipes/zephyr: ")
    assert "recipes/zephyr_dpo" in error
    assert error.count("\n") == 1
