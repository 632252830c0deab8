"""Keys of recipes, LLaMA-Factory's and alignment-handbook's, and the settings that do it here.

Only those that are not TRL's or transformers' as well.
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

_MIXTURE = other("data.train=<a list of {path: <file>, weight: <share>}>", "in one list")
_CACHED = none("token ids are cached by the content of rows and tokenizer; nothing to clear")
_SCORED = none("responses alone are scored, up to their end")
_NO_VARIANT = none("this variant of LoRA is unsupported; peft.rslora and peft.dora are the others")

_LLAMA_FACTORY: dict[str, Answer] = {
    "dpo_label_smoothing": same("loss.label_smoothing=<share>"),
    "pref_bco_weight": other(
        "loss.terms={sigmoid: 1, bco_pair: <weight>}", "there the sum is divided by 1 + weight"
    ),
    "ref_model_adapters": same("reference.adapter=<folder or hub id>"),
    "ref_model_quantization_bit": none("with peft=qlora the reference shares the 4-bit weights"),
    "lora_target": Answer(
        "peft=lora peft.target_modules=[<names>]", carries=True, values={"all": "peft=lora"}
    ),
    "loraplus_lr_ratio": _NO_VARIANT,
    "loraplus_lr_embedding": _NO_VARIANT,
    "pissa_init": _NO_VARIANT,
    "additional_target": FROZEN,
    "quantization_method": IN_4_BITS,
    "quantization_type": other("peft=qlora", "the type is nf4"),
    "double_quantization": other("peft=qlora", "the scales are not quantized again"),
    "pure_bf16": other(
        "model.dtype=<float32|bfloat16>",
        true="model.dtype=bfloat16",
        false="model.dtype=float32",
    ),
    "flash_attn": ATTENTION,
    "enable_liger_kernel": HEAD,
    "disable_gradient_checkpointing": other(
        "model.gradient_checkpointing=<true|false>",
        true="model.gradient_checkpointing=false",
        false="model.gradient_checkpointing=null",
    ),
    "enable_thinking": other("data.chat_template_kwargs={enable_thinking: <true|false>}"),
    "dataset_dir": none("data.train=<file> names the file itself"),
    "max_samples": PARTS,
    "val_size": same("data.eval_fraction=<share>", "a share, never a number of rows"),
    "mix_strategy": _MIXTURE,
    "interleave_probs": _MIXTURE,
    "preprocessing_num_workers": ONE_READER,
    "preprocessing_batch_size": ONE_READER,
    "overwrite_cache": _CACHED,
    "tokenized_path": _CACHED,
    "train_on_prompt": _SCORED,
    "mask_history": _SCORED,
    "disable_shuffling": ROW_ORDER,
    "early_stopping_steps": other(
        "checkpoint.monitor=eval/loss checkpoint.patience=<evaluations>",
        "in evaluations, not in steps",
    ),
    "plot_loss": none("metrics.jsonl has the curves, and loggers draw them"),
    "infer_backend": other(
        "generation.backend=<hf|vllm>",
        huggingface="generation.backend=hf",
        vllm="generation.backend=vllm",
    ),
    "hf_hub_token": LOGIN,
}

_HANDBOOK: dict[str, Answer] = {
    "dataset_mixer": _MIXTURE,
    "dataset_mixture": _MIXTURE,
    "dataset_splits": other("data.train_split=<name> data.eval_split=<name>"),
    "dataset_configs": other("data.subset=<name>", "one, for all sources"),
    "test_split_size": same("data.eval_fraction=<share>", "a share, never a number of rows"),
    "evaluation_strategy": EVALUATIONS,
    "truncation_side": other(
        "data.truncation=<drop|prompt|response>",
        left="data.truncation=prompt",
        right="data.truncation=response",
    ),
    "hub_model_revision": HUB,
    "push_to_hub_revision": HUB,
    "use_flash_attention_2": ATTENTION,
}

RECIPE_KEYS: dict[str, Answer] = {**_LLAMA_FACTORY, **_HANDBOOK}
"""Answers by key."""
