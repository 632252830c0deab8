"""Stand-ins for what the pages name and a machine of the tests lacks: rows, models, runs.

A model or a data set of the hub is a folder of its name in the working folder, which is taken for
it: random weights of a few thousand parameters that read bytes, and rows of a few words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMALLER = {
    "trainer.max_steps": "16",
    "evaluation.max_new_tokens": "16",
    "data.controlled.train_groups": "1024",
    "logger": "none",
}
"""Settings that each training of a page is given, unless it types them, so that all of them take
minutes and nobody's account of wandb is needed: the one place where what is run is not what stands
there. A run that is resumed has settings already, `debug=` and `trainer.max_epochs=` say themselves
how long it is."""

MONITORED = {"evaluation.every_n_steps": "8"}
"""The same for a training that selects checkpoints: so short a one has evaluations on the way only
where their interval is set."""

FEWER = {
    "rounds.count=16": "rounds.count=4",
    "rounds.count=64": "rounds.count=2",
    "reference.sync_every=64": "reference.sync_every=4",
    "reference.sync_every=128": "reference.sync_every=8",
    "reference.sync_every=null,64": "reference.sync_every=null,4",
}
"""Words of the pages that have no meaning within so few steps, or take minutes, and those that
take their place."""

_OWN_LENGTH = ("resume", "debug", "trainer.max_epochs", "rounds.steps")
_OF_THE_TASK = ("experiment=frontier", "experiment=closed_form")

LLAMAS = (
    *("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    *("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct"),
    *("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B-Instruct-2507"),
    *("princeton-nlp/Llama-3-Base-8B-SFT", "alignment-handbook/zephyr-7b-sft-full"),
)
"""Models of the pages; each stands in by the same tiny Llama."""

JUDGE = "Skywork/Skywork-Reward-V2-Qwen3-0.6B"
"""The reward model of the pages."""

DATA_SETS = {"HuggingFaceH4/ultrafeedback_binarized": ("train_prefs", "test_prefs")}
"""Data sets of the pages, with the splits that they name."""

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

_ROWS = 120


def smaller(words: Sequence[str]) -> list[str]:
    """Words of a command with :data:`SMALLER` and :data:`FEWER`, where it trains.

    Args:
        words: The command and its words, as they are typed.
    """
    if words[:1] != ["train"]:
        return list(words)
    keys = {word.partition("=")[0].lstrip("+~") for word in words}
    monitored = MONITORED if "checkpoint.monitor" in keys else {}
    added = {key: value for key, value in (SMALLER | monitored).items() if key not in keys}
    if keys & {*_OWN_LENGTH}:
        added.pop("trainer.max_steps", None)
    experiments = [word for word in words if word.startswith("experiment=")]
    if keys & {"data", "data.train"} or {*experiments} - {*_OF_THE_TASK}:
        added.pop("data.controlled.train_groups", None)
    changed = [FEWER.get(word, word) for word in words]
    return [*changed, *(f"{key}={value}" for key, value in added.items())]


def make_models(folder: Path) -> None:
    """Writes the tiny Llama into ``llama``, and the judge into ``judge``.

    Args:
        folder: Where.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

    from tests.support.models import byte_tokenizer, tiny_llama_config

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = tiny_llama_config(max_position_embeddings=4096)
    models = {
        "llama": AutoModelForCausalLM.from_config(config),
        "judge": LlamaForSequenceClassification(
            tiny_llama_config(max_position_embeddings=4096, num_labels=1)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def lay_out(folder: Path, models: Path) -> None:
    """Puts into a folder what a reader of the pages has there.

    Args:
        folder: The working folder.
        models: What :func:`make_models` wrote.
    """
    for name in (*LLAMAS, JUDGE):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(models / ("judge" if name == JUDGE else "llama"))
    pairs = [pair(number) for number in range(_ROWS)]
    for name in ("pairs.jsonl", "shards/1.jsonl", "clone/train.jsonl"):
        _write(folder / name, pairs)
    held_out = [pair(number) | {"source": "ab"[number % 2]} for number in range(_ROWS, _ROWS + 40)]
    for name in ("other.jsonl", "clone/test.jsonl"):
        _write(folder / name, held_out)
    more = [",".join(map(str, pair(number).values())) for number in range(200, 230)]
    (folder / "more.csv").write_text("\n".join(["prompt,chosen,rejected", *more]) + "\n")
    _write(
        folder / "duels.jsonl",
        [
            {
                "prompt": own["prompt"],
                **{"answer_a": own["chosen"], "answer_b": own["rejected"], "winner": "model_a"},
                **{"score_a": 0.5, "score_b": 0.25},
            }
            for own in pairs
        ],
    )
    _rated(folder)
    for name, splits in DATA_SETS.items():
        for split in splits:
            _write(folder / name / f"{split}.jsonl", [conversation(split, n) for n in range(40)])
    _answers(folder)
    (folder / "my_scorers.py").write_text(
        "def brevity(prompts, answers):\n    return [-len(answer) for answer in answers]\n"
    )


def _rated(folder: Path) -> None:
    """Answers that people rated, one by one: by thumbs, by stars, in conversations."""
    alone = [(pair(number), number % 3 > 0) for number in range(_ROWS)]
    found = [
        {"prompt": own["prompt"], "response": own["chosen" if good else "rejected"], "label": good}
        for own, good in alone
    ]
    _write(folder / "thumbs.jsonl", found)
    stars = [row | {"rating": 5 if row["label"] else 2} for row in found]
    rows = [{key: row[key] for key in ("prompt", "response", "rating")} for row in stars]
    _write(folder / "rated.jsonl", rows)
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"], "rating": row["rating"]},
            ]
        }
        for row in stars
    ]
    _write(folder / "chats.jsonl", chats)


def _answers(folder: Path) -> None:
    """Prompts, answers of another model to them, and the questions of both benchmarks."""
    asked = [f"Name {number} colours." for number in range(1, 7)]
    _write(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in asked])
    known = [{"prompt": prompt, "response": " I do not know"} for prompt in asked]
    _write(folder / "baseline.jsonl", known)
    questions = [{"instruction": prompt, "dataset": "helpful_base"} for prompt in asked]
    (folder / "alpaca_eval.json").write_text(json.dumps(questions))
    _write(
        folder / "question.jsonl",
        [
            {"uid": str(number), "category": "hard_prompt", "prompt": prompt}
            for number, prompt in enumerate(asked)
        ],
    )


def pair(number: int) -> dict[str, Any]:
    """A row of text.

    Args:
        number: Its number, on which its prompt and responses depend.
    """
    return {
        "prompt": f"Add {number} and {number % 7}.",
        "chosen": f" It is {number + number % 7}.",
        "rejected": f" No idea{'!' * (number % 4)}",
    }


def conversation(split: str, number: int) -> dict[str, Any]:
    """A row of whole conversations, as UltraFeedback has them.

    Args:
        split: Name of its split.
        number: Its number.
    """
    question = {"role": "user", "content": f"{split} {number}"}
    found: dict[str, Any] = {"prompt": question["content"]}
    for side, word in (("chosen", "yes"), ("rejected", "no")):
        found[side] = [question, {"role": "assistant", "content": f"{word} {number}"}]
    return found


def _write(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
