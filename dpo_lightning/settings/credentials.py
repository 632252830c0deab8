"""Detection of credentials in keys, values and messages. Imports nothing heavy.

Settings are written to a run's folder, to wandb and to the terminal, so none may hold a secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_KEY = re.compile(
    r"(^|_)(api_?key|access_?key|passw(or)?d|passwd|secret|credentials?|private_?key)($|_)"
    r"|^((hf|hub|auth|access|use_auth|wandb|huggingface|hugging_?face_hub|github|api|bearer)_)?"
    r"token$",
    re.IGNORECASE,
)

# Variables of the environment are others' to name: all that end so are taken for secrets.
_VARIABLE = re.compile(r"(^|_)TOKEN$", re.IGNORECASE)

# The forms in which Hugging Face, wandb, GitHub, OpenAI and Amazon issue theirs; a password in an
# address.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{30,}|wandb_v\d_\w{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}"
    r"|sk-(?:proj-|ant-)?[A-Za-z0-9_]{32,}|AKIA[0-9A-Z]{16}"
    r")|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)

# A shorter value of a variable may stand in any text by chance.
_SHORTEST = 12
_HIDDEN = "[hidden]"


def is_secret(key: str) -> bool:
    """True if the key looks like that of a credential, whose value is never shown or stored."""
    return any(_KEY.search(part) for part in re.split(r"[./]", key.lstrip("+~")))


def is_secret_text(text: str) -> bool:
    """True if a text holds a token of a known form, or a secret of the environment."""
    return _holds_secret(text, _environment())


def redact(text: str) -> str:
    """The text without the tokens and secrets of the environment that it holds."""
    for secret in _environment():
        text = text.replace(secret, _HIDDEN)
    return _TOKEN.sub(_HIDDEN, text)


def refusal(key: str) -> str:
    """The answer to a key that is a credential's, or whose value is one; it shows no value."""
    return (
        f"{redact(key)}: credentials are no settings, they would be written to the run's folder; "
        "use `wandb login`, `hf auth login` or their environment variables"
    )


def secrets_in(value: Any, key: str) -> Iterator[str]:
    """The keys at and below ``key`` that are a credential's, or whose value is one.

    Args:
        value: A plain value: mappings, lists and scalars.
        key: Its dotted key.
    """
    yield from _secrets_in(value, key, _environment())


def _secrets_in(value: Any, key: str, known: Sequence[str]) -> Iterator[str]:
    if is_secret(key.rpartition(".")[2]) or _holds_secret(key, known):
        yield key
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _secrets_in(item, f"{key}.{name}" if key else str(name), known)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _secrets_in(item, key, known)
    elif isinstance(value, str) and _holds_secret(value, known):
        yield key


def typed_secrets(words: Sequence[str]) -> Iterator[str]:
    """Words of a command line that hold a secret, by the text before the ``=``."""
    for word in words:
        if is_secret_text(word):
            key, equals, _ = word.partition("=")
            yield key if equals and not is_secret_text(key) else "an argument"


def _holds_secret(text: str, known: Sequence[str]) -> bool:
    return _TOKEN.search(text) is not None or any(secret in text for secret in known)


def _environment() -> list[str]:
    """The values of variables that look like credentials, the longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and (is_secret(name) or _VARIABLE.search(name))
    }
    return sorted(found, key=len, reverse=True)
