"""Checks of settings against each other, and of the files and folders that they name.

Each check takes the typed settings, every one of them valid by itself, and yields one clause per
problem. Paths are looked at, nothing is opened; a hub id is only judged by its form.
"""

from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from dpo_lightning.data.source_names import (
    entries,
    eval_entries,
    eval_key,
    eval_sets,
    is_address,
    is_hub_id,
    is_local_data,
    source_label,
)
from dpo_lightning.objectives.objective import ObjectiveSettings, known_losses
from dpo_lightning.objectives.registry import UNPAIRED_LOSSES
from dpo_lightning.settings.generation import generation_problems
from dpo_lightning.settings.judging import judge_problems, model_judge
from dpo_lightning.settings.logger_group import logger_problems
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.messages import loss_hint
from dpo_lightning.settings.model_folders import found_instead
from dpo_lightning.settings.moving_reference import moving_reference_problems
from dpo_lightning.settings.optimizer_group import optimizer_problems
from dpo_lightning.settings.pruning import pruning_problems
from dpo_lightning.settings.rounds import rounds_problems
from dpo_lightning.settings.row_sources import source_problems
from dpo_lightning.settings.schema import BASE, Config, PeftConfig, StrategyConfig
from dpo_lightning.settings.selection import sampling_problems, selection_problems

# What families call the layer behind the decoder.
_HEADS = ("lm_head", "embed_out", "output_layer")


def _model_folder(key: str, source: str | None, needs: tuple[str, ...]) -> Iterator[str]:
    if source is None:
        return
    path = Path(source)
    found = found_instead(key, path, needs)
    fault = None if found is None else f"={source}: {found}"
    if is_address(source):
        yield f"{key}={source}: addresses are not loaded; name a folder or a hub id (owner/name)"
    elif fault is not None:
        yield f"{key}{fault}"
    elif path.exists():
        if not path.is_dir() and not (key == "model.config" and path.suffix == ".json"):
            yield f"{key}={source} is a file; name the folder that holds {' or '.join(needs)}"
    elif source.startswith((".", "/", "~")) or not is_hub_id(source):
        yield (
            f"{key}={source}: no such folder, seen from {Path.cwd()}, "
            "and a hub id has the form owner/name"
        )


def _model(config: Config) -> Iterator[str]:
    model, data = config.model, config.data
    yield from _model_folder("model.pretrained", model.pretrained, ("config.json",))
    yield from _model_folder("model.config", model.config, ("config.json",))
    yield from _model_folder(
        "model.tokenizer", model.tokenizer, ("tokenizer.json", "tokenizer_config.json")
    )
    if model.config is not None and model.pretrained is not None:
        yield (
            f"model.config={model.config} makes a random model and "
            f"model.pretrained={model.pretrained} loads one: give one of the two"
        )
    if model.config is None and model.config_overrides:
        if model.pretrained is None:
            yield "model.config_overrides changes the shape of model.config: set model.config= too"
        else:
            yield (
                "model.config_overrides changes the shape of a random model, and "
                f"model.pretrained={model.pretrained} loads one as it is; leave "
                "model.config_overrides out"
            )
    if model.revision is not None and model.pretrained is None:
        yield f"model.revision={model.revision} is for a hub id: set model.pretrained= too"
    if model.pretrained is None and model.config is None:
        if data.train is not None:
            yield (
                f"data.train={source_label(data.train)}: the bundled model speaks only the "
                "controlled task; name a model with model.pretrained=<folder or hub id>"
            )
        if model.tokenizer is not None:
            yield (
                f"model.tokenizer={model.tokenizer}: the bundled model speaks only through its "
                "own; name a model with model.pretrained=<folder or hub id>"
            )


def _data(config: Config) -> Iterator[str]:
    data = config.data
    yield from source_problems("data.train", data.train, split=data.train_split, subset=data.subset)
    held_out = data.eval_split or data.train_split
    for name, source in eval_sets(data.eval).items():
        key = eval_key(name)
        yield from source_problems(key, source, split=held_out, subset=data.subset)
    if data.train is None:
        if data.name != "controlled":
            yield f"data={data.name} needs rows: data.train=<file or hub id>"
        elif config.model.pretrained is not None or config.model.config is not None:
            key = "model.config" if config.model.pretrained is None else "model.pretrained"
            value = config.model.pretrained or config.model.config
            yield (
                f"{key}={value}: the controlled task is spoken only by the bundled model; "
                "name rows with data.train=<file or hub id>"
            )
        if data.threshold is not None:
            yield (
                f"data.threshold={data.threshold:g}: the controlled task has no ratings; leave it "
                "out"
            )
        if data.eval is not None:
            shown = source_label(data.eval)
            yield f"data.eval={shown} needs training rows too: data.train=<file or hub id>"
    else:
        yield from _splits(config)
    template = data.chat_template
    # Template text has braces; whatever has none is meant as a file.
    if template is not None and "{" not in template and not Path(template).is_file():
        yield (
            f"data.chat_template={template}: no such file, seen from {Path.cwd()}; "
            "a template itself has {{ }} or {% %}"
        )


def _splits(config: Config) -> Iterator[str]:
    """Settings of a data set's parts beside files, which have none."""
    data = config.data
    train = [entry.path for entry in entries(data.train)]
    all_paths = [*train, *(entry.path for entry in eval_entries(data.eval))]
    parted = [path for path in all_paths if not is_local_data(path) or Path(path).is_dir()]
    if not parted:
        of_hub = {"data.subset": data.subset, "data.revision": data.revision}
        if data.eval is None:
            of_hub["data.eval_split"] = data.eval_split
        for key, value in of_hub.items():
            if value is not None:
                shown = source_label(data.train)
                yield (
                    f"{key}={value} is for hub data sets, and data.train={shown} is a file; "
                    "leave it out"
                )
    elif data.eval is None and data.eval_split is not None:
        for path in train:
            if path not in parted:
                yield (
                    f"data.eval_split={data.eval_split} is for a hub data set or a folder, and "
                    f"{path} of data.train is a file; name held-out rows with data.eval="
                )


def _objective(config: Config) -> Iterator[str]:
    loss, reference = config.loss, config.reference
    if not loss.terms and loss.name not in known_losses():
        names = ", ".join(known_losses())
        yield f"loss.name={loss.name}: must be one of {names}{loss_hint(loss.name)}"
        return
    if any(
        isinstance(weight, bool) or not isinstance(weight, int | float)
        for weight in loss.terms.values()
    ):
        yield f"loss.terms={loss.terms}: needs a number for each loss"
        return
    objective = objective_settings(loss)
    yield from (f"loss.{problem}" for problem in objective.problems())
    yield from _use_of_reference(config, objective)
    yield from _controlled(config, objective)
    yield from _labels(config, objective)
    yield from moving_reference_problems(config)
    yield from _changing_beta(config, objective)
    if reference.kind == "none" and reference.pretrained is not None:
        yield (
            f"reference.pretrained={reference.pretrained} with reference=none: "
            "use reference=live, or leave it out"
        )
    has_other = reference.pretrained is not None or reference.adapter not in (None, BASE)
    if reference.revision is not None and reference.adapter == BASE and not reference.pretrained:
        yield (
            f"reference.revision={reference.revision}: reference.adapter={BASE} is the model's own "
            "weights, whose revision is model.revision; leave it out"
        )
    elif reference.revision is not None and not has_other:
        yield (
            f"reference.revision={reference.revision}: set reference.pretrained= or "
            "reference.adapter= too"
        )
    yield from _model_folder("reference.pretrained", reference.pretrained, ("config.json",))


def _controlled(config: Config, objective: ObjectiveSettings) -> Iterator[str]:
    """Faults between the loss and the rows of the embedded task."""
    controlled = config.data.controlled
    if controlled.population and (objective.listwise or objective.is_unpaired):
        named = ",".join([*objective.listwise, *objective.unpaired])
        yield (
            f"data.controlled.population=true weighs pairs, which loss={named} does not compare; "
            "use data.controlled.population=false, or another loss"
        )
    if controlled.form == "unpaired" and config.data.train is not None:
        yield (
            "data.controlled.form=unpaired is of the embedded task, and data.train="
            f"{source_label(config.data.train)} has rows of its own; leave it out"
        )
    elif controlled.form == "unpaired" and not objective.is_unpaired:
        yield (
            "data.controlled.form=unpaired: rows have one response and a label, and "
            f"loss={','.join(objective.terms)} compares two; use data.controlled.form=pairs, or "
            f"loss={' or '.join(UNPAIRED_LOSSES)}"
        )


def _labels(config: Config, objective: ObjectiveSettings) -> Iterator[str]:
    """Faults between the loss and settings of labelled rows."""
    bounds = config.data.density_ratio
    if bounds is not None and not objective.is_unpaired:
        yield (
            f"data.density_ratio={bounds[0]:g},{bounds[1]:g} weighs single responses, and "
            f"loss={','.join(objective.terms)} compares two; leave it out, or use "
            f"loss={' or '.join(UNPAIRED_LOSSES)}"
        )


def _use_of_reference(config: Config, objective: ObjectiveSettings) -> Iterator[str]:
    """Faults between the loss and the reference."""
    loss, reference = config.loss, config.reference
    if not objective.uses_reference:
        if reference.kind in ("cached", "live"):
            yield (
                f"reference={reference.kind}: loss={loss.name} uses no reference; "
                "use reference=auto"
            )
        if reference.pretrained is not None:
            yield (
                f"reference.pretrained={reference.pretrained}: loss={loss.name} uses no reference; "
                "leave it out"
            )
    elif reference.kind == "none":
        for name in objective.needs_reference:
            yield (
                f"reference=none: loss={name} compares each response with the reference; "
                "use reference=auto"
            )
        if objective.f_divergence != "reverse_kl":
            yield (
                f"reference=none: loss.f_divergence={objective.f_divergence} is a distance from "
                "the reference; use reference=auto"
            )


def _changing_beta(config: Config, objective: ObjectiveSettings) -> Iterator[str]:
    """Faults of a beta that does not stay as it is."""
    loss = config.loss
    if loss.beta_schedule == "constant" and loss.beta_end is not None:
        yield (
            f"loss.beta_end={loss.beta_end:g}: beta stays as it is; "
            "add loss.beta_schedule=linear or cosine"
        )
    if loss.beta_schedule != "constant" and loss.beta_end is None:
        yield f"loss.beta_schedule={loss.beta_schedule} needs loss.beta_end=<beta at the end>"
    if loss.adaptive_beta and not any(e.uses_rejected for e in objective.pairwise.values()):
        yield (
            f"loss.adaptive_beta={loss.adaptive_beta:g} follows the margins of pairs, which "
            f"loss={loss.name} does not compare; leave it out, or use another loss"
        )


def _peft(config: Config) -> Iterator[str]:
    peft, reference = config.peft, config.reference
    default, lora = PeftConfig(), peft.kind == "lora"
    changed = {
        name: value
        for name, value in asdict(peft).items()
        if name != "kind" and value != getattr(default, name)
    }
    if not lora:
        for name, value in changed.items():
            yield f"peft.{name}={value}: peft=none trains all weights; add peft=lora"
        if reference.adapter is not None:
            yield f"reference.adapter={reference.adapter} is for LoRA: add peft=lora"
        return
    for name in peft.target_modules or ():
        if name.rpartition(".")[2] in _HEADS:
            yield (
                f"peft.target_modules: {name} is the model's head, which stays frozen; name layers "
                "of the decoder, or null for all of them"
            )
    if peft.adapter is not None:
        for name in ("r", "alpha", "target_modules", "rslora", "dora", "init"):
            if name in changed:
                yield (
                    f"peft.{name}={changed[name]}: the adapter of peft.adapter={peft.adapter} has "
                    "its own; leave one of the two out"
                )
    elif peft.revision is not None:
        yield f"peft.revision={peft.revision} is for a hub id: set peft.adapter= too"
    yield from _adapter_folder("peft.adapter", peft.adapter)
    yield from _four_bits(config)
    yield from _adapter_of_reference(config)


def _four_bits(config: Config) -> Iterator[str]:
    """Faults of weights in 4 bits."""
    peft = config.peft
    if peft.quantization == "nf4":
        if find_spec("bitsandbytes") is None:
            yield (
                "peft.quantization=nf4 needs bitsandbytes, which is not installed: "
                'pip install "dpo-lightning[qlora]"'
            )
        if config.model.config is not None:
            yield (
                f"peft.quantization=nf4: model.config={config.model.config} has random weights; "
                "set model.pretrained= instead"
            )
        if peft.merge:
            yield (
                "peft.merge=true: weights in 4 bits cannot take the adapter in without rounding it "
                "away; merge it into the model that you serve, or use peft.quantization=none"
            )


def _adapter_of_reference(config: Config) -> Iterator[str]:
    """Faults of an adapter of the reference's own."""
    reference = config.reference
    if reference.adapter is None:
        return
    key = f"reference.adapter={reference.adapter}"
    if reference.adapter in ("none", "null", "off"):
        yield f"{key}: the model without any adapter is reference.adapter={BASE}"
        return
    if reference.pretrained is not None:
        yield (
            f"{key} is an adapter on the policy's own base model and "
            f"reference.pretrained={reference.pretrained} another model: give one of the two"
        )
    if reference.kind == "none":
        yield f"{key} with reference=none: use reference=auto, or leave it out"
    elif not objective_settings(config.loss).uses_reference:
        yield f"{key}: loss={config.loss.name} uses no reference; leave it out"
    if reference.adapter != BASE:
        yield from _adapter_folder("reference.adapter", reference.adapter)


def _adapter_folder(key: str, source: str | None) -> Iterator[str]:
    """Yields the faults of a LoRA adapter's folder, seen from outside."""
    yield from _model_folder(key, source, ("adapter_config.json",))
    if source is None or not (Path(source) / "adapter_config.json").is_file():
        return
    if not (Path(source) / "adapter_model.safetensors").is_file():
        has_pickle = (Path(source) / "adapter_model.bin").exists()
        found = "adapter_model.bin is a pickle and is not loaded" if has_pickle else "no weights"
        yield f"{key}={source}: {found}; needs adapter_model.safetensors"


# What a strategy has a use for; the rest is left as it is.
_OF_STRATEGY = {
    "auto": (),
    "ddp": ("find_unused_parameters", "timeout_minutes"),
    "fsdp": ("sync_gradients", "timeout_minutes"),
}


def _strategy(config: Config) -> Iterator[str]:
    strategy = config.strategy
    chosen, default = asdict(strategy), asdict(StrategyConfig())
    for key in chosen:
        if key == "name" or chosen[key] == default[key] or key in _OF_STRATEGY[strategy.name]:
            continue
        users = [f"strategy={name}" for name, keys in _OF_STRATEGY.items() if key in keys]
        yield (
            f"strategy.{key}={chosen[key]}: strategy={strategy.name} does not use it; "
            f"add {' or '.join(users)}"
        )
    if strategy.name == "fsdp" and config.peft.quantization == "nf4":
        yield (
            "strategy=fsdp: peft.quantization=nf4 is not supported: sharded 4-bit layers silently "
            "give wrong numbers (bitsandbytes #1945); use strategy=ddp, or "
            "peft.quantization=none model.dtype=bfloat16"
        )
    if strategy.name == "fsdp" and config.trainer.accelerator == "mps":
        yield "strategy=fsdp: shards need trainer.accelerator=gpu or cpu, not mps"


def _optimizer(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.stochastic_rounding and config.model.dtype != "bfloat16":
        yield (
            f"optimizer.stochastic_rounding=true rounds bfloat16 weights, and "
            f"model.dtype={config.model.dtype}; set model.dtype=bfloat16 too, or leave it out"
        )
    yield from optimizer_problems(optimizer)


def _precision(config: Config) -> Iterator[str]:
    if config.trainer.precision == "16-mixed" and config.model.dtype == "bfloat16":
        yield (
            "trainer.precision=16-mixed computes in float16 beside float32 weights, and "
            "model.dtype=bfloat16; use model.dtype=float32, or trainer.precision=bf16-true"
        )


def _devices(config: Config, *, multirun: bool) -> Iterator[str]:
    trainer = config.trainer
    several = []
    if isinstance(trainer.devices, list):
        several = [f"trainer.devices={trainer.devices}"] if len(trainer.devices) > 1 else []
        if trainer.accelerator == "cpu":
            yield (
                f"trainer.devices={trainer.devices}: processes on the CPU have no numbers; "
                f"use trainer.devices={len(trainer.devices)}"
            )
    elif isinstance(trainer.devices, int) and trainer.devices > 1:
        several = [f"trainer.devices={trainer.devices}"]
    if trainer.num_nodes > 1:
        several.append(f"trainer.num_nodes={trainer.num_nodes}")
    yield from _strategy(config)
    coupled = objective_settings(config.loss).couples
    alone = [f"{setting.partition('=')[0]}=1" for setting in several]
    if several and coupled:
        yield (
            f"{' '.join(several)}: loss={','.join(coupled)} compares all pairs of a step, of which "
            f"a device would see its share; use {' '.join(alone)}, or another loss"
        )
    if multirun and several:
        yield (
            f"{' '.join(several)}: the trials of hydra/launcher=basic share one process, which has "
            "one device; use hydra/launcher=devices"
        )


def _resume(config: Config, *, explicit_run_dir: bool) -> Iterator[str]:
    if config.resume is None:
        return
    if config.resume == "auto":
        if not explicit_run_dir:
            yield "resume=auto looks in the run's folder: name that, hydra.run.dir=<folder>"
    elif is_address(config.resume):
        yield (
            f"resume={config.resume}: addresses are not loaded; name a checkpoint or a run's "
            "folder of this machine"
        )
    elif not Path(config.resume).exists():
        yield (
            f"resume={config.resume}: no such checkpoint or run folder, seen from {Path.cwd()}; "
            "resume=auto hydra.run.dir=<folder> takes the newest one there"
        )


def _evaluation(config: Config) -> Iterator[str]:
    problems = list(judge_problems(config))
    yield from problems
    if not problems and not config.plugins:  # else it may be the name of a function
        judge = model_judge(config.evaluation)
        yield from _model_folder("evaluation.judge", judge, ("config.json",))


def inconsistencies(config: Config, *, multirun: bool, explicit_run_dir: bool) -> Iterator[str]:
    """Yields all contradictions of a config, one clause each.

    Args:
        config: Settings of which each is valid by itself.
        multirun: True if it is one of several that run in this process.
        explicit_run_dir: True if the run's folder was named.

    Yields:
        The keys, their values and the remedy.
    """
    yield from _model(config)
    yield from _data(config)
    yield from _objective(config)
    yield from _peft(config)
    yield from _optimizer(config)
    yield from _precision(config)
    yield from _devices(config, multirun=multirun)
    yield from _resume(config, explicit_run_dir=explicit_run_dir)
    yield from _evaluation(config)
    yield from selection_problems(config)
    yield from sampling_problems(config)
    yield from pruning_problems(config)
    yield from logger_problems(config.logger)
    yield from generation_problems(config.generation, config.strategy.name, config.plugins)
    yield from rounds_problems(config)
