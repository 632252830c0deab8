"""Answers drawn by vLLM, from prompts of token ids to token ids; no text goes in or out.

An engine is made for one request and goes with it: the weights behind it change in a training, and
its memory is needed again.
"""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.keyed import request_seeds
from dpo_lightning.plugins import SampleRequest

# Ranks that its kernels are made for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Of the memory that is free, the share that an engine takes.
_SHARE = 0.9


def sample(request: SampleRequest) -> list[list[int]]:
    """Answers of an engine of vLLM.

    Args:
        request: What is asked.

    Raises:
        UserError: If vLLM is not installed.
    """
    vllm = _module("vllm")
    base, adapter = request.weights()
    engine = vllm.LLM(**_engine_arguments(request, base, adapter))
    try:
        outputs = engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in request.prompts],
            sampling_params=[
                vllm.SamplingParams(
                    temperature=request.temperature,
                    top_p=request.top_p,
                    top_k=-1,
                    max_tokens=limit,
                    seed=seed,
                    stop_token_ids=list(request.ends),
                    detokenize=False,
                )
                for limit, seed in zip(request.limits, request_seeds(request), strict=True)
            ],
            lora_request=None if adapter is None else _lora(adapter),
            use_tqdm=False,
        )
        return [_answer(output.outputs[0], request.ends) for output in outputs]
    finally:
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"generation.backend=vllm: {error.name or name} is not installed here; install vllm in "
            "this environment, or serve the model elsewhere and name its address"
        ) from error


def _engine_arguments(request: SampleRequest, base: str, adapter: str | None) -> dict[str, Any]:
    longest = max(
        len(prompt) + limit for prompt, limit in zip(request.prompts, request.limits, strict=True)
    )
    arguments: dict[str, Any] = {
        "model": base,
        # Ids go in and come out.
        "skip_tokenizer_init": True,
        # A model's own settings would sharpen or cut its distribution.
        "generation_config": "vllm",
        "max_model_len": longest,
        "seed": request.seed,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        arguments["gpu_memory_utilization"] = round(_SHARE * free / total, 3)
    if adapter is not None:
        rank = json.loads((Path(adapter) / "adapter_config.json").read_text())["r"]
        fitting = next((size for size in _RANKS if size >= rank), rank)
        arguments |= {"enable_lora": True, "max_lora_rank": fitting}
    return arguments | dict(request.options)


def _lora(adapter: str) -> Any:
    return _module("vllm.lora.request").LoRARequest("policy", 1, adapter)


def _answer(completion: Any, ends: Sequence[int]) -> list[int]:
    """The ids of an answer, with the token that ended it."""
    ids = [int(token) for token in completion.token_ids]
    if completion.finish_reason == "stop" and (not ids or ids[-1] not in ends):
        reason = completion.stop_reason
        ids.append(reason if type(reason) is int else ends[0])
    return ids
