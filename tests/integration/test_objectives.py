"""Every objective trains through the front door, and what is composed over it acts."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_lightning.objectives.objective import known_losses
from dpo_lightning.objectives.registry import PAIRWISE_LOSSES
from tests.support.runs import ROOT, TINY, Run, run_train
from tests.support.warm import run_apart

LOSSES = (*known_losses(), "mpo")
QUICK = (*TINY, "trainer.max_steps=3", "evaluation.partition_samples=0", "checkpoint.last=false")

# Where the policy is the reference every score is 0, so at beta = 0.1 the first loss is, by hand:
FIRST = {
    **dict.fromkeys(("sigmoid", "sigmoid_norm", "odpo", "aot", "aot_unpaired"), math.log(2)),
    **dict.fromkeys(("robust", "softmax", "plackett_luce"), math.log(2)),
    **dict.fromkeys(("hinge", "apo_zero", "apo_down"), 1.0),
    "ipo": 25.0,  # (1 / 0.2)^2
    "ipo_sum": 25.0,
    "sppo_hard": 50.0,  # (0.5 / 0.1)^2 twice
    "bco_pair": 2 * math.log(2),
    "nca_pair": 2 * math.log(2),
    "kto_pair": 0.5,
    **dict.fromkeys(("kto", "apo_zero_unpaired"), 0.5),
    "bco": math.log(2),
    "discopop": 0.5 * math.log(2) + 0.5,
    # KL of (1/2, 1/2) from (0.999, 0.001)
    "exo_pair": 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001),
}


# Of the first three steps of 16 groups, and of the 40 that are evaluated.
ROWS = 3 * 16 + 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """One cache for all: no loss asks for a row that another had."""
    return f"reference.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def first(tmp_path_factory, cache) -> Run:
    run = run_train(tmp_path_factory.mktemp("first") / "run", *QUICK, cache)
    assert run.result["reference"]["computed"] == ROWS
    return run


# Of three kinds: without a reference, K-way, a sum; the slow suite has all.
QUICK_LOSSES = ("simpo", "plackett_luce", "mpo")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK_LOSSES else pytest.param(n, marks=pytest.mark.slow) for n in LOSSES],
)
def test_every_loss_takes_three_steps(tmp_path, cache, first, name):
    run = run_train(tmp_path / "run", *QUICK, f"loss={name}", cache)
    assert run.code == 0, run.result["error"]
    assert run.result["loss"] == name
    losses = run.values("train/loss")
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    if name in FIRST:
        assert losses[0] == pytest.approx(FIRST[name], rel=1e-4)
    unused = name in PAIRWISE_LOSSES and not PAIRWISE_LOSSES[name].uses_reference
    # The reference pass is the first run's, whatever the loss.
    expected = {"rows": 0, "computed": 0, "cached": 0}
    if not unused:
        expected = {"rows": ROWS, "computed": 0, "cached": ROWS}
    assert run.result["reference"] == expected


def test_the_first_losses_are_of_losses_there_are():
    assert {*FIRST} < {*LOSSES}


@pytest.mark.slow
def test_a_sum_of_losses_is_the_sum(tmp_path, cache, first):
    """MPO at the start: 0.8 ln 2 + 0.2 * 2 ln 2 + the likelihood loss."""
    mpo = run_train(tmp_path / "a", *QUICK, "loss=mpo", cache)
    sft = run_train(tmp_path / "b", *QUICK, "loss=sft", cache)
    expected = 1.2 * math.log(2) + sft.values("train/loss")[0]
    assert mpo.values("train/loss")[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_likelihood_term_is_added(tmp_path, cache, first):
    with_term = run_train(tmp_path / "a", *QUICK, "loss.rpo_alpha=0.3", cache)
    sft = run_train(tmp_path / "b", *QUICK, "loss=sft", cache)
    expected = math.log(2) + 0.3 * sft.values("train/loss")[0]
    assert with_term.values("train/loss")[0] == pytest.approx(expected, rel=1e-5)


def test_beta_goes_where_it_is_sent(tmp_path, cache, first):
    """Linear from 0.1 to 0.5 over three steps."""
    schedule = ("loss.beta_schedule=linear", "loss.beta_end=0.5")
    run = run_train(tmp_path / "run", *QUICK, *schedule, cache)
    assert run.values("train/beta") == pytest.approx([0.1, 0.3, 0.5])
    assert not any("train/beta" in row for row in first.rows)


ADAPTIVE = (
    *TINY,
    *("loss.adaptive_beta=0.6", "loss.adaptive_momentum=0.5", "optimizer.lr=0.01"),
    *("optimizer.warmup=0", "evaluation.partition_samples=0"),
)


@pytest.mark.slow  # three runs
def test_an_adapted_beta_follows_the_margins_and_a_resume_goes_on(tmp_path, cache):
    """M_0 starts at 0: beta_t = 0.1 (1 + 0.6 (M_t - M_0)), M_0 <- (M_0 + M_t) / 2."""
    whole = run_train(tmp_path / "whole", *ADAPTIVE, "trainer.max_steps=4", cache)
    betas = whole.values("train/beta")
    average = 0.0
    for beta, margin in zip(betas, whole.values("train/rewards/margins"), strict=True):
        assert beta == pytest.approx(0.1 * (1 + 0.6 * (margin - average)), rel=1e-4)
        average = (average + margin) / 2
    assert len({round(beta, 9) for beta in betas}) > 2
    constant = "optimizer.schedule=constant"
    every = ("checkpoint.every_n_steps=2", "checkpoint.keep=2")
    whole = run_train(tmp_path / "c", *ADAPTIVE, "trainer.max_steps=4", constant, *every, cache)
    resume = f"resume={tmp_path / 'c' / 'checkpoints' / 'step-000002.ckpt'}"
    again = run_train(tmp_path / "d", *ADAPTIVE, "trainer.max_steps=4", constant, resume, cache)
    assert again.values("train/beta")[-2:] == whole.values("train/beta")[-2:]
    assert again.values("train/loss")[-1] == whole.values("train/loss")[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        "loss=aot",
        pytest.param("loss=kto_pair", marks=pytest.mark.slow),
        "loss.adaptive_beta=0.5",
    ],
)
def test_what_couples_a_step_wants_it_whole(tmp_path, cache, caplog, setting):
    small = run_train(tmp_path / "small", *QUICK, setting, "data.micro_batch_tokens=30", cache)
    assert small.code == 2
    message = small.result["error"]
    assert "data.micro_batch_tokens=30" in message
    needed = int(message.partition("up to ")[2].split()[0])
    enough = f"data.micro_batch_tokens={needed}"
    assert run_train(tmp_path / "enough", *QUICK, setting, enough, cache).code == 0


def test_margins_of_rows_reach_their_loss(tmp_path, tiny_model):
    """At the start of odpo the loss is log(1 + exp(target margin)), here of 1.5 and 0."""
    rows = tmp_path / "rows.jsonl"
    pair = {"prompt": "One", "chosen": " two", "rejected": " zero"}
    rows.write_text(json.dumps(pair | {"target_margin": 1.5}) + "\n" + json.dumps(pair) + "\n")
    base = [f"model.pretrained={tiny_model}", f"data.train={rows}", "data.eval_fraction=0"]
    base += ["evaluation.samples=0", f"reference.cache_dir={tmp_path / 'cache'}"]
    run = run_train(tmp_path / "run", *base, "loss=odpo")
    expected = (math.log1p(math.exp(1.5)) + math.log(2)) / 2
    assert run.values("train/loss")[0] == pytest.approx(expected, rel=1e-4)
    other = run_train(tmp_path / "other", *base, "loss=sigmoid")
    assert other.values("train/loss")[0] == pytest.approx(math.log(2), rel=1e-4)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param("loss.ld_alpha=0.3", marks=pytest.mark.slow),
        pytest.param("loss.wpo=true", marks=pytest.mark.slow),
        "loss=mpo",
    ],
)
def test_a_cached_reference_is_the_live_one(tmp_path, setting):
    """The log-probabilities of tokens too, which the cache keeps apart from the sums."""
    cache = f"reference.cache_dir={tmp_path / 'cache'}"
    moving = ("optimizer.lr=0.01", "optimizer.warmup=0")
    live = run_train(tmp_path / "live", *QUICK, *moving, setting, "reference=live")
    cached = run_train(tmp_path / "cached", *QUICK, *moving, setting, cache)
    again = run_train(tmp_path / "again", *QUICK, *moving, setting, cache)
    assert cached.values("train/loss") == pytest.approx(live.values("train/loss"), rel=1e-5)
    assert again.values("train/loss") == cached.values("train/loss")
    assert again.result["reference"] == {"rows": ROWS, "computed": 0, "cached": ROWS}
    assert live.result["reference"]["rows"] > 0
    losses = cached.values("train/loss")
    assert abs(losses[-1] - losses[0]) > 1e-3


@pytest.mark.slow
def test_desensitising_and_weighting_change_the_steps(tmp_path, cache, first):
    """At the start all scores are 0, so only the weights show in the loss of step 1."""
    moving = ("optimizer.lr=0.01", "optimizer.warmup=0")
    plain = run_train(tmp_path / "plain", *QUICK, *moving, cache).values("train/loss")
    less = run_train(tmp_path / "ld", *QUICK, *moving, "loss.ld_alpha=0.3", cache)
    assert less.values("train/loss")[0] == pytest.approx(math.log(2), rel=1e-4)
    assert abs(less.values("train/loss")[2] - plain[2]) > 1e-4
    weighted = run_train(tmp_path / "wpo", *QUICK, *moving, "loss.wpo=true", cache)
    assert abs(weighted.values("train/loss")[0] - math.log(2)) > 1e-3


@pytest.mark.slow
def test_pairs_make_a_listwise_loss_the_pairwise_one(tmp_path, cache, first):
    moving = ("optimizer.lr=0.01", "optimizer.warmup=0")
    runs = [
        run_train(tmp_path / name, *QUICK, *moving, f"loss={name}", cache).values("train/loss")
        for name in ("sigmoid", "softmax", "plackett_luce")
    ]
    assert runs[1] == pytest.approx(runs[0], rel=1e-6)
    assert runs[2] == pytest.approx(runs[0], rel=1e-6)


PLUGIN = '''
from __future__ import annotations

from typing import Annotated

from lightning.pytorch import Callback

from dpo_lightning.plugins import register_callback, register_loss, register_scorer


@register_loss("squared", paper="my notebook", on_margin=True)
def squared(pairs, *, beta, target: Annotated[float, {"above": 0}] = 2.0):
    """(target - beta * margin)^2."""
    return (target - beta * pairs.margin()) ** 2


@register_scorer("brevity")
def brevity(prompts, answers):
    return [-len(answer) for answer in answers]


@register_callback("bell")
class Bell(Callback):
    def on_fit_end(self, trainer, module):
        print("the bell rings")
'''


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_apart(*arguments, cwd=folder)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A user's folder, outside the clone."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "my_losses.py").write_text(PLUGIN)
    return folder


@pytest.mark.long
@pytest.mark.slow
def test_losses_scorers_and_callbacks_of_a_plugin(elsewhere):
    """The first loss is (3 - 0)^2 for both the loss and its option, swept beside another."""
    done = command(
        elsewhere,
        *("-m", "plugins=[my_losses]", "loss=sigmoid,squared", "trainer.callbacks=[bell]"),
        *("evaluation.judge=brevity", "logger=none", "trainer.max_steps=2"),
        *TINY[:3],
        *("evaluation.samples=8", "hydra.sweep.dir=sweep", "hydra.launcher.devices=1"),
        "reference.cache_dir=cache",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = {name: Run(0, elsewhere / "sweep" / f"loss-{name}") for name in ("sigmoid", "squared")}
    assert runs["squared"].values("train/loss")[0] == pytest.approx(4.0, rel=1e-4)
    assert runs["sigmoid"].values("train/loss")[0] == pytest.approx(math.log(2), rel=1e-4)
    assert runs["squared"].result["metrics"]["samples/judge"] < 0
    assert "the bell rings" in (elsewhere / "sweep" / "loss-squared" / "trial.log").read_text()
    report = json.loads((elsewhere / "sweep" / "sweep.json").read_text())
    assert report["statuses"] == {"finished": 2}
    assert {c["label"] for c in report["configurations"]} == {"loss sigmoid", "loss squared"}
    # One reference pass for both.
    counts = [run.result["reference"]["computed"] for run in runs.values()]
    assert sorted(counts) == [0, 2 * 16 + 40]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["plugins=[my_losses]", "loss=squared", "loss.target=-1"], ["loss.target=-1", "> 0"]),
        (["plugins=[my_losses]", "loss=squared", "loss.target=x"], ["loss.target=x", "number"]),
        (["plugins=[my_losses]", "loss=hinge", "loss.target=1"], ["loss.target=1", "hinge"]),
        (["loss=squared"], ["loss=squared", "unknown loss; available: "]),
        (["trainer.callbacks=[bell]"], ["trainer.callbacks=bell", "plugins="]),
        (["plugins=[not_there]", "loss=squared"], ["plugins=not_there", "no such module"]),
    ],
)
def test_a_wrong_use_of_a_plugin_is_one_line(elsewhere, arguments, parts):
    done = command(elsewhere, *arguments, "logger=none", "hydra.run.dir=wrong")
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for part in parts:
        assert part in last


@pytest.mark.slow  # starts a process
def test_a_plugin_named_by_an_experiment_file(elsewhere):
    """A loss is one function and, where its defaults are not wanted, one file."""
    for name, text in {
        "loss/squared.yaml": "name: squared\ntarget: 3.0\n",
        "experiment/mine.yaml": "# @package _global_\ndefaults:\n  - override /loss: squared\n"
        "plugins: [my_losses]\n",
    }.items():
        path = elsewhere / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = command(
        elsewhere,
        *("--config-dir", "own", "experiment=mine", "logger=none", "trainer.max_steps=1"),
        *(*TINY, "hydra.run.dir=by-file", "reference.cache_dir=cache"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = Run(0, elsewhere / "by-file")
    assert run.values("train/loss") == pytest.approx([9.0], rel=1e-4)
    assert run.result["loss"] == "squared"


@pytest.mark.long
@pytest.mark.slow
def test_adding_a_loss_inside_as_contributing_says(tmp_path):
    """One function, in a copy of the project; the first loss is (2 - 0)^2."""
    for name in ("dpo_lightning", "conf", "hydra_plugins"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "train.py", tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (function,) = [block for block in blocks if "@register_loss" in block]
    with (tmp_path / "dpo_lightning" / "objectives" / "losses.py").open("a") as file:
        file.write(f"\n\n{function}")
    done = subprocess.run(
        [
            *(sys.executable, "train.py", "loss=squared", "trainer.max_steps=1", *TINY),
            *("logger=none", "hydra.run.dir=run", "reference.cache_dir=cache"),
        ],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert Run(0, tmp_path / "run").values("train/loss") == pytest.approx([4.0], rel=1e-4)


@pytest.mark.long
def test_the_closed_form_in_short(tmp_path, cache):
    """The population loss alone leads to the optimum: a policy that is a table all the way.

    The bound of the tiny model is lower than that of the whole experiment, which is 0.95.
    """
    run = run_train(
        tmp_path / "run",
        *("beta=1", "data.controlled.population=true", "data.controlled.train_groups=4096"),
        *("data.controlled.eval_groups=64", "evaluation.samples=0", cache),
        "evaluation.every_n_steps=64",
    )
    metrics = run.result["metrics"]
    assert metrics["controlled/tabular_kl_optimum_policy"] < 1e-6
    assert metrics["controlled/gain_ratio"] > 0.9
    curve = run.values("controlled/kl_optimum_policy")
    assert curve[-1] == metrics["controlled/kl_optimum_policy"]
    assert curve[-1] < 0.1 * metrics["controlled/kl_optimum_reference"]
    evaluation = json.loads((run.folder / "evaluation.json").read_text())
    assert evaluation["tabular"]["kl_optimum_policy"][0] > 1
