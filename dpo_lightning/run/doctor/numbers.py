"""Checks of what is computed on this device, against float32 on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_lightning.data.packing import collate_groups
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.models.head import LogitsTransform, token_logps
from dpo_lightning.models.kernel import HeadShape
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.run.doctor.checks import Finding
from dpo_lightning.training.optimizers import OptimizerSettings, make_optimizer

# Largest relative difference that rounding explains, by the type that is computed in: of
# log-probabilities, of gradients, of weights after a step.
_LIMITS = {torch.float32: (1e-3, 1e-2, 1e-5), torch.bfloat16: (5e-2, 1e-1, 1e-2)}
_VOCABULARY = 512


@dataclass(frozen=True, slots=True)
class Bench:
    """A device and the type that a run would compute in on it.

    Attributes:
        device: The device.
        dtype: float32, or bfloat16 under autocast.
    """

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of_this_machine(cls) -> Bench:
        """The first GPU in the type that it computes by itself, or the CPU in float32."""
        if not torch.cuda.is_available():
            return cls(torch.device("cpu"), torch.float32)
        half = torch.cuda.get_device_capability(0) >= (8, 0)
        return cls(torch.device("cuda", 0), torch.bfloat16 if half else torch.float32)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The context of a step."""
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            yield

    @property
    def name(self) -> str:
        """Device and type, for a reader."""
        return f"{self.device.type} in {str(self.dtype).removeprefix('torch.')}"


def check_attention(bench: Bench) -> Finding:
    """Log-probabilities and gradients of a small model, prompts shared, against plain passes."""
    config, groups = _small_config(), _groups()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _make_model(config)
    expected = _scored(model, Scorer("padded"), groups, Bench(torch.device("cpu"), torch.float32))
    size = config.hidden_size // config.num_attention_heads
    heads = HeadShape(config.num_attention_heads, config.num_key_value_heads, size, size)
    scorer = Scorer("flat", heads={heads: config.num_hidden_layers})
    fault = scorer.choose_kernel(bench.device, bench.dtype)
    actual = _scored(model, scorer, groups, bench)
    most = _LIMITS[bench.dtype]
    pairs = zip(("log-probabilities", "gradients"), expected, actual, most[:2], strict=True)
    differences = []
    for name, one, other, limit in pairs:
        apart = _apart(other, one)
        if not apart <= limit:
            return "failed", (
                f"{bench.name}, {scorer.kernel}: {name} differ by {apart:.2g} from float32 (limit "
                f"{limit}): results of this device are wrong; update its driver and torch"
            )
        differences.append(f"{name} within {apart:.1g}")
    said = f"{bench.name}, {scorer.kernel}: {', '.join(differences)} of float32"
    if fault is not None:
        return "warning", f"{said}; the kernel for any lengths is not used: {fault}"
    return "ok", said


def check_head(bench: Bench) -> Finding:
    """Log-probabilities behind the head, against a plain log-softmax in float32."""
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(96, 128, generator=draw).to(bench.dtype)
    weight = (torch.randn(4096, 128, generator=draw) / 8).to(bench.dtype)
    targets = torch.randint(4096, (96,), generator=draw)
    logits = states.float() @ weight.float().T
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    states, weight, targets = (tensor.to(bench.device) for tensor in (states, weight, targets))
    actual = token_logps(states, weight, None, targets, LogitsTransform())
    return _judged(bench, "the head", _apart(actual, expected), _LIMITS[bench.dtype][0])


def check_optimizer(bench: Bench) -> Finding:
    """A step of the optimizer, against AdamW written out in float64.

    From zero moments the corrected ones are g and g², so the step is lr · g / (|g| + eps), and the
    weight decays by lr times the decay before it.
    """
    lr, eps, decay = 0.1, 1e-8, 0.01
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(64, 64, generator=draw).to(bench.dtype)
    gradient = torch.randn(64, 64, generator=draw).to(bench.dtype)
    weight = torch.nn.Parameter(start.to(bench.device, copy=True))
    weight.grad = gradient.to(bench.device)
    settings = OptimizerSettings(lr=lr, betas=(0.9, 0.999), eps=eps, weight_decay=decay)
    make_optimizer([weight], settings).step()
    g = gradient.double()
    expected = start.double() * (1 - lr * decay) - lr * g / (g.abs() + eps)
    return _judged(bench, "a step", _apart(weight.detach(), expected), _LIMITS[bench.dtype][2])


def _judged(bench: Bench, what: str, apart: float, limit: float) -> Finding:
    """A difference against its limit."""
    if not apart <= limit:
        return "failed", (
            f"{bench.name}: {what} differs by {apart:.2g} from float32 (limit {limit}): results of "
            "this device are wrong; update its driver and torch"
        )
    return "ok", f"{bench.name}: {what} is within {apart:.1g} of float32"


def _apart(actual: Tensor, expected: Tensor) -> float:
    """Relative difference of two tensors, in float64; NaN where one is not finite."""
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return float((actual - expected).norm() / expected.norm())


def _scored(
    model: Any, scorer: Scorer, groups: list[TokenGroup], bench: Bench
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all responses, and the gradient of a weighted sum of them."""
    model.to(bench.device).zero_grad()
    scorer.prepare(model)
    batch = collate_groups(groups, range(len(groups))).to(bench.device)
    try:
        with bench.autocast():
            logps = scorer.logps(model, batch)
        weights = torch.linspace(-1, 1, len(logps), device=bench.device)
        (logps * weights).sum().backward()
    finally:
        scorer.release(model)
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])
    return logps.detach().float().cpu(), gradient


def _small_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        # Large enough that a wrong mask shows in the scores.
        initializer_range=0.1,
    )


def _make_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _groups() -> list[TokenGroup]:
    """Groups of several shapes: one token, many, pairs and four responses."""
    draw = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return draw.integers(3, _VOCABULARY, length).astype(np.int32)

    shapes = ((70, 9, 33), (5, 1, 2, 17, 80), (1, 4, 4), (33, 64, 1))
    return [
        TokenGroup(
            *(ids(prompt), tuple(map(ids, lengths)), tuple(range(1, len(lengths) + 1)), 1.0),
            *(f"doctor:{number}", str(number)),
        )
        for number, (prompt, *lengths) in enumerate(shapes)
    ]
