"""Rows of messages through a whole run: thoughts, tools, a begun answer, one bad row, a day."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.conversations import chat_tokenizer, trl_template
from tests.support.models import tiny_llama_config
from tests.support.runs import run_train

QUIET = ("evaluation.samples=2", "evaluation.max_new_tokens=3", "evaluation.partition_samples=0")
DATED = (
    "{{ strftime_now('%d %b %Y %H:%M:%S') }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token }}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random Llama that reads bytes, and a real chat template."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer(trl_template("qwen3"))
    torch.manual_seed(0)
    config = tiny_llama_config(vocab_size=len(tokenizer), max_position_embeddings=1024)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def message(role, content, **extra):
    return {"role": role, "content": content, **extra}


def pairs(count, *, last=None):
    """Pairs of messages; the last prompt may be given."""
    rows = [
        {
            "prompt": [message("user", f"Tell me of {number}.")],
            "chosen": [message("assistant", f"It is {number}.")],
            "rejected": [message("assistant", "No.")],
        }
        for number in range(count)
    ]
    if last is not None:
        rows[-1]["prompt"] = last
    return rows


@pytest.fixture
def train(model, tmp_path, monkeypatch):
    """Trains on rows for two steps; the token ids that were kept come with it."""
    monkeypatch.setenv("DPO_LIGHTNING_CACHE", str(tmp_path / "cache"))

    def start(rows, *overrides, name="run"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run_train(
            tmp_path / name,
            f"model.pretrained={model}",
            f"data.train={path}",
            "trainer.max_steps=2",
            "data.batch_size=4",
            *QUIET,
            *overrides,
        )

    return start


def kept_texts(folder, tokenizer):
    """Prompts and responses of the only file of kept token ids, as text."""
    [path] = folder.glob("tokens/*.safetensors")
    arrays = load_file(path)
    parts = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
    return [tokenizer.decode(part) for part in parts]


def test_answers_are_drawn_behind_what_is_trained_on(train, model, tmp_path, capfd):
    begun = [message("user", "Tell me."), message("assistant", "Once upon")]
    run = train(pairs(12, last=begun), "data.chat_template_kwargs.enable_thinking=false")
    assert run.code == 0
    assert run.values("train/loss")[0] == pytest.approx(np.log(2), abs=1e-5)
    said = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert r"a scored answer begins behind '<|im_end|>\n<|im_start|>assistant\n<think>" in said
    assert "options: enable_thinking=False" in said
    texts = kept_texts(tmp_path / "cache", AutoTokenizer.from_pretrained(model))
    empty = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert texts[0].endswith(empty)
    assert texts[1].startswith("It is 0.")
    assert texts[-3].endswith(f"{empty}Once upon")
    assert texts[-2].startswith("It is 11.")
    samples = json.loads((run.folder / "evaluation.json").read_text())["samples"]
    # Special tokens are left out, so the end is what the prompts of the training end with.
    assert samples
    assert all("<think>\n\n</think>" in sample["prompt"] for sample in samples)


def test_one_row_that_the_template_refuses_is_set_aside(train, tmp_path, caplog):
    picky = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}"
        "{% endif %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    template = tmp_path / "picky.jinja"
    template.write_text(picky)
    rows = pairs(30, last=[message("user", "no")])
    setting = f"data.chat_template={template}"
    with caplog.at_level(logging.ERROR):
        assert train(rows, setting, name="stop").code == 2
    error = json.loads((tmp_path / "stop" / "result.json").read_text())["error"]
    assert "stop.jsonl:30: prompt: the chat template refuses a conversation" in error
    assert "not that" in error
    run = train(rows, setting, "data.on_bad_row=skip", name="skip")
    assert run.code == 0
    assert run.result["data"]["dropped"] == {"not_rendered": 1}
    [line] = (run.folder / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["source"].endswith("skip.jsonl:30")


@pytest.mark.slow
def test_a_resume_has_the_day_of_its_run(train, tmp_path, capfd):
    rows = pairs(12)
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)
    setting = f"data.chat_template={template}"
    first = train(rows, setting)
    assert first.code == 0
    assert "data.template_date=2026-01-01" in capfd.readouterr().out
    train(rows, setting, "data.template_date=2020-02-02", name="other")
    assert len([*(tmp_path / "cache" / "tokens").glob("*.safetensors")]) == 2
    resumed = (setting, f"resume={first.folder}", "trainer.max_steps=3")
    assert train(rows, *resumed, f"hydra.run.dir={tmp_path / 'on'}").code == 0
    assert len([*(tmp_path / "cache" / "tokens").glob("*.safetensors")]) == 2
    error = train(rows, *resumed, "data.template_date=2020-02-02", name="off").result["error"]
    assert "made with data.template_date=2026-01-01" in error
    assert "this run has data.template_date=2020-02-02" in error
