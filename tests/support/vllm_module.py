"""A stand-in for vLLM with its signatures: the arguments that its engine knows, and no others.

It answers with the prompt's ids turned round, and remembers what it was asked.
"""

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    detokenize: bool = True


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class Asked:
    """Arguments and requests that engines were given."""

    engines: list[dict[str, Any]] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)


def module(asked: Asked) -> dict[str, types.ModuleType]:
    """The modules, by name."""

    class LLM:
        def __init__(
            self,
            model: str,
            *,
            tokenizer: str | None = None,
            skip_tokenizer_init: bool = False,
            tensor_parallel_size: int = 1,
            dtype: str = "auto",
            seed: int = 0,
            gpu_memory_utilization: float = 0.9,
            max_model_len: int | None = None,
            generation_config: str = "auto",
            enable_lora: bool = False,
            max_lora_rank: int = 16,
        ) -> None:
            self.own = {name: value for name, value in locals().items() if name != "self"}
            if Path(model).is_dir():
                self.own["files"] = sorted(path.name for path in Path(model).iterdir())
            asked.engines.append(self.own)

        def generate(
            self,
            prompts: list[dict[str, list[int]]],
            sampling_params: list[SamplingParams] | None = None,
            *,
            use_tqdm: bool = True,
            lora_request: LoRARequest | None = None,
        ) -> list[RequestOutput]:
            assert sampling_params is not None
            assert len(prompts) == len(sampling_params)
            assert self.own["skip_tokenizer_init"]
            assert not sampling_params[0].detokenize
            assert lora_request is None or self.own["enable_lora"]
            asked.requests.append((prompts, sampling_params, lora_request))
            return [
                RequestOutput([self._answer(prompt["prompt_token_ids"], params)])
                for prompt, params in zip(prompts, sampling_params, strict=True)
            ]

        @staticmethod
        def _answer(ids: list[int], params: SamplingParams) -> CompletionOutput:
            turned = ids[::-1][: params.max_tokens]
            ended = len(turned) < (params.max_tokens or 0)
            assert params.stop_token_ids
            # As the real one: the token that ended it is among its ids.
            more = [params.stop_token_ids[0]] if ended else []
            reason = "stop" if ended else "length"
            return CompletionOutput(0, "", [*turned, *more], reason, more[0] if more else None)

    found = types.ModuleType("vllm")
    found.LLM, found.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    lora, request = types.ModuleType("vllm.lora"), types.ModuleType("vllm.lora.request")
    request.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    return {"vllm": found, "vllm.lora": lora, "vllm.lora.request": request}


def install(monkeypatch: Any) -> Asked:
    """Puts it where vLLM would be, and returns what it is going to be asked."""
    asked = Asked()
    for name, own in module(asked).items():
        monkeypatch.setitem(sys.modules, name, own)
    return asked
