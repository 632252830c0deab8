"""Models and tokenizers from folders, the hub or a config; the only caller of from_pretrained."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dpo_lightning.errors import UserError
from dpo_lightning.files import read_json
from dpo_lightning.models.config_numbers import without_dropout
from dpo_lightning.models.kinds import build_error
from dpo_lightning.models.quantization import Quantized
from dpo_lightning.settings.messages import shown
from dpo_lightning.settings.model_folders import missing_weights

_TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "*.tiktoken", "*.json.gz")

log = logging.getLogger(__name__)


def load_tokenizer(
    source: str, *, key: str, revision: str | None = None, needs_eos: bool = True
) -> Any:
    """Loads a tokenizer that can end a response.

    Args:
        source: A folder or a hub id.
        key: The config key that named it, for errors.
        revision: Revision on the hub.
        needs_eos: True refuses one that cannot.

    Raises:
        UserError: If there is none, or it has no EOS token.
    """
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
        raise UserError(
            f"{key}={source}: no tokenizer: the folder has no tokenizer.json; name another with "
            "model.tokenizer="
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:
        raise load_error(
            f"{key}={source}: no tokenizer", error, remedy="model.tokenizer="
        ) from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise UserError(
            f"{key}={source}: no tokenizer: its vocabulary is empty, as no file holds one; name "
            "another with model.tokenizer="
        )
    if needs_eos and tokenizer.eos_token_id is None:
        raise UserError(
            f"{key}={source}: the tokenizer has no EOS token, so no response could end; name "
            "another with model.tokenizer= or set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def load_config(
    source: str,
    *,
    key: str,
    revision: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """Loads a model's config from a folder, a config.json or the hub, with every dropout at 0.

    Args:
        source: A folder, a file or a hub id.
        key: The config key that named it, for errors.
        revision: Revision on the hub.
        overrides: Values to change, such as ``{"hidden_size": 64}``.

    Raises:
        UserError: If it cannot be read or an override names nothing.
    """
    try:
        if Path(source).is_file():
            values = json.loads(Path(source).read_text())
            config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        else:
            config = AutoConfig.from_pretrained(
                source, revision=revision or "main", trust_remote_code=False
            )
    except Exception as error:
        raise load_error(f"{key}={source}: no model config", error, remedy=f"{key}=") from error
    known = config.to_dict()
    for name, value in (overrides or {}).items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise UserError(
                f"model.config_overrides.{name}={value}: {config.model_type} has no such key{hint}"
            )
    if overrides:
        # A new config, so that its own checks and derived values see the overrides.
        config = type(config).from_dict(known | dict(overrides))
    return config


def load_model(
    source: str,
    config: Any,
    *,
    key: str,
    dtype: torch.dtype,
    revision: str | None = None,
    quantization: Quantized | None = None,
) -> Any:
    """Loads a causal language model's weights from a folder or the hub, safetensors only.

    Args:
        source: A folder or a hub id.
        config: Its config.
        key: The config key that named it, for errors.
        dtype: Type of the weights in memory.
        revision: Revision on the hub.
        quantization: Holds linear layers in fewer bits; None holds them as they are.

    Raises:
        UserError: If the weights are absent, incomplete or of another architecture.
    """
    return _load_weights(
        AutoModelForCausalLM,
        source,
        without_dropout(config),
        key=key,
        revision=revision or "main",
        dtype=dtype,
        **({} if quantization is None else quantization.arguments()),
    )


def load_onto(base: Any, source: str, *, key: str) -> Any:
    """Loads a stored adapter onto its base model, as PEFT has them together.

    Args:
        base: The base model.
        source: The adapter's folder.
        key: What named it, for errors.

    Raises:
        UserError: If it does not fit.
    """
    try:
        return PeftModel.from_pretrained(base, source)
    except Exception as error:
        raise load_error(f"{key}={source}: no adapter", error, remedy=f"{key}=") from error


def stated_ends(source: str) -> list[int]:
    """Tokens that end an answer by a model's ``generation_config.json``; none where it has none.

    Args:
        source: Folder or hub id of the model.
    """
    try:
        found = GenerationConfig.from_pretrained(source).eos_token_id
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else [] if found is None else [found]


def check_reward_model(source: str, *, key: str) -> Any:
    """The config of a sequence-classification model with one output.

    Args:
        source: A folder or a hub id.
        key: The config key that named it, for errors.

    Raises:
        UserError: If it is none.
    """
    config = load_config(source, key=key)
    kinds = config.architectures or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(
            f"{key}={source}: its config.json names {', '.join(kinds) or 'no architecture'}; a "
            "reward model is one for sequence classification"
        )
    if config.num_labels != 1:
        raise UserError(
            f"{key}={source}: it has {config.num_labels} outputs; a reward model has one"
        )
    return config


def load_reward_model(source: str, config: Any, *, key: str) -> Any:
    """Loads the weights of a reward model, in the type they are stored in; safetensors only."""
    return _load_weights(
        AutoModelForSequenceClassification, source, config, key=key, revision="main", dtype="auto"
    )


def _check_index(source: str, *, key: str) -> None:
    """Refuses an index of shards that leads to anything but safetensors of that folder."""
    path = Path(source) / "model.safetensors.index.json"
    if not path.is_file():
        return
    shards = read_json(path).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else set()
    if not names:
        raise UserError(f"{key}={source}: its {path.name} names no weights, or is damaged")
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"{key}={source}: its {path.name} names {shown(name)}, and weights are read from "
                "*.safetensors of that folder alone"
            )
        if not (Path(source) / name).is_file():
            raise UserError(
                f"{key}={source}: its {path.name} names {shown(name)}, which is missing"
            )


def _load_weights(kind: Any, source: str, config: Any, *, key: str, **options: Any) -> Any:
    _check_index(source, key=key)
    name = f"{key}={source}"
    check_has_weights(source, key=key)
    try:
        model, info = kind.from_pretrained(
            source,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            # Else the error names none of them.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise load_error(f"{name}: no weights", error, remedy=f"{key}=") from error
    check_weights(model, info, name=name, remedy=f"name another with {key}=")
    return model


def check_has_weights(source: str, *, key: str) -> None:
    """Refuses a folder whose weights are in no format that is loaded."""
    fault = missing_weights(Path(source)) if Path(source).is_dir() else None
    if fault is not None:
        raise UserError(f"{key}={source}: {fault}")


def check_weights(model: Any, info: Mapping[str, Any], *, name: str, remedy: str) -> None:
    """Refuses weights that were left at random or are no numbers, and says which had no place.

    Args:
        model: The loaded model.
        info: What transformers tells of the loading.
        name: The config key and its value, for errors.
        remedy: What to do.
    """
    kind = model.config.model_type
    missing = sorted(info["missing_keys"]) + sorted(map(_mismatch, info["mismatched_keys"]))
    if missing:
        raise UserError(
            f"{name}: {len(missing)} weights are missing or of another shape, {missing[0]} "
            f"first: this is not a whole {kind} model by its config.json; {remedy}"
        )
    for own, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not _finite(tensor):
            raise UserError(
                f"{name}: its weight {own} has values that are no numbers (nan or inf): the "
                f"training that wrote it diverged, or the file is damaged; {remedy}"
            )
    unread = sorted(str(own) for own in info.get("unexpected_keys") or ())
    if unread:
        log.warning(
            "%s: %d weights of the files have no place in a %s model of this config.json and are "
            "not used, %s first",
            *(name, len(unread), kind, unread[0]),
        )


def _mismatch(found: Any) -> str:
    """A weight with its two shapes, as far as transformers tells them."""
    name, *shapes = found if isinstance(found, tuple | list) else [found]
    if len(shapes) != 2:
        return str(name)
    stored, wanted = (tuple(shape) for shape in shapes)
    return f"{name} ({stored} in the files, {wanted} by the config)"


def _finite(tensor: torch.Tensor) -> bool:
    """True if all values are numbers; the extremes tell, and take no memory."""
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    values = tensor.detach()
    # Types of one byte have no extremes.
    least, most = (values if values.element_size() > 1 else values.float()).aminmax()
    return bool(least.isfinite() & most.isfinite())


def meta_model(config: Any, *, dtype: torch.dtype | None = None) -> Any:
    """A model without weights, which has the shapes of all that it would hold."""
    try:
        with torch.device("meta"):
            # transformers writes its choice of attention into the config that it is given.
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    except Exception as error:  # whatever a family raises about its config
        raise build_error(config, error) from error


def random_model(config: Any, *, dtype: torch.dtype, seed: int) -> Any:
    """A randomly initialised model, for tests and benchmarks at any size without a download."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(without_dropout(config), dtype=dtype)


def adopt_special_tokens(config: Any, tokenizer: Any) -> None:
    """Gives a random model's config the special tokens of the tokenizer that it is used with."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))


def max_positions(config: Any) -> int | None:
    """The longest sequence a model was built for, in tokens; None when its config names none."""
    text_config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_same_vocabulary(policy: Any, reference: Any, tokenizer: Any, *, source: str) -> None:
    """Refuses a reference that reads the same ids as other words.

    Args:
        policy: The policy's config.
        reference: The reference's config.
        tokenizer: The policy's tokenizer.
        source: The reference's folder or hub id.
    """
    sizes = [config.get_text_config().vocab_size for config in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"reference.pretrained={source}: its vocabulary has {sizes[1]} tokens, the policy's "
            f"{sizes[0]}; name a reference of the same family"
        )
    own = load_tokenizer(source, key="reference.pretrained")
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"reference.pretrained={source}: its tokenizer has another vocabulary than the "
            "policy's; name a reference of the same family"
        )


def weights_hash(model: Any) -> str:
    """A hash of all weights: names, shapes, dtypes and bytes; 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(data.shape)}{data.dtype}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_error(what: str, error: Exception, *, remedy: str) -> UserError:
    """Turns an error of a folder or the hub into one line with a remedy."""
    text = " ".join(str(error).split())
    lowered = text.lower()
    offline = ("couldn't connect", "can't load", "offline", "not find", "connection", "resolve")
    if "gated" in lowered or "401" in lowered:
        return UserError(f"{what}: the hub wants you to log in for it (hf auth login)")
    if "trust_remote_code" in lowered:
        return UserError(
            f"{what}: its files ask for code of its own (auto_map), which is never run here; name "
            f"a model of a kind that transformers itself knows, with {remedy}"
        )
    if any(word in lowered for word in offline):
        return UserError(
            f"{what}: not a local folder with it, not in the local cache, and the hub did not "
            f"serve it; name a local folder with {remedy}"
        )
    return UserError(f"{what}: {text[:300]}; name another with {remedy}")
