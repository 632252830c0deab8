"""Texts that are taken for a credential, and some that only look a little like one."""

import pytest

from dpo_lightning.settings.credentials import (
    is_secret,
    is_secret_text,
    random_values,
    redact,
    secrets_in,
    typed_secrets,
)

# Made up, in the form of the real ones.
TOKENS = [
    "hf_" + "aB3" * 11 + "x",
    "wandb_v1_" + "Ab_9" * 8,
    "ghp_" + "aB3" * 12,
    "github_pat_" + "aB3_" * 6,
    "sk-proj-" + "aB3" * 12,
    "sk-" + "aB3" * 12,
    "AKIA" + "ABCD1234" * 2,
    "sk-ant-api03-" + "aB3_-" * 6,
    "xoxb-" + "123456789012-" + "aB3" * 8,
    "AIza" + "aB3-_" * 7,
    "eyJ" + "aB3" * 5 + ".eyJ" + "aB3" * 5 + "." + "aB3-_" * 5,
    "glpat-" + "aB3-_" * 4,
    "npm_" + "aB3" * 12,
    "sk_live_" + "aB3" * 8,
    "SG." + "aB3" * 7 + "." + "aB3" * 12,
    "hvs." + "aB3" * 9,
    "-----BEGIN RSA PRIVATE KEY-----",
]


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "SOME_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "key",
    [
        *("api_key", "logger.api_key", "WANDB_API_KEY", "+wandb_api_key", "apikey", "token"),
        *(
            "HF_TOKEN",
            "hf_token",
            "HUGGING_FACE_HUB_TOKEN",
            "huggingface_hub_token",
            "github_token",
        ),
        *("auth_token", "access_token", "password", "db_passwd", "secret", "client_secret"),
        *("AWS_SECRET_ACCESS_KEY", "credentials", "private_key", "hydra.job.env_set.HF_TOKEN"),
    ],
)
def test_keys_of_credentials(key: str):
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    [
        *("num_tokens", "data.micro_batch_tokens", "model.tokenizer", "pad_token", "eos_token"),
        *("bos_token_id", "evaluation.max_new_tokens", "tokens", "token_type_ids", "secretary"),
        *("data.columns.prompt", "hydra/launcher", "key", "monkey", "optimizer.betas", "passage"),
    ],
)
def test_keys_that_are_none(key: str):
    assert not is_secret(key)


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_of_known_forms(token: str):
    for text in (token, f"a {token}.", f"https://hub/{token}/x"):
        assert is_secret_text(text)
        assert token not in redact(text)
    assert redact(f"a {token}.") == "a [hidden]."


@pytest.mark.parametrize(
    "text",
    [
        *("hf_internal_testing/tiny-random-gpt2", "hf-internal-testing/llama", "hf_hub_download"),
        *("sk-learn-based-reward-model-of-some-length", "task-0123456789abcdef0123456789abcdef01"),
        # A commit of a hub model, as model.revision wants it.
        *("0123456789abcdef0123456789abcdef01234567", "https://huggingface.co/a/b", "a@b:c"),
        *("/home/me/data:/x@y", "beta-0.1_seed-1", "wandb_v1", "", "12:30:45"),
    ],
)
def test_texts_that_are_none(text: str):
    assert not is_secret_text(text)
    assert redact(text) == text


def test_a_password_in_an_address():
    text = "cannot reach https://me:hunter2@host/path"
    assert is_secret_text(text)
    assert redact(text) == "cannot reach https://[hidden]@host/path"


def test_what_an_address_is_signed_with():
    text = "https://host/rows.jsonl?v=2&X-Amz-Signature=abcdef012345&token=abc123"
    assert is_secret_text(text)
    hidden = "https://host/rows.jsonl?v=2&X-Amz-Signature=[hidden]&token=[hidden]"
    assert redact(text) == hidden
    assert redact(hidden) == hidden
    assert not is_secret_text("https://host/rows.jsonl?v=2&tokens=many&token=a")


def test_a_value_that_looks_random_is_pointed_at():
    config = {
        "name": "wJalrXUtnFEMI7K7MDENG",
        "logger": {"tags": ["a", "0123456789abcdef" * 2]},
        "model": {"revision": "0123456789abcdef" * 2, "pretrained": "a/wJalrXUtnFEMI7K7MDENG"},
        "data": {"subset": "helpful-base_2024", "train": "TheQuickBrownFoxJumpsOverTheLazyDog"},
    }
    assert list(random_values(config, "")) == ["name", "logger.tags"]


def test_secrets_of_the_environment(monkeypatch):
    text = "the server said: plain-looking-value is wrong"
    assert redact(text) == text
    monkeypatch.setenv("SOME_TOKEN", "plain-looking-value")
    assert redact(text) == "the server said: [hidden] is wrong"
    # A short one may be anywhere by chance; other variables are nobody's secret.
    monkeypatch.setenv("SOME_TOKEN", "server")
    monkeypatch.setenv("SOME_NAME", "plain-looking-value")
    assert redact(text) == text


def test_a_secret_that_holds_another_is_hidden_whole(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "plain-looking-value")
    monkeypatch.setenv("OTHER_TOKEN", "plain-looking-value-with-more")
    assert redact("it is plain-looking-value-with-more") == "it is [hidden]"


def test_places_of_secrets():
    config = {
        "name": "x",
        "model": {"config_overrides": {"a": {"hf_token": 1}, "b": [TOKENS[0]]}},
        "data": {"columns": {TOKENS[1]: "prompt", "token": "prompt"}},
    }
    assert list(secrets_in(config, "")) == [
        "model.config_overrides.a.hf_token",
        "model.config_overrides.b",
        f"data.columns.{TOKENS[1]}",
        "data.columns.token",
    ]


def test_words_with_secrets_are_named_by_their_key():
    words = ["beta=0.1", f"name={TOKENS[0]}", f"--config-dir={TOKENS[0]}", TOKENS[0]]
    words += [f"{TOKENS[0]}=3", f"data.train=a,{TOKENS[1]}"]
    assert list(typed_secrets(words)) == [
        "name",
        "--config-dir",
        "an argument",
        "an argument",
        "data.train",
    ]
