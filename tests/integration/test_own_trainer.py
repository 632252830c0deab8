"""The modules of a run in a trainer of one's own: same numbers, checkpoints, what is refused."""

import csv
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from dpo_lightning.api import lightning_modules
from dpo_lightning.errors import UserError
from tests.support.runs import TINY, run_train
from tests.support.state import changed, state

SETTINGS = [*TINY[:3], "beta=0.3", "optimizer.lr=1e-2"]
STEPS = 4


def trainer_in(folder: Path, **options) -> pl.Trainer:
    return pl.Trainer(
        **{"max_steps": STEPS, "accelerator": "cpu", "enable_progress_bar": False}
        | {"enable_model_summary": False, "default_root_dir": folder}
        | {"logger": CSVLogger(folder, version=0), "num_sanity_val_steps": 0}
        | options
    )


def losses(folder: Path, name: str) -> list[float]:
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture(scope="module")
def parts():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lightning_modules([*SETTINGS, f"trainer.max_steps={STEPS}"])
    torch.set_num_threads(before)


# Slow as two trainings are compared.
@pytest.mark.slow
def test_it_trains_validates_and_saves_as_a_run_does(tmp_path, monkeypatch):
    """The first loss is ln 2, as policy and reference are one; the last differ from it."""
    monkeypatch.chdir(tmp_path)
    words = [*SETTINGS, f"trainer.max_steps={STEPS}"]
    run = run_train(tmp_path / "run", *words, "evaluation.samples=0", "evaluation.every_n_steps=2")
    before = state()
    module, data = lightning_modules(words)
    assert changed(before) == {}
    trainer = trainer_in(tmp_path / "own", val_check_interval=2, check_val_every_n_epoch=None)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == data.total_steps == STEPS
    own = losses(tmp_path / "own", "train/loss")
    assert own[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(own[-1] - own[0]) > 1e-3
    assert own == pytest.approx(run.values("train/loss"), abs=1e-6)
    assert losses(tmp_path / "own", "eval/loss") == pytest.approx(run.values("eval/loss"), abs=1e-6)
    trainer.validate(module, datamodule=data, verbose=False)
    assert trainer.callback_metrics["eval/loss"].item() == pytest.approx(
        run.values("eval/loss")[-1], abs=1e-6
    )

    # Its checkpoint holds the policy, and no reference; another trainer goes on from it.
    path = trainer.checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved.keys() == {f"policy.{name}" for name in module.policy.state_dict()}
    half = trainer_in(tmp_path / "half", max_steps=2)
    half.fit(*_again(words))
    rest = trainer_in(tmp_path / "rest")
    other, its_data = lightning_modules(words)
    rest.fit(other, datamodule=its_data, ckpt_path=half.checkpoint_callback.best_model_path)
    assert losses(tmp_path / "rest", "train/loss") == pytest.approx(own[2:], abs=1e-6)
    for one, two in zip(module.policy.parameters(), other.policy.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def _again(words):
    module, data = lightning_modules(words)
    return module, None, None, data


# Slow as models are loaded from disk.
@pytest.mark.slow
def test_a_model_and_rows_in_memory_are_those_on_disk(tmp_path, tiny_model):
    """Each of 8 prompts is 2 letters and a number."""
    import json

    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"prompt": f"ab {n}", "chosen": "yes", "rejected": "no no"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    common = ["trainer.max_steps=2", "data.batch_size=4", "optimizer.lr=1e-2"]
    common += [f"reference.cache_dir={tmp_path / 'cache'}", "trainer.accelerator=cpu"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    held_out = rows[:2]
    mine = lightning_modules(
        [*common, "data.eval_fraction=0"],
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        eval_rows=held_out,
    )
    assert len(mine[1].train_groups) == 8
    assert len(mine[1].eval_groups) == 2
    files = [f"data.train={tmp_path / 'rows.jsonl'}", f"model.pretrained={tiny_model}"]
    theirs = lightning_modules([*common, *files, "data.eval_fraction=0"])
    assert theirs[1].eval_groups == []
    found = []
    for name, (module, data) in {"mine": mine, "theirs": theirs}.items():
        trainer = trainer_in(tmp_path / name, max_steps=2, limit_val_batches=0)
        trainer.fit(module, datamodule=data)
        found.append(losses(tmp_path / name, "train/loss"))
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    # The model that was given stays as it was.
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]), name


# Slow as the models of a run are made for it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_steps": -1, "max_epochs": 2}, "Trainer(max_steps=-1): the learning rate's schedule"),
        ({"max_steps": STEPS + 1}, f"Trainer(max_steps={STEPS + 1}): the learning rate's"),
        ({"precision": "bf16-mixed"}, "Trainer(precision='bf16-mixed'): the modules compute in 32"),
    ],
)
def test_a_trainer_that_would_train_otherwise_is_refused(parts, tmp_path, options, said):
    module, data = parts
    with pytest.raises(UserError) as caught:
        trainer_in(tmp_path, **options).fit(module, datamodule=data)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "given", "said"),
    [
        (["logger=wandb"], {}, "logger: with a trainer of your own it is that trainer's"),
        (["trainer.devices=2"], {}, "trainer.devices: with a trainer of your own"),
        (["evaluation.samples=2"], {}, "evaluation.samples: with a trainer of your own"),
        ([], {"rows": [{"prompt": {1}}]}, "rows.jsonl: Object of type set is not JSON"),
        ([], {"eval_rows": []}, "eval_rows=: give rows= too"),
        (["data.train=x"], {"rows": []}, "rows= and data.train= both name one"),
        ([], {"model": object()}, "model=, tokenizer=: give both"),
        (["bta=1"], {}, "bta: with a trainer of your own"),
        (["loss=nope"], {}, "loss=nope: unknown loss"),
        (
            *([], {"rows": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}),
            "data.train=rows.jsonl: the bundled model speaks only the controlled task",
        ),
    ],
)
def test_wrong_settings_are_refused_by_name(overrides, given, said):
    before = state()
    with pytest.raises(UserError) as caught:
        lightning_modules(overrides, **given)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    assert changed(before) == {}
