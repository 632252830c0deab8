"""The command line up to the moment a run starts: what is composed, refused, named and logged."""

import itertools
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf

from dpo_lightning import cli
from dpo_lightning.__main__ import COMMANDS
from dpo_lightning.errors import DivergedError, UserError
from dpo_lightning.run.folder import RunFolder
from dpo_lightning.settings.keys import settings
from dpo_lightning.settings.page import FIRST_KEYS
from dpo_lightning.settings.program import completed
from dpo_lightning.settings.schema import Config
from dpo_lightning.settings.store import register
from dpo_lightning.settings.validation import validate
from tests.support.runs import ROOT


@dataclass
class Recorder:
    """Stand-in for a run that keeps its arguments and ends as it is told."""

    starts: list[tuple[Config, Path, dict[str, Any], list[str]]] = field(default_factory=list)
    act: Callable[[Config], int] = lambda config: 0

    def run(
        self, config: Config, *, folder: RunFolder, resolved: dict[str, Any], overrides: list[str]
    ) -> int:
        assert folder.path.is_dir()
        self.starts.append((config, folder.path, resolved, overrides))
        return self.act(config)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with rows and models; the root logger is restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    Path("rows.jsonl").touch()
    for folder in ("model", "empty"):
        Path(folder).mkdir()
    Path("model/config.json").touch()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield tmp_path
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    module = types.ModuleType("dpo_lightning.run.supervise")
    monkeypatch.setattr(module, "run", recorder.run, raising=False)
    monkeypatch.setitem(sys.modules, "dpo_lightning.run.supervise", module)
    return recorder


def experiment(name: str, text: str) -> list[str]:
    """Writes an experiment of the user's own; returns the arguments that choose it."""
    folder = Path("own/experiment")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(f"# @package _global_\n{text}")
    return ["--config-dir", "own", f"experiment={name}"]


LEAVES = [key for key, setting in settings().items() if not setting.is_section]

OWN = "data.train=rows.jsonl model.pretrained=model"
BASIC = "hydra/launcher=basic"
SLURM = "hydra/launcher=slurm hydra.launcher.cluster=local"
RAY = "hydra/launcher=ray"

# What is typed; what the one line must name: the key with its value, and the remedy.
WRONG: list[tuple[str, list[str]]] = [
    # keys
    ("bta=0.1", ["bta", "did you mean `beta`?"]),
    ("+bta=1", ["bta", "did you mean `beta`?"]),
    ("++bta=1", ["bta", "did you mean `beta`?"]),
    ("modle=llama", ["modle", "`model`"]),
    ("trainer.max_stepz=3", ["trainer.max_stepz", "`trainer.max_steps`"]),
    ("+trainer.max_stepz=3", ["trainer.max_stepz", "`trainer.max_steps`"]),
    ("trainer={max_stepz:3}", ["trainer.max_stepz", "`trainer.max_steps`"]),
    ("loss.beta=0.3", ["loss.beta", "beta has one place: beta="]),
    ("+loss.beta=0.3", ["loss.beta", "beta has one place: beta="]),
    ("trainer.accumulate_grad_batches=4", ["data.batch_size", "data.micro_batch_tokens"]),
    ("trainer.gradient_clip_val=1", ["optimizer.max_grad_norm="]),
    ("lr=1e-3", ["lr", "use optimizer.lr=0.001"]),
    ("hydra.run.dri=x", ["hydra.run.dri", "`hydra.run.dir`"]),
    ("+beta=0.2", ["+beta", "leave out the +"]),
    ("~beta", ["~beta", "beta=<value>"]),
    # choices of groups
    ("model=lama", ["model=lama", "qwen3-0.6b", "did you mean model=llama?"]),
    ("model=org/name", ["model=org/name", "model.pretrained="]),
    ("data=mine.jsonl", ["data=mine.jsonl", "data.train="]),
    ("experiment=nope", ["experiment=nope", "preferences"]),
    ("debug=true", ["debug=true", "limit, off, on"]),
    ("optimizer=adam", ["did you mean optimizer=adamw?"]),
    ("logger=null", ["logger=null", "logger=none"]),
    ("~reference", ["~reference", "reference=none"]),
    ("+loss=sft", ["+loss=sft", "leave out the +"]),
    ("hydra/launcher=joblib", ["hydra/launcher=joblib", "basic"]),
    # Hydra's grammar and flags
    ("beta", ["beta", "key=value"]),
    ("=3", ["=3", "key=value"]),
    ("beta=0.1,0.5", ["beta=0.1,0.5", "-m"]),
    ("logger.tags=a,b", ["-m", "logger.tags=[a,b]"]),
    ("data.train=~/rows.jsonl", ["""'data.train="~/rows.jsonl"'"""]),
    ("--beta=0.1", ["--beta", "write beta=0.1"]),
    ("--fast", ["--fast", "key=value"]),
    ("--cfg jobs", ["jobs", "job", "--help"]),
    ("--cfg job bta=1", ["bta", "`beta`"]),
    ("--cfg job beta=1,2", ["beta=1,2", "--cfg shows one run"]),
    ("--config-dir nowhere", ["--config-dir nowhere", "no such folder"]),
    ("--config-name nope", ["'nope'"]),
    ("--experimental-rerun x", ["--experimental-rerun", "give the settings again"]),
    # values
    ("beta=-1", ["beta=-1", "> 0"]),
    ("beta=abc", ["beta=abc", "a finite number"]),
    ("beta=", ["beta=", "no value"]),
    ("beta=null", ["beta=null", "> 0"]),
    ("beta=[1]", ["beta=[1]", "a finite number"]),
    ("seed=1.5", ["seed=1.5", "whole number"]),
    ("loss.label_smoothing=0.5", ["loss.label_smoothing=0.5", "< 0.5"]),
    ("optimizer.schedule=cosin", ["optimizer.schedule=cosin", "optimizer.schedule=cosine?"]),
    ("trainer.devices=0", ["trainer.devices=0", "at least 1"]),
    ("trainer.max_time=10m", ["trainer.max_time=10m", "DD:HH:MM:SS"]),
    ("name=${nope}", ["name", "nope"]),
    ("hydra.run.dir=", ["hydra.run.dir=", "folder"]),
    ("hydra.run.dir=rows.jsonl", ["hydra.run.dir=rows.jsonl", "folder"]),
    ("hydra.run.dir=rows.jsonl/run", ["rows.jsonl/run", "hydra.run.dir="]),
    ("hydra.run.dir=${nope}", ["hydra.run.dir", "nope"]),
    # what does not fit together, and files
    ("loss=sft loss.label_smoothing=0.1", ["loss.label_smoothing=0.1", "loss=sft"]),
    ("loss=sft reference=live", ["reference=live", "reference=auto"]),
    ("reference=none reference.pretrained=model", ["reference.pretrained=model", "reference=live"]),
    (f"{OWN} model.config=model", ["model.config=model", "one of the two"]),
    ("model.config_overrides.hidden_size=8", ["model.config_overrides", "model.config"]),
    ("data.train=rows.jsonl", ["data.train=rows.jsonl", "model.pretrained="]),
    ("model.pretrained=model", ["model.pretrained=model", "data.train="]),
    ("model=qwen3-0.6b", ["Qwen/Qwen3-0.6B", "data.train="]),
    ("data=hh", ["Anthropic/hh-rlhf", "model.pretrained="]),
    ("data=rows model.pretrained=model", ["data=rows", "data.train="]),
    ("experiment=preferences", ["data.train="]),
    ("data.eval=rows.jsonl", ["data.eval=rows.jsonl", "data.train="]),
    ("model.tokenizer=org/name", ["model.tokenizer=org/name", "model.pretrained="]),
    ("data.train=no.jsonl model.pretrained=model", ["data.train=no.jsonl", "no such file"]),
    ("data.train=rows.csv model.pretrained=model", ["data.train=rows.csv", ".jsonl"]),
    ("data.train=rows.jsonl model.pretrained=empty", ["model.pretrained=empty", "config.json"]),
    ("data.train=rows.jsonl model.pretrained=./no", ["model.pretrained=./no", "no such folder"]),
    (f"{OWN} data.chat_template=no.jinja", ["data.chat_template=no.jinja", "no such file"]),
    ("resume=no.ckpt", ["resume=no.ckpt", "resume=auto"]),
    ("resume=auto", ["resume=auto", "hydra.run.dir="]),
    # sweeps
    ("-m beta=0.1,-1", ["beta=-1", "> 0"]),
    ("-m model=llama,lama", ["model=lama", "model=llama?"]),
    (f"-m {BASIC} beta=0.1,0.5 trainer.devices=2", ["trainer.devices=2", "launcher=devices"]),
    (f"-m {BASIC} beta=1,2 trainer.devices=[0,1]", ["trainer.devices=[0, 1]", "launcher=devices"]),
    (f"-m {BASIC} beta=0.1,0.5 resume=auto", ["resume=auto"]),
    ("-m beta=0.1,0.5 resume=auto", ["resume=auto", "sweep.resume=last"]),
    ("-m bta=0.1,0.2", ["bta", "did you mean `beta`?"]),
    ("-m beta=0.1,0.5 trainer.accelerator=cpu trainer.devices=65", ["=65", "launcher.devices=65"]),
    ("-m beta=0.1,0.5 trainer.num_nodes=2", ["trainer.num_nodes=2", "trainer.num_nodes=1"]),
    ("-m beta=1 hydra.launcher.devices=0", ["hydra.launcher.devices=0", "at least 1"]),
    ("-m beta=1 hydra.launcher.devices=[]", ["hydra.launcher.devices=[]", "auto"]),
    ("-m beta=1 hydra.launcher.retries=-1", ["hydra.launcher.retries=-1", ">= 0"]),
    ("-m beta=1 hydra.launcher.max_failures=-1", ["hydra.launcher.max_failures=-1"]),
    ("-m beta=1 hydra.launcher.retry=1", ["hydra.launcher.retry", "hydra.launcher.retries"]),
    (
        "-m beta=1 +hydra.launcher.max_paralel=2",
        ["hydra.launcher.max_paralel: unknown key", "`hydra.launcher.max_parallel`"],
    ),
    ("-m beta=1 +hydra.launcher.setup=[a]", ["only with hydra/launcher=slurm"]),
    ("+hydra.sweeper.foo=1", ["hydra.sweeper.foo: unknown key"]),
    ("+hydra.nope=1", ["hydra.nope: unknown key"]),
    ("+hydra.run.nope=1", ["hydra.run.nope: unknown key"]),
    ("+hydra.job.config.nope=1", ["hydra.job.config.nope: unknown key"]),
    (f"-m {SLURM} hydra.launcher.cluster=pbs", ["hydra.launcher.cluster=pbs", "slurm or local"]),
    (f"-m {SLURM} hydra.launcher.timeout_min=1h", ["hydra.launcher.timeout_min", "1h"]),
    (f"-m {SLURM} hydra.launcher.partitoin=x", ["partitoin", "hydra.launcher.partition"]),
    (f"-m {SLURM} hydra.launcher.mem_gb=0", ["hydra.launcher.mem_gb=0", "> 0"]),
    (f"-m {SLURM} hydra.launcher.setup=[a]", ["hydra.launcher.setup=['a']", "cluster=slurm"]),
    (f"-m {SLURM} trainer.num_nodes=2", ["trainer.num_nodes=2", "this machine"]),
    (f"-m {SLURM} beta=1,-1", ["beta=-1", "> 0"]),
    (f"-m {RAY} hydra.launcher.cpus_per_device=0", ["hydra.launcher.cpus_per_device=0"]),
    (f"-m {RAY} hydra.launcher.adress=x", ["adress", "hydra.launcher.address"]),
    (f"-m {RAY} hydra.launcher.address=", ["hydra.launcher.address=''", "null"]),
    (f"-m {RAY} trainer.num_nodes=2", ["trainer.num_nodes=2", "hydra/launcher=slurm"]),
    ("-m beta=1,2 sweep.resume=nowhere", ["sweep.resume=nowhere", "sweep.resume=last"]),
    ("-m beta=1,2 sweep.resume=last", ["sweep.resume=last", "leave it out"]),
    ("-m beta=1 sweep.resume=last hydra.sweep.dir=s", ["sweep.resume=last", "hydra.sweep.dir=s"]),
    ("sweep.resume=last", ["sweep.resume=last", "add -m"]),
    ("-m beta=1 sweep.metric=rewards/margins", ["sweep.metric", "controlled/expected_reward"]),
    ("-m hydra.job.name=a,b", ["hydra.job.name"]),
    # several at once
    ("beta=-1 seed=-1", ["beta=-1", "seed=-1"]),
    ("bta=1 model=lama", ["`beta`", "model=llama?"]),
]


def one_error(stderr: str) -> str:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(("typed", "fragments"), WRONG, ids=[typed for typed, _ in WRONG])
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    typed: str,
    fragments: list[str],
    place: Path,
    recorder: Recorder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(place.rglob("*"))
    assert cli.main(typed.split(" ")) == 2
    line = one_error(capsys.readouterr().err)
    for fragment in fragments:
        assert fragment in line
    assert recorder.starts == []
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "typed",
    [
        "logger.api_key=hunter2",
        "+logger.api_key=hunter2",
        "+trainer.hf_token=hunter2",
        "logger.api_key=hunter2{",
        "--api-key=hunter2",
        "--api-key hunter2",
        "model.config=model +model.config_overrides.password=hunter2 data.train=rows.jsonl",
    ],
)
def test_a_secret_is_refused_without_being_shown(
    typed: str, place: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(typed.split(" ")) == 2
    captured = capsys.readouterr()
    assert "wandb login" in one_error(captured.err)
    assert "hunter2" not in captured.err + captured.out
    assert not (place / "outputs").exists()


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("beta: abc\n", ["experiment/mine.yaml", "beta=abc", "a finite number"]),
        ("bta: 1\n", ["experiment/mine.yaml", "bta", "`beta`"]),
        ("trainer: {max_stepz: 1}\n", ["trainer.max_stepz", "`trainer.max_steps`"]),
        ("logger: {api_key: hunter2}\n", ["logger.api_key", "wandb login"]),
        ("defaults: [{override /model: lama}]\n", ["model/lama", "llama"]),
        ("beta: [1\n", ["mine.yaml", "line 2"]),
        ("name: ${nope}\n", ["name", "nope"]),
        ("beta: -1\n", ["beta=-1"]),
    ],
)
def test_a_wrong_experiment_file_is_one_line(
    text: str, fragments: list[str], recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(experiment("mine", text)) == 2
    line = one_error(capsys.readouterr().err)
    assert all(fragment in line for fragment in fragments), line
    assert "hunter2" not in line
    assert recorder.starts == []


def test_a_wrong_input_leaves_an_earlier_run_as_it_was(
    place: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["hydra.run.dir=run", "beta=0.2"]) == 0
    files = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    assert place / "run/.hydra/config.yaml" in files
    capsys.readouterr()
    assert cli.main(["hydra.run.dir=run", "beta=-1"]) == 2
    one_error(capsys.readouterr().err)
    assert files == {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()}


def test_a_run_gets_its_settings_and_its_folder(place: Path, recorder: Recorder) -> None:
    assert cli.main(["model=llama", "beta=0.2", "trainer.max_steps=3", "hydra.run.dir=run"]) == 0
    ((config, run_dir, resolved, overrides),) = recorder.starts
    assert isinstance(config, Config)
    assert (config.beta, config.trainer.max_steps) == (0.2, 3)
    assert run_dir == place / "run"
    assert resolved["trainer"]["max_steps"] == 3
    assert overrides == ["model=llama", "beta=0.2", "trainer.max_steps=3"]
    assert Path.cwd() == place


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("beta=0.2", "llama-sigmoid-beta-0.2-seed-1"),
        ("name=../../x", "x"),
        ("name=..", "run"),
    ],
)
def test_a_run_stays_in_the_root_of_runs(
    typed: str, name: str, place: Path, recorder: Recorder
) -> None:
    assert cli.main([typed]) == 0
    run_dir = recorder.starts[0][1]
    assert run_dir.parent == place / "outputs/runs"
    date, time, rest = run_dir.name.split("_", 2)
    assert (len(date), len(time), rest) == (10, 8, name)


def test_two_starts_of_one_moment_have_two_folders(place: Path, recorder: Recorder) -> None:
    for _ in range(3):
        assert cli.main(["hydra.run.dir=runs/${now:%Y}"]) == 0
    folders = [start[1] for start in recorder.starts]
    assert len(set(folders)) == 3
    assert [folder.name[4:] for folder in folders] == ["", "-2", "-3"]


def test_a_folder_with_odd_characters(place: Path, recorder: Recorder) -> None:
    assert cli.main(["""hydra.run.dir='it\\'s a \\'run\\' ${now:%Y}'"""]) == 0
    assert recorder.starts[0][1].name.startswith("it's a 'run' 20")


def test_an_experiment_wins_over_the_root_and_the_command_line_over_both(
    recorder: Recorder,
) -> None:
    chosen = experiment("mine", "beta: 0.7\nlogger: {name: csv}\ntrainer: {max_steps: 5}\n")
    assert cli.main([*chosen, "hydra.run.dir=a"]) == 0
    assert cli.main([*chosen, "beta=0.9", "hydra.run.dir=b"]) == 0
    first, second = (start[0] for start in recorder.starts)
    assert (first.beta, first.logger.name, first.trainer.max_steps) == (0.7, "csv", 5)
    assert (second.beta, second.logger.name) == (0.9, "csv")


def test_the_root_comes_straight_after_the_schema() -> None:
    # Put last, whatever conf/config.yaml states would win over an experiment without a word.
    defaults = OmegaConf.load(ROOT / "conf/config.yaml").defaults
    assert list(defaults[:2]) == ["schema", "_self_"]


def test_the_shipped_experiment(recorder: Recorder) -> None:
    typed = ["experiment=preferences", "data.train=rows.jsonl", "hydra.run.dir=a"]
    assert cli.main(typed) == 0
    config = recorder.starts[0][0]
    assert (config.beta, config.model.pretrained) == (0.05, "Qwen/Qwen3-0.6B")
    assert config.data.train == "rows.jsonl"


def test_limit_wins_over_an_experiment(recorder: Recorder) -> None:
    chosen = experiment("mine", "logger: {name: csv}\ntrainer: {max_steps: 500}\n")
    assert cli.main([*chosen, "debug=limit", "hydra.run.dir=a"]) == 0
    config = recorder.starts[0][0]
    assert (config.trainer.max_steps, config.logger.name) == (3, "none")
    assert config.debug.traceback


def test_keys_that_are_the_users_need_no_plus(recorder: Recorder) -> None:
    assert cli.main(["data.columns.prompt=question", *OWN.split(), "hydra.run.dir=a"]) == 0
    assert recorder.starts[0][0].data.columns == {"prompt": "question"}
    random = "data.train=rows.jsonl model.config=model model.config_overrides.hidden_size=8"
    assert cli.main([*random.split(), "hydra.run.dir=b"]) == 0
    assert recorder.starts[1][0].model.config_overrides == {"hidden_size": 8}


# What the choice of a file needs beside it.
WITH_ROWS = ["data.train=rows.jsonl"]
NEEDS: dict[str, list[str]] = {
    "model=llama": [],
    "data=controlled": [],
    "data=rows": OWN.split(),
    "experiment=preferences": WITH_ROWS,
}
FILES = sorted(f"{path.parent.name}={path.stem}" for path in (ROOT / "conf").glob("*/*.yaml"))


@pytest.mark.parametrize(
    "choice",
    [
        # Other groups are small, and most are chosen by some experiment.
        name
        if name.startswith(("experiment=", "data="))
        else pytest.param(name, marks=pytest.mark.slow)
        for name in FILES
    ],
)
def test_every_file_composes_and_is_valid(choice: str, monkeypatch) -> None:
    # Installed or not, the packages of the extras are looked for and not imported.
    for module in ("combinations", "logger_group"):
        monkeypatch.setattr(f"dpo_lightning.settings.{module}.find_spec", lambda package: True)
    group, option = choice.split("=")
    fallback = {"model": WITH_ROWS, "data": ["model=qwen3-0.6b"]}.get(group, [])
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = validate(compose("config", [choice, *NEEDS.get(choice, fallback)]))
    section = getattr(config, group, None)
    named = getattr(section, "name", None) or getattr(section, "kind", None)
    # What is trained is LoRA; the letter is about what it is trained beside.
    assert named in (None, {"qlora": "lora"}.get(option, option))


def test_every_group_has_its_default_in_the_list() -> None:
    groups = {path.parent.name for path in (ROOT / "conf").glob("*/*.yaml")}
    lines = (ROOT / "conf/config.yaml").read_text().splitlines()
    listed = {line.split(":")[0].removeprefix("  - ") for line in lines if line.startswith("  - ")}
    assert groups <= listed


@pytest.mark.slow  # a whole sweep
def test_a_sweep_runs_each_trial_in_a_folder_named_by_what_differs(
    place: Path, recorder: Recorder
) -> None:
    assert (
        cli.main(["-m", "beta=0.1,0.5", "logger=none", "seed=1,2", "hydra.sweep.dir=s", BASIC]) == 0
    )
    assert [(config.beta, config.seed) for config, *_ in recorder.starts] == [
        (0.1, 1),
        (0.1, 2),
        (0.5, 1),
        (0.5, 2),
    ]
    assert [start[1] for start in recorder.starts] == [
        place / "s" / f"beta-{beta}_seed-{seed}"
        for beta, seed in itertools.product((0.1, 0.5), (1, 2))
    ]
    assert all(config.trainer.devices == 1 for config, *_ in recorder.starts)


def test_a_sweep_may_stand_in_a_file(place: Path, recorder: Recorder) -> None:
    grid = 'hydra: {mode: MULTIRUN, sweeper: {params: {beta: "0.3,0.4"}}}\n'
    assert cli.main([*experiment("mine", grid), "hydra.sweep.dir=s", BASIC]) == 0
    assert [start[1].name for start in recorder.starts] == ["beta-0.3", "beta-0.4"]


def test_a_wrong_grid_in_a_file_is_refused_before_it_starts(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = 'hydra: {mode: MULTIRUN, sweeper: {params: {beta: "0.3,-4"}}}\n'
    assert cli.main(experiment("mine", grid)) == 2
    assert "beta=-4" in one_error(capsys.readouterr().err)
    assert recorder.starts == []


def test_flags_may_stand_among_the_settings(recorder: Recorder) -> None:
    assert cli.main(["beta=0.2", "-m", "seed=1,2", "hydra.sweep.dir=s", BASIC]) == 0
    assert [config.seed for config, *_ in recorder.starts] == [1, 2]


@pytest.mark.slow
def test_a_failing_trial_does_not_stop_the_others(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(config: Config) -> int:
        if config.beta == 0.1:
            raise UserError("data.train: nothing left")
        if config.beta == 0.2:
            raise RuntimeError("boom")
        if config.beta == 0.3:
            sys.exit(5)
        return 3 if config.beta == 0.4 else 0

    recorder.act = act
    assert cli.main(["-m", "beta=0.1,0.2,0.3,0.4,0.5", "hydra.sweep.dir=s", BASIC]) == 1
    assert len(recorder.starts) == 5
    stderr = capsys.readouterr().err
    assert "error: beta=0.1: data.train: nothing left" in stderr
    assert "RuntimeError: boom" in stderr
    assert "Error executing job" not in stderr


@pytest.mark.parametrize("code", [130, 143])
def test_a_stopped_trial_stops_the_sweep(code: int, recorder: Recorder) -> None:
    recorder.act = lambda config: code
    assert cli.main(["-m", "beta=0.1,0.2", "hydra.sweep.dir=s", BASIC]) == code
    assert len(recorder.starts) == 1


@pytest.mark.parametrize("code", [0, 3, 143])
def test_the_exit_code_is_the_runs(code: int, recorder: Recorder) -> None:
    recorder.act = lambda config: code
    assert cli.main(["hydra.run.dir=run"]) == code


def raising(error: BaseException) -> Callable[[Config], int]:
    def act(config: Config) -> int:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("k=v: wrong\nand more"), 2),
        (DivergedError("k=v: wrong\nand more"), 3),
    ],
)
def test_an_expected_error_is_one_line(
    error: Exception, code: int, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder.act = raising(error)
    assert cli.main(["hydra.run.dir=run"]) == code
    assert one_error(capsys.readouterr().err) == "error: k=v: wrong and more"
    assert cli.main(["hydra.run.dir=run", "debug=on"]) == code
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr
    assert "error: k=v: wrong and more" in stderr


def test_an_unexpected_error_has_a_traceback(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder.act = raising(RuntimeError("boom"))
    assert cli.main(["hydra.run.dir=run"]) == 1
    stderr = capsys.readouterr().err
    assert "RuntimeError: boom" in stderr
    assert "Error executing job" not in stderr


def test_an_interrupt_is_130(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    recorder.act = raising(KeyboardInterrupt())
    assert cli.main(["hydra.run.dir=run"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_log_has_times_and_the_terminal_has_not(
    place: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(config: Config) -> int:
        logging.getLogger("dpo_lightning.x").info("said once")
        logging.getLogger("dpo_lightning.x").error("went wrong")
        return 0

    recorder.act = act
    assert cli.main(["hydra.run.dir=run"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["said once"]
    assert captured.err.splitlines() == ["went wrong"]
    first, second = (place / "run/train.log").read_text().splitlines()
    assert first.startswith("[20")
    assert first.endswith("[dpo_lightning.x][INFO] said once")
    assert second.endswith("[ERROR] went wrong")


def test_a_child_process_of_ddp_joins_the_run(
    place: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Lightning starts it: the same arguments, then these three; the folder has quotes.
    typed = ["beta=0.2", "--config-dir", "own", *experiment("mine", "seed: 3\n")[2:]]
    assert cli.main(typed) == 0
    run_dir = recorder.starts[0][1]
    written = (run_dir / ".hydra/overrides.yaml").read_bytes()
    more = [
        f'hydra.run.dir="{run_dir.relative_to(place)}"',
        "hydra.job.name=train_ddp_process_1",
        "hydra.output_subdir=null",
    ]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main([*typed, *more]) == 0
    assert recorder.starts[1][:3] == recorder.starts[0][:3]
    assert (run_dir / "train_ddp_process_1.log").exists()
    assert (run_dir / ".hydra/overrides.yaml").read_bytes() == written
    assert len(list((place / "outputs/runs").iterdir())) == 1


def test_processes_that_another_launcher_starts_must_share_a_folder(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main([]) == 2
    assert "hydra.run.dir=<folder>" in one_error(capsys.readouterr().err)
    assert cli.main(["hydra.run.dir=run"]) == 0


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def train(*typed: str) -> subprocess.CompletedProcess[str]:
    return python(str(ROOT / "train.py"), *typed)


@pytest.mark.parametrize(
    ("typed", "fragment"),
    [
        ("beta=-1", "beta=-1: must be a finite number > 0"),
        ("+bta=1", "did you mean `beta`?"),
        ("model=lama", "did you mean model=llama?"),
        ("beta=0.1,0.5", "add -m"),
        ("--beta=0.1", "write beta=0.1"),
    ],
)
def test_the_program_answers_in_one_line(typed: str, fragment: str, place: Path) -> None:
    ended = train(typed)
    assert ended.returncode == 2
    assert fragment in one_error(ended.stderr)
    assert ended.stdout == ""
    assert not (place / "outputs").exists()


HEAVY = ("torch", "lightning", "transformers", "datasets", "wandb")


@pytest.mark.parametrize(
    ("typed", "code"),
    [
        ("--cfg job", 0),
        ("--help", 0),
        ("--info defaults", 0),
        ("beta=-1", 2),
        ("+bta=1", 2),
        ("beta=abc", 2),
        ("-m beta=0.1,-1", 2),
    ],
)
def test_an_answer_does_not_load_torch(typed: str, code: int, place: Path) -> None:
    program = (
        "import sys; from dpo_lightning.cli import main; code = main(sys.argv[1:]);"
        f"print('loaded', sorted(set({HEAVY}) & set(sys.modules))); sys.exit(code)"
    )
    ended = python("-c", program, *typed.split(" "))
    assert ended.returncode == code, ended.stderr
    assert ended.stdout.splitlines()[-1] == "loaded []"
    assert not (place / "outputs").exists()


def test_what_is_shown_is_what_would_run() -> None:
    shown = train("--cfg", "job", "beta=0.3", "loss=sft")
    assert shown.returncode == 0
    assert "beta: 0.3\n" in shown.stdout
    assert "name: sft" in shown.stdout
    helped = train("--help")
    assert "python train.py -m beta=0.05,0.1,0.5" in helped.stdout
    assert "reference: auto, cached, live, none" in helped.stdout


def test_all_settings_are_listed_on_demand(capsys) -> None:
    assert cli.main(["--help-all"]) == 0
    everything = capsys.readouterr().out
    assert "reference: auto, cached, live, none" in everything
    assert [key for key in LEAVES if f"\n{key}=" not in everything] == []


def test_the_first_help_has_twelve_settings_and_says_where_the_others_are(capsys) -> None:
    """Each with its default and its sentence; a group with one choice is no choice."""
    assert cli.main(["-h"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    start = lines.index("The 12 settings that matter first, with their defaults:")
    end = lines.index("Choices of each group, as group=choice:")
    keys = [line.partition("=")[0] for line in lines[start + 1 : end] if line[:1].isalpha()]
    assert keys == list(FIRST_KEYS)
    assert len(keys) == 12
    assert "\noptimizer.lr=null\n    Peak learning rate; null: by what is trained" in text
    assert "\nloss=sigmoid\n" in text
    assert "recipes/zephyr_dpo" in text
    assert "sweep: default" not in text
    assert "--help-all lists all settings, --cfg job shows what" in text
    assert max(map(len, lines)) <= 100
    assert cli.main(["-h", "bta=1"]) == 2


COMPLETE = """
export PATH=$PWD/bin:$PATH
eval "$({install})"
COMP_LINE="$1"; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=($COMP_LINE)
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
hydra_bash_completion; echo "${{COMPREPLY[@]}}"
"""


@pytest.mark.slow  # bash asks the program for each word
@pytest.mark.parametrize(
    ("install", "line", "found"),
    [
        ("python train.py -sc install=bash", "python train.py optimizer.lr", "optimizer.lr="),
        ("python train.py -sc install=bash", "python train.py reference=l", "reference=live"),
        ("dpo-lightning train -sc install=bash", "dpo-lightning inter", "interpolate"),
        ("dpo-lightning train -sc install=bash", "dpo-lightning inspect da", "data. data="),
        ("dpo-lightning train -sc install=bash", "dpo-lightning chat beta", ""),
    ],
)
def test_bash_completes_words(place: Path, install: str, line: str, found: str) -> None:
    """As ``--help`` has it, for a clone and for the installed program with its commands."""
    (place / "bin").mkdir()
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'dpo-lightning'"
    body = f"{start}\nfrom dpo_lightning.__main__ import main\nsys.exit(main())\n"
    for name, text in (
        ("dpo-lightning", f"#!{sys.executable}\n{body}"),
        ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n'),
    ):
        (place / "bin" / name).write_text(text)
        (place / "bin" / name).chmod(0o755)
    (place / "train.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n")
    with (place / "train.py").open("a") as file:
        file.write((ROOT / "train.py").read_text())
    ended = subprocess.run(
        ["bash", "-c", COMPLETE.format(install=install), "bash", line],
        capture_output=True,
        text=True,
    )
    assert ended.stdout.strip() == found, ended.stderr


@pytest.mark.parametrize(
    ("line", "names", "rest"),
    [
        ("dpo-lightning ", ["train", "inspect"], None),
        ("dpo-lightning in", ["inspect", "interpolate"], None),
        ("dpo-lightning nothing", [], None),
        ("dpo-lightning train beta", [], "dpo-lightning beta"),
        ("dpo-lightning preflight ", [], "dpo-lightning "),
        ("dpo-lightning report outputs/", [], None),
    ],
)
def test_a_command_is_completed_before_its_settings(line: str, names: list[str], rest) -> None:
    found, left = completed(line, COMMANDS)
    assert found[: len(names)] == names
    assert bool(found) == bool(names)
    assert left == rest


def test_the_settings_of_a_run_are_composed_once(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composing takes longer than all else that happens before a run."""
    compose, composed = ConfigLoaderImpl.load_configuration, []

    def counted(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        composed.append(kwargs["overrides"])
        return compose(self, *args, **kwargs)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    assert cli.main(["beta=0.2", "name=mine"]) == 0
    assert composed == [["beta=0.2", "name=mine"]]
    # What ran is what was composed, with the folder that it was then given.
    [folder] = Path("outputs/runs").iterdir()
    saved = OmegaConf.load(folder / ".hydra" / "hydra.yaml")
    assert saved.hydra.run.dir == f"outputs/runs/{folder.name}"
    assert saved.hydra.overrides.hydra == [f"hydra.run.dir='outputs/runs/{folder.name}'"]
    assert saved.hydra.mode == "RUN"
    assert OmegaConf.load(folder / ".hydra" / "overrides.yaml") == ["beta=0.2", "name=mine"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "typed",
    [
        "beta=0.1,0.2 seed=1,2",
        pytest.param(
            "experiment=frontier beta=0.1,1 loss=sigmoid,ipo,odpo data.batch_size=4",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "data.train=rows.jsonl model.pretrained=model +data.columns={prompt:q} seed=1,2 beta=1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "peft={kind:lora} peft.r=4,8 hydra.job.config.override_dirname.kv_sep=:",
            marks=pytest.mark.slow,
        ),
        "beta=1 beta=2 seed=3,4",
    ],
)
def test_a_trial_of_a_grid_is_checked_with_what_hydra_composes(
    typed: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are merged once for all trials that choose the same; values come on top."""
    seen = []

    def judged(cfg: DictConfig, **options: Any) -> Config:
        seen.append(
            OmegaConf.to_container(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]))
        )
        return validate(cfg, **options)

    monkeypatch.setattr(cli, "validate", judged)
    monkeypatch.setattr("dpo_lightning.settings.grids.validate", judged)
    arguments = ["-m", "hydra/launcher=basic", *typed.split()]
    assert cli.main(arguments) == 0
    # The second half is composed by Hydra's own sweeper, trial by trial.
    assert len(seen) >= 4
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


@pytest.mark.parametrize(
    ("typed", "fragment"),
    [
        ("--run -m beta=1,2", "--run and --multirun exclude each other"),
        ("--resolve beta=1", "--resolve is for what --cfg shows: add --cfg job"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    typed: str, fragment: str, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(typed.split()) == 2
    assert fragment in one_error(capsys.readouterr().err)
    assert recorder.starts == []


def test_a_sweep_says_that_it_is_one(recorder: Recorder) -> None:
    """Sweepers and users' own interpolations read ``hydra.mode``."""
    assert cli.main(["-m", "hydra/launcher=basic", "beta=1,2", "hydra.sweep.dir=s"]) == 0
    assert OmegaConf.load("s/multirun.yaml").hydra.mode == "MULTIRUN"
    assert OmegaConf.load("s/beta-1/.hydra/hydra.yaml").hydra.mode == "MULTIRUN"
