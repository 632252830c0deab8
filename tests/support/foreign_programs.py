"""Keys of other programs: read off their installed sources, or as their files had them."""

import ast
from importlib.util import find_spec
from pathlib import Path


def source_of(package: str, *path: str) -> ast.Module:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).parent.joinpath(*path).read_text())


def fields_of(package: str, path: tuple[str, ...], name: str) -> list[str]:
    """Fields that a dataclass declares itself, read off its source: an import takes seconds."""
    [found] = [
        node
        for node in source_of(package, *path).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    return [
        str(getattr(item.target, "id", ""))
        for item in found.body
        if isinstance(item, ast.AnnAssign)
        and "ClassVar" not in ast.unparse(item.annotation)
        and not str(getattr(item.target, "id", "")).startswith("_")
    ]


def parameters_of(package: str, path: tuple[str, ...], name: str) -> list[str]:
    for node in ast.walk(source_of(package, *path)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    own = item.args
                    return [arg.arg for arg in [*own.args, *own.kwonlyargs] if arg.arg != "self"]
    raise AssertionError(f"no {name}")


TRL = [
    *fields_of("trl", ("trainer", "dpo_config.py"), "DPOConfig"),
    *fields_of("trl", ("trainer", "base_config.py"), "_BaseConfig"),
    *fields_of("trl", ("trainer", "model_config.py"), "ModelConfig"),
    *fields_of("trl", ("scripts", "utils.py"), "ScriptArguments"),
    *parameters_of("trl", ("trainer", "dpo_trainer.py"), "DPOTrainer"),
]
TRANSFORMERS = fields_of("transformers", ("training_args.py",), "TrainingArguments")
LIGHTNING = parameters_of("lightning", ("pytorch", "trainer", "trainer.py"), "Trainer")
FIRST_REPOSITORY = (
    *("seed", "exp_name", "batch_size", "eval_batch_size", "debug", "fsdp_port", "datasets"),
    *("wandb.enabled", "wandb.entity", "wandb.project", "local_dirs", "sample_during_eval"),
    *("n_eval_model_samples", "do_first_eval", "local_run_dir", "lr", "max_grad_norm"),
    *("gradient_accumulation_steps", "max_length", "max_prompt_length", "n_epochs", "n_examples"),
    *("n_eval_examples", "trainer", "optimizer", "warmup_steps", "activation_checkpointing"),
    *("eval_every", "minimum_log_interval_secs", "model.name_or_path", "model.archive"),
    *("model.tokenizer_name_or_path", "model.block_name", "model.policy_dtype", "loss.name"),
    *("model.fsdp_policy_mp", "model.reference_dtype", "loss.beta", "loss.label_smoothing"),
    "loss.reference_free",
)
"""The keys of the configs of DPO's first repository."""

RECIPES = {
    "llama_factory.md": (
        *("model_name_or_path", "trust_remote_code", "stage", "do_train", "finetuning_type"),
        *("lora_rank", "lora_target", "pref_beta", "pref_loss", "dataset", "template"),
        *("cutoff_len", "max_samples", "overwrite_cache", "preprocessing_num_workers"),
        *("output_dir", "logging_steps", "save_steps", "plot_loss", "overwrite_output_dir"),
        *("save_only_model", "report_to", "per_device_train_batch_size", "learning_rate"),
        *("gradient_accumulation_steps", "num_train_epochs", "lr_scheduler_type", "warmup_ratio"),
        *("bf16", "ddp_timeout", "resume_from_checkpoint", "eval_dataset", "val_size"),
    ),
    "alignment_handbook.md": (
        *("model_name_or_path", "torch_dtype", "dataset_mixture", "dataset_num_proc", "bf16"),
        *("beta", "do_eval", "eval_strategy", "eval_steps", "gradient_accumulation_steps"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "hub_model_id", "log_level"),
        *("learning_rate", "logging_steps", "lr_scheduler_type", "max_length", "optim", "seed"),
        *("max_prompt_length", "num_train_epochs", "output_dir", "per_device_train_batch_size"),
        *("per_device_eval_batch_size", "push_to_hub", "save_strategy", "save_steps"),
        *("save_total_limit", "warmup_ratio", "test_split_size", "use_peft", "load_in_4bit"),
        *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "dataset_mixer"),
        *("dataset_splits", "evaluation_strategy", "loss_type", "hub_model_revision"),
        *("push_to_hub_revision", "preprocessing_num_workers"),
    ),
}
"""Keys of the examples for DPO of the one, and of zephyr-7b-beta and the scan of the other."""
