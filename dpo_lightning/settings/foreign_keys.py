"""Keys that other programs have, and the settings that do it here.

They are those of TRL, transformers, PEFT's command lines, Lightning's Trainer and the first
repository of DPO, and with them those of recipes. A key of theirs is answered, never taken: few
mean the same to the letter. The pages of docs/coming_from have each of them.
"""

from __future__ import annotations

from dpo_lightning.settings.foreign_answers import (
    ATTENTION,
    EVALUATIONS,
    FROZEN,
    HEAD,
    HUB,
    IN_4_BITS,
    LOGIN,
    ONE_READER,
    PARTS,
    ROW_ORDER,
    Answer,
    none,
    other,
    same,
)
from dpo_lightning.settings.foreign_recipes import RECIPE_KEYS

_BETA = none("beta has one place: beta=<value>")
_BATCH = other(
    "data.batch_size=<groups>",
    "it counts the groups of an optimizer step and data.micro_batch_tokens bounds what a device "
    "holds at once; the accumulation follows from them",
)
_ROWS = same("data.train=<file or hub id>")
_MODEL = same("model.pretrained=<folder or hub id>")
_REFERENCE = same("reference.pretrained=<folder or hub id>")
_TOKENIZER = same("model.tokenizer=<folder or hub id>")
_NORM = same("optimizer.max_grad_norm=<norm>")
_WARMUP = same("optimizer.warmup=<steps, or a share below 1>")
_RUN_DIR = same("hydra.run.dir=<folder>")
_RESUME = same("resume=<checkpoint or run folder>")
_PASSES = same("trainer.max_epochs=<passes>")
_SHARDS = other("strategy=fsdp")
_HALF = other("trainer.precision=bf16-mixed", true="trainer.precision=bf16-mixed", false="")
_FULL = "trainer.precision=32-true"
_CHECKPOINTING = same("model.gradient_checkpointing=<true|false>")
_UNUSED = same("strategy.find_unused_parameters=<true|false>", "with strategy=ddp")
_ANSWERS = Answer(
    "evaluation.samples=<answers>", carries=True, values={"false": "evaluation.samples=0"}
)
_FIXED = none("the code decides it; there is nothing to set")
_NO_PADDING = none("nothing is padded here, whatever the lengths")
_WHOLE_DATA = none("every row is seen, and the last step of a pass may be short")
_LOADER = none("batches are small; data.num_workers=<processes> is the one key of their loading")
_LOG_LEVEL = none("libraries are quiet; hydra.verbose=true shows all they say")
_COMPILE = none("models are not compiled: rows have many lengths")
_EVAL_PARTS = other("evaluation.max_prompts=<prompts>", "a fixed sample of the held-out rows")

KEYS: dict[str, Answer] = {
    # beta and the loss
    "beta": _BETA,
    "pref_beta": _BETA,
    "dpo_beta": _BETA,
    "kl_penalty": _BETA,
    "kl_coef": _BETA,
    "loss_type": same("loss=<name>", "docs/objectives.md has their names elsewhere"),
    "pref_loss": same("loss=<name>", "docs/objectives.md has their names elsewhere"),
    "pref_ftx": same("loss.rpo_alpha=<weight>"),
    "stage": other("loss=<name>", dpo="loss=sigmoid", sft="loss=sft", kto="loss=kto"),
    "kto_chosen_weight": same("loss.desirable_weight=<weight>"),
    "kto_rejected_weight": same("loss.undesirable_weight=<weight>"),
    "loss_fn": same("loss=<name>", "docs/objectives.md has their names elsewhere"),
    "loss_weights": other("loss.terms={<loss>: <weight>}"),
    "label_smoothing_factor": same("loss.label_smoothing=<share>"),
    "simpo_gamma": same("loss.gamma=<margin>"),
    "gamma_beta_ratio": other("loss=simpo loss.gamma=<margin>", "the margin is that ratio x beta"),
    "f_divergence_type": same("loss.f_divergence=<name>"),
    "f_alpha_divergence_coef": same("loss.f_alpha=<order>"),
    "rpo_alpha": same("loss.rpo_alpha=<weight>"),
    "use_weighting": same("loss.wpo=<true|false>"),
    "router_aux_loss_coef": none("the routers' auxiliary loss is not added"),
    "dpop_lambda": other("loss.rpo_alpha=<weight>", "DPO-Positive is unsupported; this is similar"),
    # the reference
    "reference_free": other("reference=<auto|none>", true="reference=none", false="reference=auto"),
    "ref_model": _REFERENCE,
    "ref_model_name_or_path": _REFERENCE,
    "reference_model": _REFERENCE,
    "reference.model": _REFERENCE,
    "ref_adapter_name": other("reference.adapter=<folder or hub id, or base>"),
    "precompute_ref_log_probs": other(
        "reference=<cached|live>", true="reference=cached", false="reference=live"
    ),
    "precompute_ref_batch_size": none(
        "the reference is computed in blocks of data.micro_batch_tokens"
    ),
    "sync_ref_model": other(
        "reference.sync_every=<steps>", true="reference.sync_every=512", false=""
    ),
    "ref_model_sync_steps": same("reference.sync_every=<steps>"),
    "ref_model_mixup_alpha": same("reference.sync_alpha=<share>", "of the policy, as there"),
    "reference_dtype": none("the reference has the type of the policy, model.dtype"),
    # the model
    "model_name_or_path": _MODEL,
    "name_or_path": _MODEL,
    "model_path": _MODEL,
    "archive": other(
        "model.pretrained=<folder>",
        "a policy.pt is a pickle and is not loaded; write a folder with save_pretrained",
    ),
    "model_revision": same("model.revision=<tag>"),
    "tokenizer_name_or_path": _TOKENIZER,
    "tokenizer_name": _TOKENIZER,
    "processing_class": _TOKENIZER,
    "policy_dtype": same("model.dtype=<float32|bfloat16>"),
    "torch_dtype": same("model.dtype=<float32|bfloat16>"),
    "dtype": same("model.dtype=<float32|bfloat16>"),
    "fsdp_policy_mp": other("strategy=fsdp trainer.precision=bf16-mixed"),
    "block_name": none("strategy=fsdp finds the model's layers itself"),
    "model_init_kwargs": none("a model is loaded as it is; model.dtype has its type"),
    "attn_implementation": ATTENTION,
    "trust_remote_code": none("code of a model's own is never run; name a model without it"),
    "disable_dropout": none("dropout is always off; peft.dropout has the adapter's own"),
    "neftune_noise_alpha": none("no noise is added to the embeddings"),
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "activation_checkpointing": _CHECKPOINTING,
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "activation_offloading": _CHECKPOINTING,
    "use_liger_kernel": HEAD,
    "liger_kernel_config": HEAD,
    "use_liger_loss": HEAD,
    "use_logits_to_keep": HEAD,
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    # adapters
    "use_peft": other("peft=<lora|none>", true="peft=lora", false="peft=none"),
    "peft_config": other("peft=lora"),
    "lora": other("peft=lora"),
    "finetuning_type": other("peft=<lora|none>", lora="peft=lora", full="peft=none"),
    "quantization_bit": IN_4_BITS,
    "lora_r": same("peft=lora peft.r=<rank>"),
    "lora_rank": same("peft=lora peft.r=<rank>"),
    "lora_alpha": same("peft=lora peft.alpha=<number>"),
    "lora_dropout": same("peft=lora peft.dropout=<share>"),
    "lora_target_modules": same("peft=lora peft.target_modules=[<names>]"),
    "lora_target_parameters": none("an adapter stands beside linear layers; peft.target_modules"),
    "lora_modules_to_save": FROZEN,
    "use_rslora": same("peft=lora peft.rslora=<true|false>"),
    "use_dora": same("peft=lora peft.dora=<true|false>"),
    "load_in_4bit": other("peft=qlora"),
    "load_in_8bit": IN_4_BITS,
    "quantization_config": other("peft=qlora"),
    "bnb_4bit_quant_type": other("peft=qlora", "the type is nf4"),
    "use_bnb_nested_quant": other("peft=qlora", "the scales are not quantized again"),
    "bnb_4bit_quant_storage": other("peft=qlora", "weights are stored as uint8"),
    "adapter_name_or_path": same("peft=lora peft.adapter=<folder or hub id>"),
    # the data
    "dataset": _ROWS,
    "datasets": other("data.train=<file or hub id>", hh="data=hh", **{"[hh]": "data=hh"}),
    "dataset_name": _ROWS,
    "train_dataset": _ROWS,
    "train_file": _ROWS,
    "train_data": _ROWS,
    "data_path": _ROWS,
    "eval_dataset": same("data.eval=<file or hub id>"),
    "validation_file": same("data.eval=<file or hub id>"),
    "dataset_config": same("data.subset=<name>"),
    "dataset_config_name": same("data.subset=<name>"),
    "dataset_train_split": same("data.train_split=<name>"),
    "dataset_test_split": same("data.eval_split=<name>"),
    "dataset_streaming": none("rows are read whole, once"),
    "dataset_num_proc": ONE_READER,
    "remove_unused_columns": none("columns are used or named; nothing is removed"),
    "label_names": other("data.columns={<field>: <column>}"),
    "length_column_name": none("lengths are counted by the tokenizer"),
    "n_examples": other("trainer.max_steps=<steps>", "a step has data.batch_size groups"),
    "n_eval_examples": same("evaluation.max_prompts=<prompts>"),
    "max_eval_samples": same("evaluation.max_prompts=<prompts>"),
    "max_seq_length": same("data.max_length=<tokens>"),
    "cutoff_len": same("data.max_length=<tokens>"),
    "max_prompt_length": other(
        "data.max_length=<tokens> data.truncation=prompt", "it bounds the prompt with a response"
    ),
    "max_completion_length": other(
        "data.max_length=<tokens> data.truncation=response", "it bounds the prompt with a response"
    ),
    "truncation_mode": other(
        "data.truncation=<drop|prompt|response>",
        keep_end="data.truncation=prompt",
        keep_start="data.truncation=response",
    ),
    # the size of a step
    "accumulate_grad_batches": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "micro_batch_size": _BATCH,
    "batch_size": same("data.batch_size=<groups of an optimizer step>"),
    "train_batch_size": same("data.batch_size=<groups of an optimizer step>"),
    "per_device_eval_batch_size": other("data.micro_batch_tokens=<tokens>"),
    "eval_batch_size": other("data.micro_batch_tokens=<tokens>"),
    "auto_find_batch_size": other("data.micro_batch_tokens=null", "it then follows the memory"),
    "dataloader_drop_last": _WHOLE_DATA,
    "dataloader_num_workers": same("data.num_workers=<processes>"),
    "train_sampling_strategy": ROW_ORDER,
    "data_seed": same("seed=<number>", "one seed is for all"),
    # the optimizer
    "lr": same("optimizer.lr=<rate>"),
    "learning_rate": same("optimizer.lr=<rate>"),
    "optim": same("optimizer=<adamw|adamw_8bit>"),
    "optim_args": other("optimizer.betas=[<two numbers>] optimizer.eps=<number>"),
    "optim_target_modules": none("GaLore is unsupported"),
    "optimizers": other("optimizer=<adamw|adamw_8bit>"),
    "adam_beta1": other("optimizer.betas=[<two numbers>]"),
    "adam_beta2": other("optimizer.betas=[<two numbers>]"),
    "adam_epsilon": same("optimizer.eps=<number>"),
    "weight_decay": same("optimizer.weight_decay=<number>"),
    "gradient_clip_val": _NORM,
    "max_grad_norm": _NORM,
    "gradient_clip_algorithm": other("optimizer.max_grad_norm=<norm>", "the norm is clipped"),
    "lr_scheduler_type": same("optimizer.schedule=<cosine|linear|constant>"),
    "lr_scheduler_kwargs": other("optimizer.warmup=<steps, or a share below 1>"),
    "warmup_steps": _WARMUP,
    "warmup_ratio": _WARMUP,
    # the length of the training
    "steps": same("trainer.max_steps=<steps>"),
    "max_steps": same("trainer.max_steps=<steps>"),
    "epochs": _PASSES,
    "n_epochs": _PASSES,
    "num_epochs": _PASSES,
    "num_train_epochs": _PASSES,
    "max_epochs": _PASSES,
    "early_stopping_patience": same(
        "checkpoint.monitor=eval/loss checkpoint.patience=<evaluations>"
    ),
    "early_stopping_threshold": same("checkpoint.min_delta=<of the metric>"),
    "seed_everything": same("seed=<number>"),
    "template": same("data.chat_template=<file>", "null is the tokenizer's own"),
    "min_epochs": none("a run ends where trainer.max_steps or trainer.max_epochs says"),
    "min_steps": none("a run ends where trainer.max_steps or trainer.max_epochs says"),
    "limit_train_batches": PARTS,
    "overfit_batches": other("debug=overfit", "or data.overfit_groups=<groups>"),
    "fast_dev_run": other("debug=fast", "three steps, no answers, and nothing logged elsewhere"),
    "barebones": other("logger=none evaluation.samples=0 checkpoint.every_n_steps=null"),
    # evaluation
    "eval_steps": same("evaluation.every_n_steps=<steps>"),
    "val_check_interval": same("evaluation.every_n_steps=<steps>"),
    "eval_every": other("evaluation.every_n_steps=<steps>", "in steps, not in examples"),
    "check_val_every_n_epoch": other(
        "evaluation.every_n_steps=<steps>",
        "null evaluates ten times a run",
        **{"1": "evaluation.every_n_steps=<steps of a pass>"},
    ),
    "eval_strategy": EVALUATIONS,
    "eval_on_start": same("evaluation.on_start=<true|false>"),
    "do_first_eval": same("evaluation.on_start=<true|false>"),
    "limit_val_batches": _EVAL_PARTS,
    "limit_test_batches": _EVAL_PARTS,
    "limit_predict_batches": none("evaluation.samples=<answers> says how many are drawn"),
    "do_eval": none("data.eval_fraction=0 holds no rows out"),
    "do_predict": _ANSWERS,
    "generate_during_eval": _ANSWERS,
    "sample_during_eval": _ANSWERS,
    "n_eval_model_samples": _ANSWERS,
    "compute_metrics": other("plugins=[<module>] trainer.callbacks=[<names>]"),
    "metric_for_best_model": other("checkpoint.monitor=<metric>", "such as eval/loss"),
    "greater_is_better": none("the better direction of every metric is known"),
    "load_best_model_at_end": other(
        "checkpoint.export=<last|best>",
        "with checkpoint.monitor=<metric>",
        true="checkpoint.export=best",
        false="checkpoint.export=last",
    ),
    # answers to train on, of online trainers
    "num_generations": same("rounds.num_generations=<answers>", "with rounds.count=<rounds>"),
    "reward_model_path": same("evaluation.judge=<folder or hub id>", "with rounds.count=<rounds>"),
    "reward_funcs": other(
        "plugins=[<module>] evaluation.judge=<module>.<function>", "with rounds.count=<rounds>"
    ),
    "missing_eos_penalty": none("a judge that is a function of yours may take it off"),
    # checkpoints and folders
    "save_steps": same("checkpoint.every_n_steps=<steps>"),
    "save_total_limit": same("checkpoint.keep=<number>"),
    "save_strategy": other(
        "checkpoint.every_n_steps=<steps>", no="checkpoint.every_n_steps=null checkpoint.last=false"
    ),
    "save_only_model": none("a checkpoint is for resuming; the weights alone are in model/"),
    "enable_jit_checkpoint": none("SIGTERM saves a checkpoint, always"),
    "enable_checkpointing": other(
        "checkpoint.every_n_steps=<steps>",
        false="checkpoint.every_n_steps=null checkpoint.last=false",
    ),
    "ignore_data_skip": none("a resumed run continues with the rows that were to come"),
    "resume_from_checkpoint": _RESUME,
    "ckpt_path": _RESUME,
    "output_dir": _RUN_DIR,
    "default_root_dir": _RUN_DIR,
    "local_run_dir": _RUN_DIR,
    "local_dirs": _RUN_DIR,
    "logging_dir": _RUN_DIR,
    "overwrite_output_dir": same("overwrite=<true|false>"),
    "exp_name": same("name=<name>"),
    "run_name": same("name=<name>"),
    "hub_token": LOGIN,
    # what is shown
    "report_to": other(
        "logger=<wandb|tensorboard|mlflow|csv|none>",
        wandb="logger=wandb",
        tensorboard="logger=tensorboard",
        mlflow="logger=mlflow",
        none="logger=none",
    ),
    "wandb_project": same("logger.project=<name>"),
    "wandb_entity": same("logger.entity=<name>"),
    "wandb_name": same("name=<name>"),
    "wandb_tags": same("logger.tags=[<tags>]"),
    "project": same("logger.project=<name>"),
    "enabled": other("logger=<wandb|none>", true="logger=wandb", false="logger=none"),
    "trackio_space_id": other("logger=<wandb|tensorboard|mlflow|csv|none>"),
    "trackio_bucket_id": other("logger=<wandb|tensorboard|mlflow|csv|none>"),
    "trackio_static_space_id": other("logger=<wandb|tensorboard|mlflow|csv|none>"),
    "logging_steps": same("trainer.log_every_n_steps=<steps>"),
    "logging_strategy": other("trainer.log_every_n_steps=<steps>"),
    "minimum_log_interval_secs": other("trainer.log_every_n_steps=<steps>"),
    "logging_first_step": none("step 1 is always logged"),
    "logging_nan_inf_filter": none("what is not finite stops the run; trainer.max_skipped_steps"),
    "include_num_input_tokens_seen": none("result.json has throughput.tokens_per_second"),
    "skip_memory_metrics": none("result.json has the peak memory of every run"),
    "disable_tqdm": other(
        "trainer.enable_progress_bar=<true|false>",
        true="trainer.enable_progress_bar=false",
        false="trainer.enable_progress_bar=true",
    ),
    "enable_model_summary": none("the header has the parameters and the memory"),
    "log_level": _LOG_LEVEL,
    "log_level_replica": _LOG_LEVEL,
    "log_on_each_node": _LOG_LEVEL,
    # devices
    "gpus": same("trainer.devices=<count>"),
    "num_gpus": same("trainer.devices=<count>"),
    "use_cpu": other("trainer.accelerator=cpu", false="trainer.accelerator=auto"),
    "no_cuda": other("trainer.accelerator=cpu", false="trainer.accelerator=auto"),
    "fp16": other("trainer.precision=16-mixed", true="trainer.precision=16-mixed", false=_FULL),
    "bf16": other("trainer.precision=bf16-mixed", true="trainer.precision=bf16-mixed", false=_FULL),
    "fp16_full_eval": _HALF,
    "bf16_full_eval": _HALF,
    "tf32": none("float32 is computed in float32; trainer.precision=bf16-mixed is the fast one"),
    "fsdp": _SHARDS,
    "fsdp_config": _SHARDS,
    "deepspeed": other("strategy=fsdp", "which shares weights out as its stage 3 does"),
    "accelerator_config": other("strategy=<auto|ddp|fsdp>"),
    "parallelism_config": other("strategy=<auto|ddp|fsdp>"),
    "ddp_find_unused_parameters": _UNUSED,
    "ddp_timeout": other("strategy.timeout_minutes=<minutes>", "in minutes, not in seconds"),
    "ddp_backend": none("nccl on GPUs, gloo on CPUs"),
    "local_rank": none("trainer.devices=<count> starts the ranks; torchrun is understood too"),
    "full_determinism": same("trainer.deterministic=<true|false>"),
    "sync_batchnorm": none("language models have no batch norm"),
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
        HUB,
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
    **RECIPE_KEYS,
    # a key of Lightning's whose last part means something else here
    "trainer.plugins": none("plugins=[<module>] loads your modules; Lightning's are unsupported"),
    "trainer.logger": other("logger=<wandb|tensorboard|mlflow|csv|none>", false="logger=none"),
    "trainer.strategy": same("strategy=<auto|ddp|fsdp>"),
}
"""Answers by key; an entry with a dot is for that key alone, others for each key that ends so."""
