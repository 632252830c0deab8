"""A command of the docs, taken as far as the front door."""

import os
import shutil

from hydra.core.utils import JobReturn, JobStatus

MADE_BEFORE = "outputs/runs/sft/model"


def check_command_of_page(words: list[str], folder, monkeypatch) -> None:
    """Takes a command as far as the front door: its files exist, its keys and values are right."""
    from dpo_lightning import cli
    from dpo_lightning.sweeps import finish

    started = []

    # What the other launchers need: their extras, and to be typed where there is SLURM.
    for module in ("slurm_site", "ray_tasks"):
        monkeypatch.setattr(f"dpo_lightning.sweeps.places.{module}.require_extra", lambda *_: None)
    monkeypatch.setattr("dpo_lightning.settings.logger_group.find_spec", lambda name: name)
    for name in ("sbatch", "srun"):
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text("#!/bin/sh\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)

    def start(config, **_):
        started.append(config)
        return 0

    def launch(context, config, task, job_overrides, **options):
        started.extend(job_overrides)
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=1.0) for _ in job_overrides]

    monkeypatch.setattr(cli, "_start", start)
    # Every trial of a sweep is composed and checked before this.
    monkeypatch.setattr("dpo_lightning.sweeps.launch.launch", launch)
    monkeypatch.setattr(finish, "finish_sweep", lambda *_: True)
    monkeypatch.chdir(folder)
    # What a user would bring.
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for name in ("rows", "duels", "thumbs", "chats", "rated"):
        shutil.copy(folder / "pairs.jsonl", folder / f"{name}.jsonl")
    for key, _, value in (word.partition("=") for word in words):
        # A model that an earlier command of the page made; a hub id is left alone.
        if key in ("model.config", "model.pretrained") and value in ("small", MADE_BEFORE):
            (folder / value).mkdir(parents=True)
            (folder / value / "config.json").write_text('{"model_type": "llama"}')
    (folder / "grid.yaml").write_text("- {loss: simpo, beta: [2, 10]}\n- {loss: ipo, beta: 1}\n")
    (folder / "more.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    for path in ("shards/1.jsonl", "clone/train.jsonl", "clone/test.jsonl"):
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "pairs.jsonl", folder / path)
    (folder / "my_scorers.py").write_text("def brevity(prompts, answers):\n    return []\n")
    run = folder / "outputs" / "runs" / "mine" / "checkpoints"
    run.mkdir(parents=True)
    (run / "step-000010.ckpt").write_bytes(b"")
    (run.parent / "rounds").mkdir()
    shutil.copy(folder / "pairs.jsonl", run.parent / "rounds" / "3.jsonl")
    sweep = folder / "outputs" / "sweeps" / "2026-01-01_00-00-00"
    sweep.mkdir(parents=True)
    (sweep / "multirun.yaml").touch()
    assert cli.main(words) == 0
    assert started or {"--cfg", "--help"} & set(words)
