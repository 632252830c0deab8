"""The section ``generation``: what is refused, and what a run's hash and a file of answers know."""

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.settings.fingerprint import settings_hash
from dpo_lightning.settings.generation import (
    Backend,
    GenerationConfig,
    backend_of,
    check_trainable,
    generation_problems,
    is_backend,
)
from dpo_lightning.settings.schema import Config

URL = "http://localhost:8000/v1"


def problems(strategy: str = "auto", **values) -> str:
    return "; ".join(generation_problems(GenerationConfig(**values), strategy, []))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"backend": "vlm"}, "generation.backend=vlm: unknown backend; available: "),
        ({"model": "m"}, "generation.model is for a server"),
        ({"timeout": 3.0}, "generation.timeout is for a server"),
        ({"options": {"a": 1}}, "generation.options is for other backends"),
        ({"backend": "vllm", "options": {"seed": 1}}, "generation.options: seed is decided"),
        ({"backend": URL}, "generation.model=<name>"),
        ({"backend": URL, "model": "m", "key_variable": "ABSENT_"}, "has no such variable"),
        ({"backend": "vllm", "strategy": "fsdp"}, "needs whole weights"),
    ],
)
def test_contradictions_are_named(values, said):
    assert said in problems(**values)


def test_a_key_goes_over_no_open_line(monkeypatch):
    monkeypatch.setenv("MY_KEY", "x")
    own = {"model": "m", "key_variable": "MY_KEY"}
    assert "over an open line" in problems(backend="http://far.example/v1", **own)
    assert problems(backend="https://far.example/v1", **own) == ""
    assert problems(backend=URL, **own) == ""
    assert "MY_KEY" not in str(backend_of(GenerationConfig(backend=URL, **own)).facts())


def test_what_may_be_a_backend():
    assert all(map(is_backend, ("hf", "vllm", "mine", URL, "https://a.b/v1")))
    wrong = ("", " ", "ftp://a/v1", "http://", "http://u:p@a/v1", f"{URL}?k=1")
    assert not any(map(is_backend, wrong))


def test_a_server_has_no_weights_of_a_training():
    with pytest.raises(UserError, match="those of a training are not among them"):
        check_trainable(Backend(URL), answers=8)
    check_trainable(Backend(URL), answers=0)
    check_trainable(Backend("vllm"), answers=8)


def test_only_another_backend_is_another_run():
    """Runs of before had none, and their hash stays; how long a server may take is no number."""
    plain, other, slow = Config(), Config(), Config()
    other.generation.backend = "vllm"
    slow.generation.timeout = 3.0
    assert settings_hash(plain) == settings_hash(slow)
    assert settings_hash(plain) != settings_hash(other)
