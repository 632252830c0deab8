"""Detection of credentials in keys, values and messages. Imports nothing heavy.

Settings are written to a run's folder, to wandb and to the terminal, so none may hold a secret.
"""

from __future__ import annotations

import math
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

_FORMS = {
    "Hugging Face": r"hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}",
    "wandb": r"wandb_v\d_\w{20,}",
    "GitHub": r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}",
    "GitLab": r"gl(?:pat|dt|rt|cbt|ptt|soat|agent)-[\w-]{20,}",
    "OpenAI, Anthropic and others who write sk-": (
        r"sk-(?:proj|ant|svcacct|admin|or|lf|live)-[\w-]{16,}|sk-[A-Za-z0-9_]{32,}"
    ),
    "other models' hosts": (
        r"gsk_[A-Za-z0-9]{40,}|r8_[A-Za-z0-9]{30,}|pplx-[A-Za-z0-9]{32,}|xai-[A-Za-z0-9]{40,}"
        r"|nvapi-[\w-]{40,}|tgp_v1_[\w-]{30,}|fw_[A-Za-z0-9]{22,}"
    ),
    "Amazon": r"(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}",
    "Google": r"AIza[\w-]{30,}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}",
    "Azure": r"AccountKey=[A-Za-z0-9+/=]{40,}",
    "Slack": r"xox[a-z]-[\w-]{10,}|xapp-\d-[\w-]{10,}|xoxe\.[\w.-]{10,}",
    "Stripe": r"(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9+/=]{20,}",
    "npm": r"npm_[A-Za-z0-9]{30,}",
    "PyPI": r"pypi-[\w-]{50,}",
    "Docker": r"dckr_(?:pat|oat)_[\w-]{20,}",
    "SendGrid": r"SG\.[\w-]{16,}\.[\w-]{16,}",
    "Databricks": r"dapi[0-9a-f]{32}",
    "DigitalOcean": r"do[opr]_v1_[0-9a-f]{40,}",
    "Vault": r"hv[sbr]\.[\w-]{20,}",
    "Shopify": r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",
    "Notion and Linear": r"ntn_[A-Za-z0-9]{30,}|lin_api_[A-Za-z0-9]{30,}",
    "Telegram": r"\d{8,10}:AA[\w-]{32,}",
    "Twilio": r"SK[0-9a-f]{32}",
    "JSON Web Tokens": r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",
    "age": r"AGE-SECRET-KEY-1[0-9A-Z]{50,}",
}
"""Public forms of credentials, by who issues them."""

_TOKEN = re.compile(
    rf"(?<![A-Za-z0-9])(?:{'|'.join(_FORMS.values())})"
    # A password in an address, a private key,
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    # and what an address is signed with.
    r"|(?P<kept>(?i:[?&][\w-]*(?:token|secret|passw(?:or)?d|api_?key|access_?key|signature|credential)="
    r"|[?&](?:key|sig|auth)=))(?!\[hidden\])[^&\s'\"]{6,}",
)

# A long text that nobody would type: letters of both cases and digits, or many hexadecimal digits.
_RUN = re.compile(r"[A-Za-z0-9+=]{20,}")
_HEXADECIMAL = re.compile(r"[0-9a-f]{32,}|[0-9A-F]{32,}")
_LEAST_BITS = 3.5
# Their values are hashes as a rule.
_HASHES = ("revision",)

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
    return _TOKEN.sub(lambda found: f"{found['kept'] or ''}{_HIDDEN}", text)


def looks_random(text: str) -> bool:
    """True if a text may be a credential of a form that is not known; paths are none."""
    if "/" in text or "\\" in text:
        return False
    if _HEXADECIMAL.fullmatch(text):
        return True
    return any(
        re.search("[a-z]", run) is not None
        and re.search("[A-Z]", run) is not None
        and len(re.findall("[0-9]", run)) > 1
        and _bits(run) >= _LEAST_BITS
        for run in _RUN.findall(text)
    )


def _bits(text: str) -> float:
    """Entropy of a text's letters, in bits per letter."""
    shares = [text.count(letter) / len(text) for letter in set(text)]
    return -sum(share * math.log2(share) for share in shares)


def random_values(value: Any, key: str) -> Iterator[str]:
    """The keys at and below ``key`` whose value may be a credential of an unknown form.

    Args:
        value: A plain value: mappings, lists and scalars.
        key: Its dotted key.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from random_values(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from random_values(item, key)
    elif isinstance(value, str) and key.rpartition(".")[2] not in _HASHES and looks_random(value):
        yield key


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
