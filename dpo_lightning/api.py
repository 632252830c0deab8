"""The project from Python: train, load, evaluate, compare, interpolate; modules for own trainers.

Importing this imports no torch. Whatever computes does so in a process of its own, so that it
changes nothing in the caller's; ``load`` and ``lightning_modules`` give models to this process.

Example:
    >>> from dpo_lightning.api import evaluate, load, train
    >>> result = train(["beta=0.3", "trainer.max_steps=100"])  # doctest: +SKIP
    >>> evaluate(result).metrics["eval/rewards/accuracies"]  # doctest: +SKIP
    0.85
    >>> policy, tokenizer = load(result.folder)  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from dpo_lightning.cli import folder_of_run
from dpo_lightning.errors import UserError
from dpo_lightning.files import RESULT_FILE
from dpo_lightning.run.apart import answer_of, run_apart
from dpo_lightning.run.finished import export_of
from dpo_lightning.run.typed_answers import (
    ComparedPolicy,
    ComparisonResult,
    EvaluationResult,
    EvaluationSlice,
    FrontierPoint,
    InterpolationResult,
    MetricDifference,
)
from dpo_lightning.settings.folders import hydra_override
from dpo_lightning.settings.program import RUN

if TYPE_CHECKING:
    from dpo_lightning.data.datamodule import PreferenceDataModule
    from dpo_lightning.training.module import DPOModule

__all__ = [
    "ComparedPolicy",
    "ComparisonResult",
    "EvaluationResult",
    "EvaluationSlice",
    "FrontierPoint",
    "InterpolationResult",
    "MetricDifference",
    "Policy",
    "Result",
    "compare",
    "evaluate",
    "interpolate",
    "lightning_modules",
    "load",
    "train",
]

_MERGED = "model-merged"


@dataclass(frozen=True, slots=True)
class Result:
    """A run that has ended, as its ``result.json`` says.

    Attributes:
        folder: The run's folder.
        status: ``finished``, ``stopped``, ``diverged`` or ``failed``; of a trial that its sweep
            stopped early ``pruned``, or ``paused`` while that is not decided.
        exit_code: Of its process: 0 finished, 2 settings or data, 3 diverged, negative for the
            signal that killed it.
        error: Why it did not finish, on one line; None where it did.
        beta: Strength of the pull towards the reference.
        loss: The loss's name.
        seed: The seed.
        step: Optimizer steps completed.
        epoch: Passes over the training groups.
        exported_step: Step of the weights in ``model/``; None where nothing was exported.
        selection: ``monitor``, ``best``, ``best_step`` and ``stopped_early``; None where no metric
            selects checkpoints.
        resumed: From which checkpoint, at which step, with which changes; None if it began anew.
        metrics: The last value of every metric; None for one that is not finite. Those of
            evaluations and answers are of the exported step.
        signs: Signs of a training that went wrong: ``name``, ``values`` and what it ``says``.
        reference: Rows of the reference: ``rows``, ``computed``, ``cached``.
        throughput: Speeds and wall times.
        memory: Bytes, as estimated and as measured.
        model: ``name``, ``parameters``, ``trainable``.
        data: Counts of groups, and of what was dropped.
        versions: The versions that ran, by package.
        config_hash: Of what decides the numbers; None where it ended before that was known.
        settings_hash: Of the settings alone; None where it ended before they were known.
        basis: Model, reference, rows and judge that the numbers are of.
        command: What repeats it.
    """

    folder: Path
    status: str
    exit_code: int
    error: str | None = None
    beta: float | None = None
    loss: str | None = None
    seed: int | None = None
    step: int = 0
    epoch: float = 0.0
    exported_step: int | None = None
    selection: Mapping[str, Any] | None = None
    resumed: Mapping[str, Any] | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    signs: Sequence[Mapping[str, Any]] = ()
    reference: Mapping[str, Any] = field(default_factory=dict)
    throughput: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    config_hash: str | None = None
    settings_hash: str | None = None
    basis: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None


Policy: TypeAlias = str | Path | Result
"""A trained policy: a run's folder or its result, a folder with a model or a LoRA adapter, or a hub
id."""


def train(overrides: Sequence[str] = ()) -> Result:
    """Runs one experiment to its end, in a process of its own, as ``dpo-lightning train`` does.

    An interrupt is passed on to the run, which saves itself before this raises it.

    Args:
        overrides: Settings such as ``"beta=0.3"``, and flags that say where config files are.

    Returns:
        What became of it; a run that diverges or fails is a result too.

    Raises:
        UserError: If a setting is wrong, or they are those of a sweep; then nothing was started.
    """
    folder = folder_of_run(overrides).absolute()
    before = _identity(folder / RESULT_FILE)
    code, reason = run_apart([*RUN, *overrides, hydra_override("run.dir", folder)])
    # With code 0 just this run had finished there before.
    if code and _identity(folder / RESULT_FILE) == before:
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        error = reason or f"it ended before it could say why, by {how}"
        return Result(folder, "failed", code, error=error)
    found = json.loads((folder / RESULT_FILE).read_text())
    names = set(Result.__dataclass_fields__) - {"folder", "exit_code"}
    known = {name: value for name, value in found.items() if name in names}
    if code < 0:  # it had no time to say so
        known |= {"status": "failed", "error": f"killed by signal {-code}"}
    return Result(folder=folder, exit_code=code, **known)


def evaluate(
    policy: Policy,
    overrides: Sequence[str] = (),
    *,
    reference: str | Path | None = None,
    slices: Sequence[str] = (),
) -> EvaluationResult:
    """Measures a trained policy on held-out rows, as ``dpo-lightning evaluate`` does.

    Args:
        policy: The policy.
        overrides: Settings such as ``"data.eval=rows.jsonl"``.
        reference: Model that a model alone is compared with; runs have their own.
        slices: Columns of the rows by whose values metrics are given too.

    Raises:
        UserError: If the policy, its rows or a setting is wrong.
    """
    flags = [word for column in slices for word in ("--slice", column)]
    return EvaluationResult.of(
        answer_of("evaluate", [_name(policy), *flags, *_reference(reference), *overrides])
    )


def compare(
    policies: Sequence[Policy],
    overrides: Sequence[str] = (),
    *,
    reference: str | Path | None = None,
    evaluate: bool = False,
) -> ComparisonResult:
    """Tests trained policies against each other on the same rows, as ``dpo-lightning compare``.

    Args:
        policies: Two or more.
        overrides: Settings; with one all values are computed again.
        reference: Model that models alone are compared with; runs have their own.
        evaluate: True computes all values again, with more metrics than runs keep.

    Raises:
        UserError: If a policy or a setting is wrong, or the policies cannot be compared.
    """
    flags = ["--evaluate"] if evaluate else []
    names = [_name(policy) for policy in policies]
    words = [*names, *flags, *_reference(reference), *overrides]
    return ComparisonResult.of(answer_of("compare", words))


def interpolate(
    policy: Policy,
    overrides: Sequence[str] = (),
    *,
    betas: Sequence[float] = (),
    lambdas: Sequence[float] = (),
    reference: str | Path | None = None,
) -> InterpolationResult:
    """Reward and KL of one policy at other values of beta, as ``dpo-lightning interpolate``.

    A run's own frontier is kept in its folder, where the report of a sweep finds it.

    Args:
        policy: The policy.
        overrides: Settings such as ``"evaluation.judge=brevity"``.
        betas: Values of beta.
        lambdas: The same by their place: 0 is the reference, 1 the policy.
        reference: Model that a model alone is compared with; runs have their own.

    Raises:
        UserError: If the policy or a setting is wrong, or its loss has no such frontier.
    """
    words = [_name(policy)]
    for flag, numbers in (("--betas", betas), ("--lambdas", lambdas)):
        words += [f"{flag}={','.join(map(repr, numbers))}"] if len(numbers) else []
    return InterpolationResult.of(
        answer_of("interpolate", [*words, *_reference(reference), *overrides])
    )


def lightning_modules(
    overrides: Sequence[str] = (),
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    eval_rows: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[DPOModule, PreferenceDataModule]:
    """Makes the module and the data module of a run, for a ``lightning.Trainer`` of one's own.

    Reference log-probabilities are computed here, or read from the cache. The settings of the
    trainer, loggers and checkpoints are the trainer's own and are refused here. The trainer is on
    one device and takes ``max_steps=data.total_steps``; a batch of Lightning is an optimizer step.

    Args:
        overrides: Settings such as ``"beta=0.3"``, ``"loss=ipo"``, ``"optimizer.lr=1e-5"``.
        model: A transformers causal language model, which is copied; ``model.pretrained=`` names
            one on disk or of the hub. The policy that is trained is ``module.policy``.
        tokenizer: Its tokenizer.
        rows: Training rows as dictionaries; ``data.train=`` names a file or a hub id.
        eval_rows: Held-out rows.

    Raises:
        UserError: If a setting, the model or a row is wrong.

    Example:
        >>> import lightning.pytorch as pl
        >>> module, data = lightning_modules(["beta=0.3"])  # doctest: +SKIP
        >>> trainer = pl.Trainer(max_steps=data.total_steps)  # doctest: +SKIP
        >>> trainer.fit(module, datamodule=data)  # doctest: +SKIP
    """
    # Here, because it imports torch.
    from dpo_lightning.run.own_trainer import make_modules

    return make_modules(overrides, model=model, tokenizer=tokenizer, rows=rows, eval_rows=eval_rows)


def _name(policy: Policy) -> str:
    return str(policy.folder if isinstance(policy, Result) else policy)


def _reference(name: str | Path | None) -> list[str]:
    return [] if name is None else [f"--reference={name}"]


def _identity(path: Path) -> tuple[int, int] | None:
    """Mark of a file that changes when it is written anew; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def load(run: str | Path) -> tuple[Any, Any]:
    """Loads the policy that a run exported, and its tokenizer, in evaluation mode on the CPU.

    An adapter is loaded by PEFT onto the base model that the run started from.

    Args:
        run: The run's folder.

    Raises:
        UserError: If there is no such run, it left no export, or the export cannot be loaded.
    """
    folder = Path(run)
    export = export_of(folder)
    # Here, because they import torch.
    from dpo_lightning.models.adapter_files import CONFIG_FILE
    from dpo_lightning.models.loading import load_tokenizer

    is_adapter = (export / CONFIG_FILE).is_file()
    policy = _adapted(export, _settings(folder)) if is_adapter else _whole(str(export), "run")
    return policy.eval(), load_tokenizer(str(export), key="run", needs_eos=False)


def _settings(folder: Path) -> Mapping[str, Any]:
    """The ``model`` group of a run's own settings; empty where they were taken away."""
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _whole(source: str, key: str, **options: Any) -> Any:
    """A model in the type that it is stored in, unless another is named."""
    import torch

    from dpo_lightning.models.loading import load_config, load_model

    dtype, overrides = options.pop("dtype", None), options.pop("overrides", None)
    config = load_config(source, key=key, overrides=overrides, **options)
    named = getattr(torch, dtype) if dtype else config.dtype or torch.float32
    return load_model(source, config, key=key, dtype=named, **options)


def _adapted(export: Path, settings: Mapping[str, Any]) -> Any:
    from dpo_lightning.assets import BUNDLED_MODEL
    from dpo_lightning.models.adapter_files import CONFIG_FILE, read_adapter
    from dpo_lightning.models.loading import load_onto

    base = read_adapter(str(export), key="run").base
    merged = export.parent / _MERGED
    if base is None and merged.is_dir():
        return _whole(str(merged), "run")
    if base is None:
        raise UserError(
            f"run={export.parent}: its adapter was trained beside random weights, which nobody "
            "kept; train with peft.merge=true"
        )
    is_bundled = Path(base).parts[-3:] == BUNDLED_MODEL.parts[-3:]
    model = _whole(
        str(BUNDLED_MODEL) if is_bundled else base,
        "model.pretrained",
        revision=json.loads((export / CONFIG_FILE).read_text()).get("revision"),
        dtype=settings.get("dtype"),
        overrides=settings.get("config_overrides"),
    )
    return load_onto(model, str(export), key="run")
