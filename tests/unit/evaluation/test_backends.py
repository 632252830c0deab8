"""Answers by other engines: vLLM by a stand-in of its signatures, a local server, a plugin."""

import contextlib
import dataclasses
import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.answers import Answering
from dpo_lightning.evaluation.backends import BackendDrawer, checked_answers, find_sampler
from dpo_lightning.evaluation.completions import CompletionServer
from dpo_lightning.evaluation.keyed import noise_seed, seeds_of
from dpo_lightning.plugins import SAMPLERS, SampleRequest, register_sampler
from dpo_lightning.settings.generation import Backend
from tests.support.completions_server import choice, completions
from tests.support.models import byte_tokenizer
from tests.support.vllm_module import install

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def request(prompts: list[list[int]], limit: int = 5, **changes: Any) -> SampleRequest:
    values: dict[str, Any] = {
        "prompts": prompts,
        "limits": [limit] * len(prompts),
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 3,
        "ends": [END],
        "who": "policy",
        "tokenizer": TOKENIZER,
        "model": lambda: None,
        "weights": lambda: ("folder/model", None),
        "options": {},
    }
    return SampleRequest(**(values | changes))


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """All objects of the tests are many, and none of them is an engine's."""
    monkeypatch.setattr("gc.collect", lambda: 0)


# Seeds -------------------------------------------------------------------------------------------


def test_a_prompts_seed_is_its_own_however_many_there_are():
    """Of a prompt that is there twice the second has another; what stands between changes none."""
    one, other = [4, 5], [6]
    first, second, again = seeds_of(3, [one, other, one])
    assert seeds_of(3, [other, one, one]) == [second, first, again]
    assert len({first, second, again}) == 3
    assert first == noise_seed(3, np.array(one))


def test_seeds_that_are_given_are_taken(monkeypatch):
    """By vLLM; a server is given the 31 bits that each takes."""
    asked = install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted = request([[7], [7]], seeds=[11, 2**40 + 12])
    checked_answers(Backend("vllm"), find_sampler(Backend("vllm")), wanted)
    assert [p.seed for p in asked.requests[0][1]] == [11, 2**40 + 12]
    _, sent = served(lambda *_: (200, choice("?", "stop", token_ids=[5, END])), wanted)
    assert sorted(body["seed"] for body in sent.bodies) == [11, 12]


# vLLM --------------------------------------------------------------------------------------------


def test_vllm_is_asked_in_its_own_words(monkeypatch):
    asked = install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend = Backend("vllm", options={"tensor_parallel_size": 2})
    wanted = request([[7, 8], [9, 10, 11, 12, 13, 14]], options=backend.options)
    found = checked_answers(backend, find_sampler(backend), wanted)
    assert [x.tolist() for x in found] == [[8, 7, END], [14, 13, 12, 11, 10]]
    [engine] = asked.engines
    assert engine["model"] == "folder/model"
    assert engine["tensor_parallel_size"] == 2
    assert engine["max_model_len"] == 6 + 5
    assert engine["generation_config"] == "vllm"
    [(_, params, lora)] = asked.requests
    assert lora is None
    assert [(p.temperature, p.top_p, p.top_k, p.max_tokens) for p in params] == [
        (0.7, 0.9, -1, 5)
    ] * 2
    assert [p.seed for p in params] == seeds_of(3, wanted.prompts)
    assert params[0].stop_token_ids == [END]


def test_vllm_is_given_an_adapter_beside_its_base(monkeypatch, tmp_path):
    asked = install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 12}))
    wanted = request([[7]], weights=lambda: ("base", str(tmp_path)))
    checked_answers(Backend("vllm"), find_sampler(Backend("vllm")), wanted)
    [engine] = asked.engines
    assert (engine["model"], engine["enable_lora"], engine["max_lora_rank"]) == ("base", True, 16)
    assert asked.requests[0][2].lora_path == str(tmp_path)


def test_vllm_takes_a_share_of_what_is_free(monkeypatch):
    """Of 80 GiB 20 are free: 0.9 of a quarter."""
    asked = install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 << 30, 80 << 30))
    checked_answers(Backend("vllm"), find_sampler(Backend("vllm")), request([[7]]))
    assert asked.engines[0]["gpu_memory_utilization"] == 0.225


def test_without_vllm_that_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="vllm is not installed here"):
        checked_answers(Backend("vllm"), find_sampler(Backend("vllm")), request([[7]]))


# A server ----------------------------------------------------------------------------------------


def served(answer, wanted: SampleRequest, **more: Any) -> tuple[list[list[int]], Any]:
    with completions(answer) as sent:
        backend = Backend(sent.url, model="mine", timeout=5.0, **more)
        server = CompletionServer(backend, wait=lambda seconds: None)
        return [x.tolist() for x in checked_answers(backend, server, wanted)], sent


def test_a_server_is_asked_with_ids_and_gives_ids_back():
    """In whatever order its replies come; one that ended by itself gets the token that ends it."""

    def answer(body, number):
        first = body["prompt"][0]
        return 200, choice("?", "stop" if first == 7 else "length", token_ids=[first + 1] * 2)

    wanted = request([[7], [9, 10]], limit=2)
    found, sent = served(answer, wanted, options={})
    assert found == [[8, 8], [10, 10]]  # cut at the limit
    found, _ = served(answer, request([[7], [9, 10]], limit=4))
    assert found == [[8, 8, END], [10, 10]]
    assert {*sent.paths} == {"/v1/completions"}
    body = next(b for b in sent.bodies if b["prompt"] == [7])
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == (
        "mine",
        0.7,
        0.9,
        2,
    )
    assert body["seed"] == seeds_of(3, wanted.prompts)[0] & 0x7FFFFFFF
    assert body["return_token_ids"] is True


def test_a_server_that_knows_texts_alone(caplog):
    found, _ = served(lambda body, number: (200, choice("ab")), request([[7]]))
    assert found == [[*ids("ab"), END]]
    found, _ = served(lambda body, number: (200, choice("")), request([[7]]))
    assert found == [[END]]


def test_what_fails_is_asked_again_and_what_cannot_be_is_said(monkeypatch):
    monkeypatch.setenv("MY_KEY", "very-secret-value")

    def flaky(body, number):
        return (503, b"busy") if number < 2 else (200, choice("a", "length"))

    found, sent = served(flaky, request([[7]]), key_variable="MY_KEY")
    assert found == [ids("a")]
    assert sent.keys == ["Bearer very-secret-value"] * 3
    for reply, said in (
        ((401, b"no: very-secret-value"), "generation.key_variable="),
        ((404, b"no such model"), "generation.model="),
        ((500, b"broken"), "it answers 500 (broken)"),
        ((200, b"<html>"), "not one of a completions server"),
        ((200, {"choices": []}), "not one of a completions server"),
    ):
        with pytest.raises(UserError) as caught:
            served(lambda body, number, reply=reply: reply, request([[7]]), key_variable="MY_KEY")
        assert said in str(caught.value)
        assert "very-secret-value" not in str(caught.value)


# A plugin ----------------------------------------------------------------------------------------


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setattr("dpo_lightning.plugins.SAMPLERS", SAMPLERS)
    yield lambda function: register_sampler("mine")(function)
    SAMPLERS.pop("mine", None)


def test_a_plugins_sampler_answers_and_is_cut_at_ends_and_limits(plugin):
    plugin(lambda wanted: [[5, 6, END, 8], [5] * 99])
    backend = Backend("mine")
    found = checked_answers(backend, find_sampler(backend), request([[7], [8]], limit=4))
    assert [x.tolist() for x in found] == [[5, 6, END], [5] * 4]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([[5]], "1 answers to 2 prompts"),
        ([[5], []], "at least one"),
        ([[5], [10**6]], "each from 0 to"),
        ([[5], [-1]], "each from 0 to"),
        ([[5], 3], "TypeError"),
    ],
)
def test_a_plugin_that_gives_something_else_is_named(plugin, answers, said):
    plugin(lambda wanted: answers)
    with pytest.raises(UserError) as caught:
        checked_answers(Backend("mine"), find_sampler(Backend("mine")), request([[7], [8]]))
    assert "generation.backend=mine" in str(caught.value)
    assert said in str(caught.value)


def test_names_that_have_a_meaning_are_no_plugins():
    for name in ("hf", "vllm", "http://here"):
        with pytest.raises(ValueError, match="a meaning of its own"):
            register_sampler(name)
    with pytest.raises(UserError, match="no plugin registers it"):
        find_sampler(Backend("absent"))


# In an evaluation --------------------------------------------------------------------------------


def test_draws_of_an_evaluation_are_the_backends_and_greedy_ones_are_not(plugin):
    """At temperature 1 with nothing cut off: a KL of other answers would be of another policy."""
    seen, states = [], []

    @contextlib.contextmanager
    def plain(model):
        states.append("plain")
        yield model
        states.append("as it is trained")

    def sampler(wanted: SampleRequest):
        assert wanted.model() is policy
        states.append("asked")
        seen.append((wanted, wanted.weights()))
        return [[5, END] for _ in wanted.prompts]

    plugin(sampler)
    policy = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=END))
    models = SimpleNamespace(policy=policy)
    files = lambda who, model: contextlib.nullcontext((who, None))  # noqa: E731
    drawer = BackendDrawer(Backend("mine"), TOKENIZER, files, plain)
    answering = Answering(
        TOKENIZER,
        6,
        2,
        contextlib.nullcontext,
        drawer=drawer,
    )
    found = answering.answers(models, policy, [np.array([7], dtype=np.int32)], seed=4)
    assert [x.tolist() for x in found] == [[5, END]]
    [(wanted, weights)] = seen
    facts = (wanted.temperature, wanted.top_p, wanted.seed, wanted.who, list(wanted.limits))
    assert facts == (1.0, 1.0, 4, "policy", [6])
    assert weights == ("policy", None)
    # A model in training attends by a plan of its own, which generate() does not have.
    assert states == ["plain", "asked", "as it is trained"]


def test_a_server_draws_for_the_policy_alone():
    drawer = BackendDrawer(Backend("http://localhost:1/v1"), TOKENIZER, None, None)
    assert drawer.draws("policy")
    assert not drawer.draws("reference")
    assert dataclasses.replace(drawer, backend=Backend("vllm")).draws("reference")
