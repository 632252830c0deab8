"""Values that other programs have for settings of the same name, and the settings that do it here.

Above all the names of losses. They are abbreviations, one letter apart from each other, so that a
near miss may be a method of its own: only this table says what another name means.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from dpo_lightning.settings.foreign_answers import Answer

# The loss of the DPO paper, by its name there and in the paper's own repository.
_SAME_LOSS = {"dpo": "sigmoid"}

_SMOOTHED = "loss=sigmoid loss.label_smoothing=<share of wrong labels>"
_ROUNDS = "loss=sigmoid rounds.count=<rounds>"
_REWARDS = "rewards are not optimised by themselves; rounds.count=<rounds> makes pairs of them"

_LOSSES: dict[str, Answer] = {
    "vanilla": Answer("loss=sigmoid"),
    "logsigmoid": Answer("loss=sigmoid"),
    "bt": Answer("loss=sigmoid"),
    "bradley_terry": Answer("loss=sigmoid"),
    "cdpo": Answer(_SMOOTHED),
    "conservative": Answer(_SMOOTHED),
    "conservative_dpo": Answer(_SMOOTHED),
    "rdpo": Answer("loss=robust", "for noisy labels; DPO with a penalty on length is unsupported"),
    "r_dpo": Answer("loss=robust", "for noisy labels; DPO with a penalty on length is unsupported"),
    "robust_dpo": Answer("loss=robust"),
    "dpo_robust": Answer("loss=robust"),
    "dpop": Answer(
        "loss=sigmoid loss.rpo_alpha=<weight>", "DPO-Positive is unsupported; this is similar"
    ),
    "dpo_positive": Answer(
        "loss=sigmoid loss.rpo_alpha=<weight>", "DPO-Positive is unsupported; this is similar"
    ),
    "rpo": Answer("loss=sigmoid loss.rpo_alpha=<weight>"),
    "dpo_nll": Answer("loss=sigmoid loss.rpo_alpha=<weight>"),
    "ld_dpo": Answer("loss=sigmoid loss.ld_alpha=<share>"),
    "ln_dpo": Answer("loss=sigmoid_norm"),
    "dpo_norm": Answer("loss=sigmoid_norm"),
    "wpo": Answer("loss=sigmoid loss.wpo=true"),
    "f_dpo": Answer("loss=sigmoid loss.f_divergence=<name>"),
    "fdpo": Answer("loss=sigmoid loss.f_divergence=<name>"),
    "beta_dpo": Answer("loss=sigmoid loss.adaptive_beta=<strength>"),
    "kto_unpaired": Answer("loss=kto"),
    "bco_unpaired": Answer("loss=bco"),
    "tr_dpo": Answer("loss=sigmoid reference.sync_every=<steps>"),
    "tr_ipo": Answer("loss=ipo reference.sync_every=<steps>"),
    "nca": Answer("loss=nca_pair"),
    "exo": Answer("loss=exo_pair"),
    "sppo": Answer("loss=sppo_hard"),
    "apo": Answer("loss=apo_zero", "or apo_down, for chosen answers worse than the model's own"),
    "aot_pair": Answer("loss=aot"),
    "slic_hf": Answer("loss=slic"),
    "rso": Answer("loss=hinge"),
    "nll": Answer("loss=sft"),
    "chosen_nll": Answer("loss=sft"),
    "pl": Answer("loss=plackett_luce"),
    "listwise": Answer("loss=plackett_luce", "or softmax"),
    "pro": Answer("loss=plackett_luce", "PRO is unsupported; this is similar"),
    "infonca": Answer("loss=softmax", "InfoNCA is unsupported; this is similar"),
    "reward": Answer(why="reward models are not trained here; evaluation.judge= takes one"),
    **dict.fromkeys(("online_dpo", "online"), Answer(_ROUNDS, "with rounds.steps=1")),
    **dict.fromkeys(("iterative_dpo", "iterative"), Answer(_ROUNDS)),
    **dict.fromkeys(("ppo", "grpo"), Answer(why=_REWARDS)),
}

_PRECISIONS = {
    **dict.fromkeys(("32", "fp32", "float32"), Answer("trainer.precision=32-true")),
    **dict.fromkeys(("16", "fp16", "float16"), Answer("trainer.precision=16-mixed")),
    **dict.fromkeys(("bf16", "bfloat16"), Answer("trainer.precision=bf16-mixed")),
    "16_true": Answer("trainer.precision=16-mixed", "weights are not held in float16"),
}
_TYPES = {
    **dict.fromkeys(("bf16", "torch.bfloat16"), Answer("model.dtype=bfloat16")),
    **dict.fromkeys(("fp32", "torch.float32"), Answer("model.dtype=float32")),
    **dict.fromkeys(
        ("fp16", "float16", "half"), Answer("model.dtype=bfloat16", "float16 is unsupported")
    ),
}
_ADAMW = Answer("optimizer=adamw")
_ADAMW_8BIT = Answer("optimizer=adamw_8bit")
_NO_OPTIMIZER = Answer(
    why="it is unsupported; optimizer=adamw is the usual one, and a plugin may register others"
)
_NO_LOGGER = Answer("logger=csv", "metrics.jsonl is always written; this adds a table")
_SHARDS = Answer("strategy=fsdp", "which shares weights out as DeepSpeed's stage 3 does")
_ALL_STEPS = Answer("trainer.max_steps=null")

VALUES: dict[str, dict[str, Answer]] = {
    "loss": _LOSSES,
    "optimizer": {
        **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), _ADAMW),
        **dict.fromkeys(("adamw_bnb_8bit", "paged_adamw_8bit", "adamw8bit"), _ADAMW_8BIT),
        **dict.fromkeys(("rmsprop", "sgd", "adafactor", "lion", "muon", "adagrad"), _NO_OPTIMIZER),
    },
    "optimizer.schedule": {
        "constant_with_warmup": Answer("optimizer.schedule=constant", "with optimizer.warmup="),
        "cosine_with_restarts": Answer("optimizer.schedule=cosine", "without restarts"),
        "cosine_with_min_lr": Answer("optimizer.schedule=cosine", "down to 0"),
    },
    "strategy": {
        **dict.fromkeys(("deepspeed", "deepspeed_stage_3", "deepspeed_stage_2"), _SHARDS),
        "fsdp2": Answer("strategy=fsdp"),
        **dict.fromkeys(("ddp_spawn", "ddp_fork", "ddp_notebook"), Answer("strategy=ddp")),
        "ddp_find_unused_parameters_true": Answer(
            "strategy=ddp strategy.find_unused_parameters=true"
        ),
        "dp": Answer("strategy=ddp"),
    },
    # The trainers of DPO's first repository.
    "trainer": {
        "fsdptrainer": Answer("strategy=fsdp"),
        "tensorparalleltrainer": Answer("strategy=fsdp", "tensor parallelism is unsupported"),
        "basictrainer": Answer("trainer.devices=1"),
    },
    "model": {
        "pythia28": Answer("model.pretrained=EleutherAI/pythia-2.8b"),
        "pythia69": Answer("model.pretrained=EleutherAI/pythia-6.9b"),
        "gpt2_large": Answer("model.pretrained=openai-community/gpt2-large"),
        "gpt2_xl": Answer("model.pretrained=openai-community/gpt2-xl"),
        "gptj": Answer("model.pretrained=EleutherAI/gpt-j-6b"),
        "llama7b": Answer("model.pretrained=huggyllama/llama-7b"),
        "blank_model": Answer("model.pretrained=<folder or hub id>"),
    },
    "logger": dict.fromkeys(
        ("comet_ml", "neptune", "trackio", "clearml", "swanlab"),
        _NO_LOGGER,
    ),
    "peft": {"dora": Answer("peft=lora peft.dora=true"), "adalora": Answer("peft=lora")},
    "trainer.precision": _PRECISIONS,
    "trainer.max_steps": {"_1": _ALL_STEPS},
    "trainer.max_epochs": {"_1": Answer("trainer.max_epochs=null")},
    "trainer.devices": {"_1": Answer("trainer.devices=auto")},
    "model.dtype": _TYPES,
    "data.truncation": {
        "left": Answer("data.truncation=prompt"),
        "right": Answer("data.truncation=response"),
        "keep_end": Answer("data.truncation=prompt"),
        "keep_start": Answer("data.truncation=response"),
    },
}
"""Answers by setting or group, and in it by value as :func:`plain` writes it."""


def plain(value: object) -> str:
    """The value in small letters, with one underscore for whatever stands between words."""
    return re.sub(r"[-\s]+", "_", str(value)).lower()


def answer_to_value(key: str, value: object) -> Answer | None:
    """The answer to a value of a setting or a group; None where nothing is known of it."""
    return VALUES.get(key, {}).get(plain(value))


def renamed_loss(name: str, known: Collection[str]) -> str | None:
    """The loss that goes by another spelling elsewhere; None where it is ours or none of ours.

    Example:
        >>> [renamed_loss(name, ["sigmoid", "ipo"]) for name in ("DPO", "IPO", "ipo", "odpo")]
        ['sigmoid', 'ipo', None, None]
    """
    if name in known:
        return None
    found = _SAME_LOSS.get(plain(name), plain(name))
    if found in known:
        return found
    by_letters = {other.replace("_", ""): other for other in known}
    return by_letters.get(found.replace("_", ""))


def near_miss(name: str, known: Collection[str]) -> str | None:
    """The loss of which the name is a typing error; None where it may be another method's name.

    Example:
        >>> [near_miss(name, ["sigmoid", "odpo"]) for name in ("sigmod", "dpo", "tdpo")]
        ['sigmoid', None, None]
    """
    typed = plain(name)
    words = []
    for other in known:
        head = other.partition("_")[0]
        # An acronym has to be right; it is words that are mistyped.
        if len(head) > 5 or typed.startswith(f"{head}_"):
            words.append(other)
    close = difflib.get_close_matches(typed, words, n=1, cutoff=0.8)
    return close[0] if close else None
