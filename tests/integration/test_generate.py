"""The commands ``generate`` and ``chat``: from a run's or a sweep's folder to answers."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dpo_lightning.data.templates import PLAIN_CHAT_TEMPLATE
from dpo_lightning.plugins import SAMPLERS, register_sampler
from dpo_lightning.run.answering.chat import main as chat
from dpo_lightning.sweeps.generate.command import main as generate
from tests.support.runs import TINY, Run, run_train
from tests.support.vllm_module import install

# Both train, or load models, a few times.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Six large steps on the embedded task, in the folder of a sweep."""
    folder = tmp_path_factory.mktemp("sweep") / "beta-0.5"
    found = run_train(
        folder,
        *TINY,
        "trainer.accelerator=cpu",
        "evaluation.partition_samples=0",
        "beta=0.5",
        "optimizer.lr=4e-3",
    )
    assert found.code == 0
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "sun snow", "id": 1}, {"prompt": "fog calm"}, {"prompt": "rain calm"}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def answers(path: Path) -> list[str]:
    return [json.loads(line)["response"] for line in path.read_text().splitlines()]


def refusal(capsys, *words: object) -> str:
    capsys.readouterr()
    assert generate([*map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()[-1]


def test_a_run_answers_and_says_how(run, prompts, tmp_path, capsys):
    """Order and batch do not matter; a beta at infinity's end is the reference, its own the run."""
    path = tmp_path / "answers.jsonl"
    before = sorted(p.name for p in run.folder.rglob("*"))
    assert generate([str(run.folder), str(prompts), "--output", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first = [json.loads(line) for line in path.read_text().splitlines()]
    assert [list(row) for row in first] == [
        ["prompt", "id", "response"],
        ["prompt", "response"],
        ["prompt", "response"],
    ]
    assert (found["files"][0]["path"], found["files"][0]["answers"]) == (str(path), 3)
    said = yaml.safe_load(Path(found["files"][0]["settings"]).read_text())
    assert (said["seed"], said["temperature"], said["generator"]) == (1, 1.0, "beta-0.5")
    prompts.write_text("".join(reversed(prompts.read_text().splitlines(keepends=True))))
    other = tmp_path / "turned.jsonl"
    words = [str(run.folder), str(prompts), "--output", str(other), "evaluation.batch_size=1"]
    assert generate(words) == 0
    assert answers(other) == answers(path)[::-1]
    own = tmp_path / "own.jsonl"
    assert generate([str(run.folder), str(prompts), "--output", str(own), "at_beta=0.5"]) == 0
    assert answers(own) == answers(other)
    assert sorted(p.name for p in run.folder.rglob("*")) == before


def test_what_cannot_be_is_refused_before_anything_is_written(run, prompts, tmp_path, capsys):
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    words = (run.folder, prompts, "--output", there)
    assert "it is there already" in refusal(capsys, *words)
    assert there.read_text() == "mine"
    assert "must be a number at least 0" in refusal(capsys, *words, "--temperature", "-1")
    assert "it is one of jsonl" in refusal(capsys, *words, "--format", "csv")
    assert "takes --format" in refusal(capsys, *words, "beta2=1")
    new = tmp_path / "new.jsonl"
    assert "give at least 0.005" in refusal(
        capsys, run.folder, prompts, "--output", new, "--at-beta=0.001"
    )
    assert "nothing is written into the run's folder" in refusal(
        capsys, run.folder, prompts, "--output", run.folder / "a.jsonl"
    )
    assert "reads .json files" in refusal(
        capsys, run.folder, _alpaca(tmp_path), "--output", new, "--format", "alpaca_eval"
    )
    prompts.write_text('{"prompt": "sun"}\n{"prompt": "hello"}\n')
    assert f"{prompts}:2: hello: the bundled model" in refusal(
        capsys, run.folder, prompts, "--output", new
    )
    assert not new.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "alpaca.json",
        "prompts.jsonl",
        "there.jsonl",
    ]


def _alpaca(folder: Path) -> Path:
    path = folder / "alpaca.json"
    path.write_text(json.dumps([{"instruction": "sun snow", "dataset": "weather"}]))
    return path


def test_a_sweep_gives_a_file_a_trial_and_keeps_what_is_there(run, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    for name in ("beta-0.5", "beta-1"):
        shutil.copytree(run.folder, sweep / name, ignore=shutil.ignore_patterns("checkpoints"))
    (sweep / "beta-2").mkdir()
    (sweep / "beta-2" / "result.json").write_text('{"status": "diverged"}')
    (sweep / "sweep.json").write_text("{}")
    out = tmp_path / "out"
    words = [str(sweep), str(_alpaca(tmp_path)), "--format", "alpaca_eval", "--output", str(out)]
    assert generate([*words, "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["skipped"] == [{"trial": "beta-2", "status": "diverged"}]
    assert "beta-2: skipped: the trial is diverged" in said.err
    assert f"judge     for f in {out}/beta-0.5.json {out}/beta-1.json; do alpaca_eval" in said.err
    assert f"--precomputed_leaderboard {out}/leaderboard.csv" in found["judge"][0]
    assert f"report {sweep} --marks {out}/leaderboard.csv" in said.err
    for name in ("beta-0.5", "beta-1"):
        [row] = json.loads((out / f"{name}.json").read_text())
        assert (row["generator"], row["dataset"]) == (name, "weather")
    assert sorted(p.name for p in out.glob("*.json")) == ["beta-0.5.json", "beta-1.json"]
    (out / "beta-1.json").unlink()
    assert generate([*words, "--json"]) == 0
    kept = [entry["kept"] for entry in json.loads(capsys.readouterr().out)["files"]]
    assert kept == [True, False]
    assert "it is there already" in refusal(capsys, *words, "--seed", "2")
    assert "has its folder's name" in refusal(capsys, *words, "--name", "mine")


def test_another_backend_answers(run, prompts, tmp_path, capsys):
    seen = []

    @register_sampler("fixed")
    def fixed(wanted):
        seen.append((wanted.weights(), list(wanted.limits)))
        # It is the model as transformers made it.
        drawn = wanted.model().generate(torch.tensor([[1, 2]]), max_new_tokens=1)
        assert drawn.shape == (1, 3)
        return [[1, 2, wanted.ends[0]] for _ in wanted.prompts]

    try:
        path = tmp_path / "a.jsonl"
        words = [str(run.folder), str(prompts), "--output", str(path), "generation.backend=fixed"]
        assert generate(words) == 0
        assert answers(path) == ["sun rain"] * 3
        assert seen == [((str(run.folder / "model"), None), [4] * 3)]
        assert "cannot" in refusal(capsys, *words[:3], str(tmp_path / "b"), words[4], "at_beta=1")
    finally:
        SAMPLERS.pop("fixed")


def test_chat_without_a_terminal_is_a_line_from_each(run, capsys, monkeypatch):
    lines = "sun snow\n\nhello\n/reset\nsun snow\n/quit\nfog calm\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert chat([str(run.folder), "--at-beta", "1", "--seed", "5"]) == 0
    said = capsys.readouterr()
    own = said.out.splitlines()
    assert [line.partition(":")[0] for line in own] == ["policy", "at beta 1", "reference"] * 2
    assert own[:3] == own[3:]  # the same words, the same answer
    assert "hello: the bundled model" in said.err
    assert "begun anew" in said.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model alone that was never a run's, with a chat template."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.support.models import byte_tokenizer, tiny_llama_config

    path = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(tiny_llama_config()).save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


CPU = ("trainer.accelerator=cpu", "trainer.threads=1")


def test_a_model_alone_answers_a_benchmark_through_its_template(folder, tmp_path, capsys):
    """The sampler is given the prompt as the template writes it, up to the answer."""
    questions = tmp_path / "question.jsonl"
    questions.write_text(json.dumps({"uid": "a", "prompt": "Hi?", "category": "c"}) + "\n")
    seen: list[str] = []

    @register_sampler("seen")
    def sampler(wanted):
        seen.extend(wanted.tokenizer.decode(ids) for ids in wanted.prompts)
        return [[wanted.ends[0]] for _ in wanted.prompts]

    own = tmp_path / "mine.jsonl"
    words = [str(folder), str(questions), "--format", "arena_hard", *CPU]
    try:
        assert generate([*words, "--output", str(own), "generation.backend=seen"]) == 0
    finally:
        SAMPLERS.pop("seen")
    assert seen == ["<s>User: Hi?\n\nAssistant: "]
    assert "through the chat template" in capsys.readouterr().err
    found = json.loads(own.read_text())
    assert (found["uid"], found["category"], found["model"]) == ("a", "c", "mine")
    drawn = tmp_path / "drawn.jsonl"
    assert generate([*words, "--output", str(drawn), "--max-new-tokens", "5"]) == 0
    assert json.loads(drawn.read_text())["metadata"]["token_len"] == 5
    prompt = {"uid": "a", "prompt": "x" * 200}
    questions.write_text(json.dumps(prompt) + "\n")
    assert "positions leave no room" in refusal(capsys, *words, "--output", tmp_path / "c.jsonl")
    assert "known at which beta" in refusal(
        capsys, *words, "--output", tmp_path / "c.jsonl", "--at-beta=1", "--reference", folder
    )


def test_a_model_and_its_reference_talk(folder, capsys, monkeypatch):
    """They are the same model here: both columns say the same, and go on with it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    words = [str(folder), "--reference", str(folder), "--max-new-tokens", "4", *CPU]
    assert chat(words) == 0
    lines = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["policy", "reference"] * 2
    assert lines[0][2] == lines[1][2]
    assert lines[2][2] == lines[3][2]


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_training_has_its_answers_drawn_by_vllm(tmp_path, monkeypatch, peft):
    """An engine of the trained weights, which are gone behind it; KL is our own.

    The stand-in turns the prompt round: after </s> a b it says b a </s>, three tokens.
    """
    asked = install(monkeypatch)
    tiny = [word for word in TINY if not word.startswith("evaluation.samples")]
    run = run_train(
        *(tmp_path / "run", *tiny, "evaluation.samples=4", "evaluation.partition_samples=0"),
        *("trainer.accelerator=cpu", "trainer.max_steps=1", "generation.backend=vllm"),
        f"peft={peft}",
    )
    assert run.code == 0
    [engine] = asked.engines
    assert run.result["metrics"]["samples/length"] == 3
    assert run.result["metrics"]["samples/kl"] >= 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*engine["files"]}
    lora = asked.requests[0][2]
    if peft == "none":
        assert lora is None
        assert not Path(engine["model"]).exists()
    else:
        assert engine["enable_lora"]
        assert not Path(lora.lora_path).exists()


def test_a_server_is_refused_before_a_training(tmp_path, capsys):
    folder = tmp_path / "run"
    words = ("generation.backend=http://localhost:9/v1", "generation.model=m")
    assert run_train(folder, *TINY, *words, "evaluation.samples=4").code == 2
    assert "those of a training are not among them" in capsys.readouterr().err
    assert not folder.exists()
