"""The ``generation`` section: who draws answers, as settings and as plain values. No torch.

A server's key is never a setting: the settings name the variable of the environment that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.plugins import OWN_SAMPLERS, SAMPLERS
from dpo_lightning.settings.addresses import is_http_address, key_problems
from dpo_lightning.settings.fields import setting

# Decided by what is asked.
_OF_A_REQUEST = (
    *("prompt", "model", "n", "stream", "max_tokens", "temperature", "top_p", "seed"),
    *("return_token_ids", "tokenizer", "enable_lora", "max_lora_rank"),
)
_OF_A_SERVER = ("model", "key_variable", "timeout", "concurrency")


@dataclass
class GenerationConfig:
    """Drawing of answers, for evaluation and for the command generate."""

    backend: str = setting(
        "hf",
        "Who draws answers: hf is transformers in this process; vllm an engine of vLLM, made of "
        "the same weights; an address a server of completions that has them loaded; or a plugin's "
        "sampler by name.",
        expected="hf, vllm, an address that begins with http:// or https://, or a plugin's name",
    )
    model: str | None = setting(None, "Name that the server of backend=<address> has the model by.")
    key_variable: str | None = setting(
        None,
        "Name of the environment variable that holds the server's key, which is read from there "
        "alone; null: none is sent.",
    )
    timeout: float = setting(
        600.0, "Longest time for one answer of a server.", unit="seconds", above=0
    )
    concurrency: int = setting(
        16, "Prompts that wait for a server's answer at once.", unit="prompts", least=1
    )
    options: dict[str, Any] = setting(
        {},
        "Further arguments: of vLLM's engine, such as {tensor_parallel_size: 2}; entries of the "
        "body of a request to a server; or what a plugin's sampler takes.",
    )


@dataclass(frozen=True, slots=True)
class Backend:
    """The one who draws answers, as plain values.

    Attributes:
        name: ``hf``, ``vllm``, an address or a plugin's name.
        model: Name that a server has the model by.
        key_variable: Variable of the environment with a server's key; None: none is sent.
        timeout: Seconds for one answer of a server.
        concurrency: Prompts at once.
        options: Further arguments.
    """

    name: str = "hf"
    model: str | None = None
    key_variable: str | None = None
    timeout: float = 600.0
    concurrency: int = 16
    options: Mapping[str, Any] | None = None

    @property
    def is_own(self) -> bool:
        """True if transformers draws in this process."""
        return self.name == "hf"

    @property
    def is_server(self) -> bool:
        """True if it is an address."""
        return "://" in self.name

    def facts(self) -> dict[str, Any]:
        """Facts that an answer depends on, for a file beside it; no key is among it."""
        return {"backend": self.name, "model": self.model, "options": dict(self.options or {})}


def backend_of(config: GenerationConfig) -> Backend:
    """The section as plain values."""
    return Backend(
        name=config.backend.rstrip("/"),
        model=config.model,
        key_variable=config.key_variable,
        timeout=config.timeout,
        concurrency=config.concurrency,
        options=dict(config.options),
    )


def is_backend(value: str) -> bool:
    """True for a value that may name a backend."""
    if "://" in value:
        return is_http_address(value)
    return value != "" and not value.isspace()


def generation_problems(
    config: GenerationConfig, strategy: str, plugins: Sequence[str]
) -> Iterator[str]:
    """Yields the contradictions of the section, one clause each.

    Args:
        config: The section.
        strategy: ``strategy.name``, which may share weights out.
        plugins: Modules that are loaded, which may register a sampler.
    """
    default, backend = GenerationConfig(), config.backend
    is_server = "://" in backend
    if backend not in (*OWN_SAMPLERS, *SAMPLERS) and not is_server:
        known = ", ".join((*OWN_SAMPLERS, *sorted(SAMPLERS)))
        more = "" if plugins else "; name the module that registers it with plugins=[<module>]"
        yield f"generation.backend={backend}: unknown backend; available: {known}{more}"
    for key in _OF_A_SERVER:
        if not is_server and getattr(config, key) != getattr(default, key):
            yield (
                f"generation.{key} is for a server, and generation.backend={backend}; name its "
                f"address there, or leave generation.{key} out"
            )
    if config.options and backend == "hf":
        yield "generation.options is for other backends than hf; leave it out"
    if (is_server or backend == "vllm") and (
        taken := [name for name in _OF_A_REQUEST if name in config.options]
    ):
        yield (f"generation.options: {taken[0]} is decided by what is asked; leave it out of them")
    if is_server:
        yield from _server_problems(config)
    if backend != "hf" and strategy == "fsdp":
        yield (
            f"generation.backend={backend} needs whole weights, and strategy={strategy} shares "
            "them out; draw answers by hf, or afterwards with `evaluate`"
        )


def _server_problems(config: GenerationConfig) -> Iterator[str]:
    if config.model is None:
        yield (
            f"generation.backend={config.backend} needs the name that its server has the model "
            "by: generation.model=<name>"
        )
    yield from key_problems(
        address_key="generation.backend",
        address=config.backend,
        variable_key="generation.key_variable",
        variable=config.key_variable,
    )


def check_trainable(backend: Backend, *, answers: int) -> None:
    """Refuses a backend that cannot have the weights of a training.

    Args:
        backend: Who draws the answers.
        answers: How many are asked for.

    Raises:
        UserError: If it is a server, whose weights are its own.
    """
    if backend.is_server and answers:
        raise UserError(
            f"generation.backend={backend.name}: a server answers with weights that it has loaded, "
            "and those of a training are not among them; leave it out, and name it to `evaluate` "
            "or `generate` once it serves the run's model/"
        )
