"""Keys that other programs have, and the settings that do it here.

They are those of TRL, transformers, PEFT's command lines, Lightning's Trainer and the first
repository of DPO. A key of theirs is answered, never taken: few mean the same to the letter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Answer:
    """The settings in place of a foreign name, or a sentence why there are none.

    Attributes:
        use: Settings to type, such as ``optimizer.lr=<rate>``; empty where there are none.
        why: More to know about it.
        carries: True if the typed value means the same there, so that it stands for ``<...>``.
        values: Settings for certain typed values, in place of ``use``; an empty text is none.
    """

    use: str = ""
    why: str = ""
    carries: bool = False
    values: Mapping[str, str] = field(default_factory=dict)


def _same(use: str, why: str = "") -> Answer:
    """A setting that takes the same values."""
    return Answer(use, why, carries=True)


def _use(use: str, why: str = "", **values: str) -> Answer:
    """Settings that do it, in values of their own."""
    return Answer(use, why, values=values)


def _none(why: str) -> Answer:
    """No setting."""
    return Answer(why=why)


_BETA = _none("beta has one place: beta=<value>")
_BATCH = _use(
    "data.batch_size=<groups>",
    "it counts the groups of an optimizer step and data.micro_batch_tokens bounds what a device "
    "holds at once; the accumulation follows from them",
)
_ROWS = _same("data.train=<file or hub id>")
_MODEL = _same("model.pretrained=<folder or hub id>")
_REFERENCE = _same("reference.pretrained=<folder or hub id>")
_TOKENIZER = _same("model.tokenizer=<folder or hub id>")
_NORM = _same("optimizer.max_grad_norm=<norm>")
_WARMUP = _same("optimizer.warmup=<steps, or a share below 1>")
_RUN_DIR = _same("hydra.run.dir=<folder>")
_RESUME = _same("resume=<checkpoint or run folder>")
_PASSES = _same("trainer.max_epochs=<passes>")
_SHARDS = _use("strategy=fsdp")
_HALF = _use("trainer.precision=bf16-mixed", true="trainer.precision=bf16-mixed", false="")
_FULL = "trainer.precision=32-true"
_CHECKPOINTING = _same("model.gradient_checkpointing=<true|false>")
_UNUSED = _same("strategy.find_unused_parameters=<true|false>", "with strategy=ddp")
_ANSWERS = Answer(
    "evaluation.samples=<answers>", carries=True, values={"false": "evaluation.samples=0"}
)
_HUB = _none("nothing is uploaded; the run's folder model/ is what `hf upload` takes")
_FIXED = _none("the code decides it; there is nothing to set")
_NO_PADDING = _none("nothing is padded here, whatever the lengths")
_HEAD = _none("only response tokens meet the vocabulary here, in every run")
_WHOLE_DATA = _none("every row is seen, and the last step of a pass may be short")
_LOADER = _none("batches are small; data.num_workers=<processes> is the one key of their loading")
_FOLLOWS = _none(
    "the reference stays as it is: one that follows the policy (TR-DPO) is unsupported"
)
_LOG_LEVEL = _none("libraries are quiet; hydra.verbose=true shows all they say")
_COMPILE = _none("models are not compiled: rows have many lengths")
_PARTS = _use("trainer.max_steps=<steps>", "a step is a batch of data.batch_size groups")
_EVAL_PARTS = _use("evaluation.max_prompts=<prompts>", "a fixed sample of the held-out rows")

KEYS: dict[str, Answer] = {
    # beta and the loss
    "beta": _BETA,
    "pref_beta": _BETA,
    "dpo_beta": _BETA,
    "kl_penalty": _BETA,
    "kl_coef": _BETA,
    "loss_type": _same("loss=<name>", "docs/objectives.md has their names elsewhere"),
    "pref_loss": _same("loss=<name>", "docs/objectives.md has their names elsewhere"),
    "pref_ftx": _same("loss.rpo_alpha=<weight>"),
    "stage": _use("loss=<name>", dpo="loss=sigmoid", sft="loss=sft"),
    "loss_fn": _same("loss=<name>", "docs/objectives.md has their names elsewhere"),
    "loss_weights": _use("loss.terms={<loss>: <weight>}"),
    "label_smoothing_factor": _same("loss.label_smoothing=<share>"),
    "simpo_gamma": _same("loss.gamma=<margin>"),
    "gamma_beta_ratio": _use("loss=simpo loss.gamma=<margin>", "the margin is that ratio x beta"),
    "f_divergence_type": _same("loss.f_divergence=<name>"),
    "f_alpha_divergence_coef": _same("loss.f_alpha=<order>"),
    "rpo_alpha": _same("loss.rpo_alpha=<weight>"),
    "use_weighting": _same("loss.wpo=<true|false>"),
    "router_aux_loss_coef": _none("the routers' auxiliary loss is not added"),
    "dpop_lambda": _use("loss.rpo_alpha=<weight>", "DPO-Positive is unsupported; this is similar"),
    # the reference
    "reference_free": _use("reference=<auto|none>", true="reference=none", false="reference=auto"),
    "ref_model": _REFERENCE,
    "ref_model_name_or_path": _REFERENCE,
    "reference_model": _REFERENCE,
    "reference.model": _REFERENCE,
    "ref_adapter_name": _use("reference.adapter=<folder or hub id, or base>"),
    "precompute_ref_log_probs": _use(
        "reference=<cached|live>", true="reference=cached", false="reference=live"
    ),
    "precompute_ref_batch_size": _none(
        "the reference is computed in blocks of data.micro_batch_tokens"
    ),
    "sync_ref_model": _FOLLOWS,
    "ref_model_sync_steps": _FOLLOWS,
    "ref_model_mixup_alpha": _FOLLOWS,
    "reference_dtype": _none("the reference has the type of the policy, model.dtype"),
    # the model
    "model_name_or_path": _MODEL,
    "name_or_path": _MODEL,
    "model_path": _MODEL,
    "archive": _use(
        "model.pretrained=<folder>",
        "a policy.pt is a pickle and is not loaded; write a folder with save_pretrained",
    ),
    "model_revision": _same("model.revision=<tag>"),
    "tokenizer_name_or_path": _TOKENIZER,
    "tokenizer_name": _TOKENIZER,
    "processing_class": _TOKENIZER,
    "policy_dtype": _same("model.dtype=<float32|bfloat16>"),
    "torch_dtype": _same("model.dtype=<float32|bfloat16>"),
    "dtype": _same("model.dtype=<float32|bfloat16>"),
    "fsdp_policy_mp": _use("strategy=fsdp trainer.precision=bf16-mixed"),
    "block_name": _none("strategy=fsdp finds the model's layers itself"),
    "model_init_kwargs": _none("a model is loaded as it is; model.dtype has its type"),
    "attn_implementation": _none("attention is chosen by model and device; the log says which"),
    "trust_remote_code": _none("code of a model's own is never run; name a model without it"),
    "disable_dropout": _none("dropout is always off; peft.dropout has the adapter's own"),
    "neftune_noise_alpha": _none("no noise is added to the embeddings"),
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "activation_checkpointing": _CHECKPOINTING,
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "activation_offloading": _CHECKPOINTING,
    "use_liger_kernel": _HEAD,
    "liger_kernel_config": _HEAD,
    "use_liger_loss": _HEAD,
    "use_logits_to_keep": _HEAD,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    # adapters
    "use_peft": _use("peft=<lora|none>", true="peft=lora", false="peft=none"),
    "peft_config": _use("peft=lora"),
    "lora": _use("peft=lora"),
    "finetuning_type": _use("peft=<lora|none>", lora="peft=lora", full="peft=none"),
    "quantization_bit": _use("peft=qlora", "in 4 bits; 8 bits are unsupported"),
    "lora_r": _same("peft=lora peft.r=<rank>"),
    "lora_rank": _same("peft=lora peft.r=<rank>"),
    "lora_alpha": _same("peft=lora peft.alpha=<number>"),
    "lora_dropout": _same("peft=lora peft.dropout=<share>"),
    "lora_target_modules": _same("peft=lora peft.target_modules=[<names>]"),
    "lora_target_parameters": _none("an adapter stands beside linear layers; peft.target_modules"),
    "lora_modules_to_save": _none("what has no adapter stays frozen; peft.target_modules"),
    "use_rslora": _same("peft=lora peft.rslora=<true|false>"),
    "use_dora": _same("peft=lora peft.dora=<true|false>"),
    "load_in_4bit": _use("peft=qlora"),
    "load_in_8bit": _use("peft=qlora", "in 4 bits; 8 bits are unsupported"),
    "quantization_config": _use("peft=qlora"),
    "bnb_4bit_quant_type": _use("peft=qlora", "the type is nf4"),
    "use_bnb_nested_quant": _use("peft=qlora", "the scales are not quantized again"),
    "bnb_4bit_quant_storage": _use("peft=qlora", "weights are stored as uint8"),
    "adapter_name_or_path": _same("peft=lora peft.adapter=<folder or hub id>"),
    # the data
    "dataset": _ROWS,
    "datasets": _use("data.train=<file or hub id>", hh="data=hh", **{"[hh]": "data=hh"}),
    "dataset_name": _ROWS,
    "train_dataset": _ROWS,
    "train_file": _ROWS,
    "train_data": _ROWS,
    "data_path": _ROWS,
    "eval_dataset": _same("data.eval=<file or hub id>"),
    "validation_file": _same("data.eval=<file or hub id>"),
    "dataset_config": _same("data.subset=<name>"),
    "dataset_config_name": _same("data.subset=<name>"),
    "dataset_train_split": _same("data.train_split=<name>"),
    "dataset_test_split": _same("data.eval_split=<name>"),
    "dataset_streaming": _none("rows are read whole, once"),
    "dataset_num_proc": _none("rows are read by one process; their token ids are cached"),
    "remove_unused_columns": _none("columns are used or named; nothing is removed"),
    "label_names": _use("data.columns={<field>: <column>}"),
    "length_column_name": _none("lengths are counted by the tokenizer"),
    "n_examples": _use("trainer.max_steps=<steps>", "a step has data.batch_size groups"),
    "n_eval_examples": _same("evaluation.max_prompts=<prompts>"),
    "max_eval_samples": _same("evaluation.max_prompts=<prompts>"),
    "max_seq_length": _same("data.max_length=<tokens>"),
    "cutoff_len": _same("data.max_length=<tokens>"),
    "max_prompt_length": _use(
        "data.max_length=<tokens> data.truncation=prompt", "it bounds the prompt with a response"
    ),
    "max_completion_length": _use(
        "data.max_length=<tokens> data.truncation=response", "it bounds the prompt with a response"
    ),
    "truncation_mode": _use(
        "data.truncation=<drop|prompt|response>",
        keep_end="data.truncation=prompt",
        keep_start="data.truncation=response",
    ),
    # the size of a step
    "accumulate_grad_batches": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "micro_batch_size": _BATCH,
    "batch_size": _same("data.batch_size=<groups of an optimizer step>"),
    "train_batch_size": _same("data.batch_size=<groups of an optimizer step>"),
    "per_device_eval_batch_size": _use("data.micro_batch_tokens=<tokens>"),
    "eval_batch_size": _use("data.micro_batch_tokens=<tokens>"),
    "auto_find_batch_size": _use("data.micro_batch_tokens=null", "it then follows the memory"),
    "dataloader_drop_last": _WHOLE_DATA,
    "dataloader_num_workers": _same("data.num_workers=<processes>"),
    "train_sampling_strategy": _none("the order of the rows follows from the seed"),
    "data_seed": _same("seed=<number>", "one seed is for all"),
    # the optimizer
    "lr": _same("optimizer.lr=<rate>"),
    "learning_rate": _same("optimizer.lr=<rate>"),
    "optim": _same("optimizer=<adamw|adamw_8bit>"),
    "optim_args": _use("optimizer.betas=[<two numbers>] optimizer.eps=<number>"),
    "optim_target_modules": _none("GaLore is unsupported"),
    "optimizers": _use("optimizer=<adamw|adamw_8bit>"),
    "adam_beta1": _use("optimizer.betas=[<two numbers>]"),
    "adam_beta2": _use("optimizer.betas=[<two numbers>]"),
    "adam_epsilon": _same("optimizer.eps=<number>"),
    "weight_decay": _same("optimizer.weight_decay=<number>"),
    "gradient_clip_val": _NORM,
    "max_grad_norm": _NORM,
    "gradient_clip_algorithm": _use("optimizer.max_grad_norm=<norm>", "the norm is clipped"),
    "lr_scheduler_type": _same("optimizer.schedule=<cosine|linear|constant>"),
    "lr_scheduler_kwargs": _use("optimizer.warmup=<steps, or a share below 1>"),
    "warmup_steps": _WARMUP,
    "warmup_ratio": _WARMUP,
    # the length of the training
    "steps": _same("trainer.max_steps=<steps>"),
    "max_steps": _same("trainer.max_steps=<steps>"),
    "epochs": _PASSES,
    "n_epochs": _PASSES,
    "num_epochs": _PASSES,
    "num_train_epochs": _PASSES,
    "max_epochs": _PASSES,
    "early_stopping_patience": _same(
        "checkpoint.monitor=eval/loss checkpoint.patience=<evaluations>"
    ),
    "early_stopping_threshold": _same("checkpoint.min_delta=<of the metric>"),
    "seed_everything": _same("seed=<number>"),
    "template": _same("data.chat_template=<file>", "null is the tokenizer's own"),
    "min_epochs": _none("a run ends where trainer.max_steps or trainer.max_epochs says"),
    "min_steps": _none("a run ends where trainer.max_steps or trainer.max_epochs says"),
    "limit_train_batches": _PARTS,
    "overfit_batches": _use("debug=overfit", "or data.overfit_groups=<groups>"),
    "fast_dev_run": _use("debug=fast", "three steps, no answers, and nothing logged elsewhere"),
    "barebones": _use("logger=none evaluation.samples=0 checkpoint.every_n_steps=null"),
    # evaluation
    "eval_steps": _same("evaluation.every_n_steps=<steps>"),
    "val_check_interval": _same("evaluation.every_n_steps=<steps>"),
    "eval_every": _use("evaluation.every_n_steps=<steps>", "in steps, not in examples"),
    "check_val_every_n_epoch": _use(
        "evaluation.every_n_steps=<steps>",
        "null evaluates ten times a run",
        **{"1": "evaluation.every_n_steps=<steps of a pass>"},
    ),
    "eval_strategy": _use(
        "evaluation.every_n_steps=<steps>",
        "null evaluates ten times a run; data.eval_fraction=0 holds no rows out",
        epoch="evaluation.every_n_steps=<steps of a pass>",
        no="data.eval_fraction=0",
    ),
    "eval_on_start": _same("evaluation.on_start=<true|false>"),
    "do_first_eval": _same("evaluation.on_start=<true|false>"),
    "limit_val_batches": _EVAL_PARTS,
    "limit_test_batches": _EVAL_PARTS,
    "limit_predict_batches": _none("evaluation.samples=<answers> says how many are drawn"),
    "do_eval": _none("data.eval_fraction=0 holds no rows out"),
    "do_predict": _ANSWERS,
    "generate_during_eval": _ANSWERS,
    "sample_during_eval": _ANSWERS,
    "n_eval_model_samples": _ANSWERS,
    "compute_metrics": _use("plugins=[<module>] trainer.callbacks=[<names>]"),
    "metric_for_best_model": _use("checkpoint.monitor=<metric>", "such as eval/loss"),
    "greater_is_better": _none("the better direction of every metric is known"),
    "load_best_model_at_end": _use(
        "checkpoint.export=<last|best>",
        "with checkpoint.monitor=<metric>",
        true="checkpoint.export=best",
        false="checkpoint.export=last",
    ),
    # checkpoints and folders
    "save_steps": _same("checkpoint.every_n_steps=<steps>"),
    "save_total_limit": _same("checkpoint.keep=<number>"),
    "save_strategy": _use(
        "checkpoint.every_n_steps=<steps>", no="checkpoint.every_n_steps=null checkpoint.last=false"
    ),
    "save_only_model": _none("a checkpoint is for resuming; the weights alone are in model/"),
    "enable_jit_checkpoint": _none("SIGTERM saves a checkpoint, always"),
    "enable_checkpointing": _use(
        "checkpoint.every_n_steps=<steps>",
        false="checkpoint.every_n_steps=null checkpoint.last=false",
    ),
    "ignore_data_skip": _none("a resumed run continues with the rows that were to come"),
    "resume_from_checkpoint": _RESUME,
    "ckpt_path": _RESUME,
    "output_dir": _RUN_DIR,
    "default_root_dir": _RUN_DIR,
    "local_run_dir": _RUN_DIR,
    "local_dirs": _RUN_DIR,
    "logging_dir": _RUN_DIR,
    "overwrite_output_dir": _same("overwrite=<true|false>"),
    "exp_name": _same("name=<name>"),
    "run_name": _same("name=<name>"),
    "hub_token": _none("`hf auth login` or HF_TOKEN in the environment gives it"),
    # what is shown
    "report_to": _use(
        "logger=<wandb|tensorboard|mlflow|csv|none>",
        wandb="logger=wandb",
        tensorboard="logger=tensorboard",
        mlflow="logger=mlflow",
        none="logger=none",
    ),
    "wandb_project": _same("logger.project=<name>"),
    "wandb_entity": _same("logger.entity=<name>"),
    "wandb_name": _same("name=<name>"),
    "wandb_tags": _same("logger.tags=[<tags>]"),
    "project": _same("logger.project=<name>"),
    "enabled": _use("logger=<wandb|none>", true="logger=wandb", false="logger=none"),
    "trackio_space_id": _use("logger=<wandb|tensorboard|mlflow|csv|none>"),
    "trackio_bucket_id": _use("logger=<wandb|tensorboard|mlflow|csv|none>"),
    "trackio_static_space_id": _use("logger=<wandb|tensorboard|mlflow|csv|none>"),
    "logging_steps": _same("trainer.log_every_n_steps=<steps>"),
    "logging_strategy": _use("trainer.log_every_n_steps=<steps>"),
    "minimum_log_interval_secs": _use("trainer.log_every_n_steps=<steps>"),
    "logging_first_step": _none("step 1 is always logged"),
    "logging_nan_inf_filter": _none("what is not finite stops the run; trainer.max_skipped_steps"),
    "include_num_input_tokens_seen": _none("result.json has throughput.tokens_per_second"),
    "skip_memory_metrics": _none("result.json has the peak memory of every run"),
    "disable_tqdm": _use(
        "trainer.enable_progress_bar=<true|false>",
        true="trainer.enable_progress_bar=false",
        false="trainer.enable_progress_bar=true",
    ),
    "enable_model_summary": _none("the header has the parameters and the memory"),
    "log_level": _LOG_LEVEL,
    "log_level_replica": _LOG_LEVEL,
    "log_on_each_node": _LOG_LEVEL,
    # devices
    "gpus": _same("trainer.devices=<count>"),
    "num_gpus": _same("trainer.devices=<count>"),
    "use_cpu": _use("trainer.accelerator=cpu", false="trainer.accelerator=auto"),
    "no_cuda": _use("trainer.accelerator=cpu", false="trainer.accelerator=auto"),
    "fp16": _use("trainer.precision=16-mixed", true="trainer.precision=16-mixed", false=_FULL),
    "bf16": _use("trainer.precision=bf16-mixed", true="trainer.precision=bf16-mixed", false=_FULL),
    "fp16_full_eval": _HALF,
    "bf16_full_eval": _HALF,
    "tf32": _none("float32 is computed in float32; trainer.precision=bf16-mixed is the fast one"),
    "fsdp": _SHARDS,
    "fsdp_config": _SHARDS,
    "deepspeed": _use("strategy=fsdp", "which shares weights out as its stage 3 does"),
    "accelerator_config": _use("strategy=<auto|ddp|fsdp>"),
    "parallelism_config": _use("strategy=<auto|ddp|fsdp>"),
    "ddp_find_unused_parameters": _UNUSED,
    "ddp_timeout": _use("strategy.timeout_minutes=<minutes>", "in minutes, not in seconds"),
    "ddp_backend": _none("nccl on GPUs, gloo on CPUs"),
    "local_rank": _none("trainer.devices=<count> starts the ranks; torchrun is understood too"),
    "full_determinism": _same("trainer.deterministic=<true|false>"),
    "sync_batchnorm": _none("language models have no batch norm"),
    # what several names have in common
    **dict.fromkeys(
        (
            *("use_cache", "lora_task_type", "data_collator", "ignore_bias_buffers"),
            *("eval_accumulation_steps", "average_tokens_across_devices"),
            *("use_distributed_sampler", "reload_dataloaders_every_n_epochs", "eval_delay"),
            *("num_sanity_val_steps", "do_train", "prediction_loss_only", "include_for_metrics"),
            *("batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object"),
            *("save_on_each_node", "restore_callback_states_from_checkpoint"),
            *("enable_autolog_hparams", "fsdp_port", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
            *("ddp_static_graph", "torch_empty_cache_steps", "benchmark", "inference_mode"),
        ),
        _FIXED,
    ),
    **dict.fromkeys(
        (
            *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push"),
            *("hub_revision", "model_registry"),
        ),
        _HUB,
    ),
    **dict.fromkeys(
        (
            *("padding_free", "pad_to_multiple_of", "pad_token", "padding_value"),
            *("label_pad_token_id", "group_by_length", "packing"),
        ),
        _NO_PADDING,
    ),
    **dict.fromkeys(
        (
            *("dataloader_pin_memory", "dataloader_persistent_workers"),
            *("dataloader_prefetch_factor", "dataloader_in_order"),
            *("dataloader_multiprocessing_context",),
        ),
        _LOADER,
    ),
    # a key of Lightning's whose last part means something else here
    "trainer.plugins": _none("plugins=[<module>] loads your modules; Lightning's are unsupported"),
    "trainer.logger": _use("logger=<wandb|tensorboard|mlflow|csv|none>", false="logger=none"),
    "trainer.strategy": _same("strategy=<auto|ddp|fsdp>"),
}
"""Answers by key; an entry with a dot is for that key alone, others for each key that ends so."""
