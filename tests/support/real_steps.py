"""Steps of small models on a CPU, for comparing what they allocate with what was traced."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from dpo_lightning.data.packing import GroupBatch, collate_groups
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.memory.footprint import AdapterFacts, Training
from dpo_lightning.memory.lengths import GroupLengths
from dpo_lightning.memory.step_memory import StepMemory
from dpo_lightning.models.adapters import Adapters, LoraSettings
from dpo_lightning.models.config_numbers import without_dropout
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.training.traced import traced_optimizer

_LLAMA: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
_MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", _LLAMA | {"head_dim": 24}),
    "gemma3": (
        "Gemma3TextConfig",
        _LLAMA | {"head_dim": 16, "sliding_window": 32, "num_hidden_layers": 7},
    ),
    "mistral": ("MistralConfig", _LLAMA | {"sliding_window": 48}),
    "phi3": ("Phi3Config", _LLAMA),
    "olmo2": ("Olmo2Config", _LLAMA),
    "gpt2": ("GPT2Config", {"vocab_size": 600, "n_embd": 64, "n_layer": 5, "n_head": 4}),
    "gpt_neox": (
        "GPTNeoXConfig",
        {
            "vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 5,
            "num_attention_heads": 4, "intermediate_size": 160,
        },
    ),
    "moe": ("Qwen3MoeConfig", _LLAMA | _MOE),
    "mla": (
        "DeepseekV3Config",
        _LLAMA
        | {
            "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "n_routed_experts": 4,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1,
            "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
        },
    ),
}  # fmt: skip

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapters": AdapterFacts(8)},
    "checkpointing": {"checkpointing": True},
    "live reference": {"live_reference": True},
}

GROUP = (60, 20, 24)
TOKENS = 3 * sum(GROUP)


def training(**changes: Any) -> Training:
    """All weights in float32 on a CPU, but for the changes."""
    values: dict[str, Any] = {
        "kind": "cpu", "weight_bytes": 4, "compute_bytes": 4, "masters": False, "autocast": False,
        "optimizer": "adamw", "adapters": None, "live_reference": False, "shards": 1,
        "buckets": False, "whole_gradients": False, "tokens": TOKENS, "checkpointing": False,
    }  # fmt: skip
    return Training(**(values | changes))


def config_of(architecture: str) -> Any:
    name, values = ARCHITECTURES[architecture]
    return without_dropout(getattr(transformers, name)(**values))


def step_memory(config: Any, lengths: GroupLengths | None = None) -> StepMemory:
    return StepMemory(
        config, make_optimizer=traced_optimizer, lengths=lengths or GroupLengths(GROUP, (999, 1, 1))
    )


def batch(shapes: Sequence[Sequence[int]]) -> GroupBatch:
    draw = np.random.default_rng(0)
    groups = []
    for number, lengths in enumerate(shapes):
        ids = [draw.integers(3, 500, n).astype(np.int32) for n in lengths]
        ranks = tuple(range(1, len(ids)))
        groups.append(TokenGroup(ids[0], tuple(ids[1:]), ranks, 1.0, f"f:{number}", str(number)))
    return collate_groups(groups, range(len(groups)))


def allocated(config: Any, how: Training, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes that a process has at most, beside its code, in its second step of two micro-batches.

    The peak is that of the profiler's own records of what is allocated and freed, on top of the
    weights and the optimizer's states, which are there before.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if how.weight_bytes == 2 else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if how.adapters is not None:
        start = LoraSettings(
            r=how.adapters.rank, alpha=8, target_modules=None, rslora=False, dora=False,
            gaussian=False,
        )  # fmt: skip
        Adapters(model, start, reference=None, dropout=0.0, seed=0, load_base=lambda: model)
    reference = copy.deepcopy(model).requires_grad_(False).eval() if how.live_reference else None
    scorer = Scorer("flat")
    for prepared in (model, *([] if reference is None else [reference])):
        scorer.prepare(prepared)
    if how.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    micro_batches = [batch(shapes), batch(shapes)]

    def logps(micro: GroupBatch) -> torch.Tensor:
        plan = scorer.plan(micro)
        policy = scorer.logps(model, micro, plan)
        if reference is None:
            return policy
        with torch.no_grad():
            other = scorer.logps(reference, micro, plan)
        return policy - other

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.autocast):
            for micro in micro_batches:
                logps(micro).sum().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        optimizer.zero_grad()

    step()
    held = [*model.parameters(), *model.buffers()]
    if reference is not None:
        held += [*reference.parameters(), *reference.buffers()]
    held += [t for state in optimizer.state.values() for t in state.values()]
    fixed = sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values()
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return fixed + peak_of(profiler)


def peak_of(profiler: Any) -> int:
    """Most bytes at a time, of a profiler's records of memory, in the order of their time."""
    events = profiler.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, size in sorted(sizes, key=lambda pair: pair[0]):
        now += size
        peak = max(peak, now)
    return peak
