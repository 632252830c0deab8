"""Whole training steps on ``meta``: every branch that a GPU takes, and nothing computed."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.packing import collate_groups
from dpo_lightning.memory.hardware import PrecisionName
from dpo_lightning.models import scoring
from dpo_lightning.models.config_numbers import without_dropout
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.objectives.betas import BetaPlan
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.reference.kinds import LiveReference
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.optimizers import OptimizerSettings
from dpo_lightning.training.precision import Computation, make_computation
from dpo_lightning.training.step_settings import StepSettings
from tests.support.autocast import EmulatedAutocast, cuda_autocast, heeded_by_models
from tests.support.flash import strict_varlen_attn
from tests.support.groups import group
from tests.support.watch import Watch

META = torch.device("meta")
LAYERS, STEPS = 2, 2
PASSES = 2 * 2 * STEPS
"""Of policy and reference, in two micro-batches of each step."""

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, **_BOTH_KINDS}),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **{"head_dim": 16, "per_layer_config": {1: {"head_dim": 512}}, **_BOTH_KINDS},
            "hidden_size_per_layer_input": 0,
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "phi3": ("Phi3Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 16, **_EXPERTS}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16},
            **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
            **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        },
    ),
}
"""Two layers of each; Gemma 4 has heads of 16 and of 512 entries, DeepSeek values of another size
than keys."""

KERNEL_LAYERS = {name: LAYERS for name in ARCHITECTURES} | {"gemma4": 1, "deepseek_v3": 0}
"""Layers that the kernel takes in half precision."""


# Rounding by chance is another kernel on a GPU alone: tests of rounded_step have it.
_OPTIMIZER = OptimizerSettings(
    lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, stochastic_rounding=False
)


@dataclass(frozen=True)
class Setting:
    """A precision, as a run has it.

    Attributes:
        precision: ``trainer.precision``.
        ranks: Processes of a run with whole models on each; two compute under autocast.
        half_weights: True for weights that are held in bfloat16.
    """

    precision: str
    ranks: int = 1
    half_weights: bool = False


PRECISIONS = {
    "32-true": Setting("32-true"),
    "bf16-mixed": Setting("bf16-mixed"),
    "bf16-mixed, ranks": Setting("bf16-mixed", ranks=2),
    "bf16-true": Setting("bf16-mixed", half_weights=True),
    **({"16-mixed": Setting("16-mixed")} if "16-mixed" in get_args(PrecisionName) else {}),
}


class MetaAccelerator(Accelerator):
    """Lightning's idea of a device, for one that has no memory."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [META] * devices

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "meta"


@dataclass
class MetaStep:
    """A step as it went.

    Attributes:
        kernel_calls: Types of queries and windows of the kernel's calls.
        bucket_calls: Types of queries of torch's own attention.
        events: What the host waited for inside the step.
        module: The trained module.
        scorer: Its scorer.
        gradients: Type of the gradient of each trained weight, by name.
    """

    kernel_calls: Counter[tuple[torch.dtype, tuple[int, int]]] = field(default_factory=Counter)
    bucket_calls: Counter[torch.dtype] = field(default_factory=Counter)
    copies: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    module: Any = None
    scorer: Any = None
    computation: Any = None
    gradients: list[torch.dtype | None] = field(default_factory=list)


def config_of(architecture: str) -> Any:
    """A tiny config; None where the installed transformers has no such family."""
    name, values = ARCHITECTURES[architecture]
    kind = getattr(transformers, name, None)
    return None if kind is None else without_dropout(kind(**(_COMMON | values)))


def meta_model_of(architecture: str, dtype: torch.dtype) -> Any:
    config = config_of(architecture)
    with META:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


class _OnMeta(SingleDeviceStrategy):
    """Lightning's strategy, which would bring the values of the model back in the end."""

    def teardown(self) -> None: ...


class _Watched(pl.Callback):
    """Keeps what was seen of the second step: what is made once is made in the first."""

    def __init__(self, step: MetaStep, watch: Watch) -> None:
        self._step = step
        self._watch = watch

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self._step.gradients = [None if p.grad is None else p.grad.dtype for p in module._trained]

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self._watch.events.clear()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        if index != 1:
            return
        self._step.copies, self._step.answers = self._watch.copies, self._watch.answers


_REAL_GROUPED_MM = torch.nn.functional.grouped_mm


def _grouped_mm(rows: Any, experts: Any, **options: Any) -> Any:
    """Products of experts, which torch has on ``meta`` for bfloat16 alone: shapes of the others."""
    if rows.dtype == experts.dtype == torch.bfloat16:
        return _REAL_GROUPED_MM(rows, experts, **options)
    assert rows.dtype == experts.dtype
    with torch.autocast("cuda", enabled=False):  # which does not know them
        return rows @ experts.sum(0)


@contextlib.contextmanager
def _on_cuda(step: MetaStep) -> Iterator[None]:
    """The kernel's stand-in, autocast on ``meta``, and counts of attention's calls."""

    def kernel(query: Any, *args: Any, **options: Any) -> Any:
        step.kernel_calls[query.dtype, options["window_size"]] += 1
        return strict_varlen_attn(query, *args, **options)

    sdpa = torch.nn.functional.scaled_dot_product_attention

    def plain(query: Any, key: Any, value: Any, **options: Any) -> Any:
        step.bucket_calls[query.dtype] += 1
        return sdpa(query, key, value, **options)

    functional = torch.nn.functional
    with (
        mock.patch.object(varlen, "varlen_attn", kernel),
        mock.patch.object(functional, "scaled_dot_product_attention", plain),
        mock.patch.object(functional, "grouped_mm", _grouped_mm),
        # It computes on a device that there is none of.
        mock.patch.object(scoring, "varlen_fault", return_value=None),
        heeded_by_models(),
        EmulatedAutocast(),
    ):
        yield


def _compute(setting: Setting) -> tuple[Computation, Precision]:
    """Decisions of a run, and its plugin, whose autocast reaches tensors on ``meta``."""
    strategy = SimpleNamespace(precision_plugin=Precision(), root_device=META)
    trainer: Any = SimpleNamespace(world_size=setting.ranks, strategy=strategy)
    computation = make_computation(
        setting.precision,  # type: ignore[arg-type]
        trainer,
        sharded=False,
        half_weights=setting.half_weights,
        adapters=False,
    )
    plugin = strategy.precision_plugin
    if computation.autocast:
        half = computation.dtype(torch.float32)
        plugin.forward_context = lambda: cuda_autocast(half)
    return computation, plugin


def _scorer_of(model: Any, path: Any, computation: Computation, dtype: torch.dtype) -> Scorer:
    """A scorer that has seen the heads of a model, and chosen its kernel by them."""
    scorer = Scorer(path)
    scorer.prepare(model)
    batch = collate_groups([group(3, 2, 2)], [0]).to(META)
    plan = scorer.plan(batch)
    if plan is not None:
        with torch.no_grad():
            scorer.token_logps(model, batch, plan)
        scorer = Scorer(path, heads=plan.heads)
        scorer.choose_kernel(META, computation.dtype(dtype))
    return scorer


def take_meta_steps(
    folder: Any,
    architecture: str,
    setting: Setting,
    *,
    path: str = "flat",
    checkpointing: bool = False,
    loss: dict[str, Any] | None = None,
) -> MetaStep:
    """Two steps of policy and live reference, two micro-batches each; the second is watched.

    Args:
        folder: For whatever Lightning writes.
        architecture: One of ``ARCHITECTURES``.
        setting: One of ``PRECISIONS``.
        path: Of the scorer.
        checkpointing: True computes activations anew.
        loss: Arguments of the objective.
    """
    step = MetaStep()
    computation, plugin = _compute(setting)
    dtype = torch.bfloat16 if setting.half_weights else torch.float32
    with _on_cuda(step):
        policy, frozen = (meta_model_of(architecture, dtype) for _ in range(2))
        scorer = _scorer_of(policy, path, computation, dtype)
        scorer.prepare(frozen)
        step.kernel_calls.clear()
        step.bucket_calls.clear()
        if checkpointing:
            policy.activation_checkpointing_enable({"use_reentrant": False})
        module = DPOModule(
            policy=computation.cast(policy),
            reference=LiveReference(computation.cast(frozen.requires_grad_(False)), scorer),
            scorer=scorer,
            objective=ObjectiveSettings(**({"terms": {"sigmoid": 1.0}} | (loss or {}))),
            beta_plan=BetaPlan(start=0.1, total_steps=STEPS),
            optimizer=_OPTIMIZER,
            steps=StepSettings(
                total_steps=STEPS + 1,  # else the second would be the last, which is logged
                warmup_steps=0,
                schedule="constant",
                log_every_n_steps=100,
                max_grad_norm=1.0,
            ),
            starts_from_reference=False,
            compute_dtype=computation.master_dtype,
        )
        _fit(folder, module, plugin, step)
    step.module, step.scorer, step.computation = module, scorer, computation
    return step


def _fit(folder: Any, module: DPOModule, plugin: Precision, step: MetaStep) -> None:
    data = PreferenceDataModule(
        train_groups=[group(12, 5, 9), group(3, 1, 4, 6)],
        eval_groups=[],
        batch_size=2,
        micro_batch_tokens=20,
        total_steps=STEPS,
        seed=0,
        shared=module.scorer.shared,
        gathers=module.scorer.gathers,
        num_workers=0,
    )
    watch = Watch()
    trainer = pl.Trainer(
        accelerator=MetaAccelerator(),
        strategy=_OnMeta(device=META),
        devices=1,
        plugins=[plugin],
        max_steps=STEPS,
        max_epochs=-1,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        logger=False,
        callbacks=[_Watched(step, watch)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
        default_root_dir=folder,
    )
    with watch:  # it also answers what Lightning asks before and behind the steps
        trainer.fit(module, datamodule=data)
