"""Folders that are named as models, seen from outside: what they hold in place of one.

Names and sizes are looked at; of small files the first bytes, which tell a Git LFS pointer, and an
adapter's config for its base model.
"""

import contextlib
import errno
import json
import os
from pathlib import Path

_ADAPTER = "adapter_config.json"
# Of transformers, in a line that is to be typed.
_LOAD = "from_pretrained"
_POINTER = b"version https://git-lfs"
# A pointer has three short lines.
_POINTER_BYTES = 1024
_FILES = ("*.safetensors", "*.json", "*.model", "*.bin", "*.txt", "*.jinja")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_OF_OTHERS = {"*.h5": "TensorFlow", "*.msgpack": "Flax", "*.onnx": "ONNX", "*.npz": "NumPy"}


def found_instead(key: str, path: Path, needs: tuple[str, ...]) -> str | None:
    """Says what stands in the place of a model, and what to do; None if one may be there.

    Args:
        key: The setting.
        path: Its value.
        needs: Files of which one has to be there.
    """
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _GGUF
    if not path.is_dir():
        return None
    closed = _closed(path)
    if closed is not None:
        return f"{closed} cannot be read: {os.strerror(errno.EACCES)}; check its permissions"
    pointer = _pointer(path)
    if pointer is not None:
        return (
            f"{pointer} is a Git LFS pointer and not the file itself; fetch the files with "
            f"`git lfs pull` in {path}"
        )
    if any((path / name).is_file() for name in needs):
        return None
    return _other_folder(key, path, needs)


_GGUF = (
    "a GGUF file holds weights in few bits, for inference; name the folder of the safetensors "
    "weights that it was made from"
)


def _closed(folder: Path) -> str | None:
    """The folder or its first file that is not open to this user."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return "the folder"
    files = sorted(path for pattern in _FILES for path in folder.glob(pattern) if path.exists())
    return next((path.name for path in files if not os.access(path, os.R_OK)), None)


def _pointer(folder: Path) -> str | None:
    """Name of a file of which only a Git LFS pointer is there."""
    for pattern in _FILES:
        for path in sorted(folder.glob(pattern)):
            try:
                if path.stat().st_size <= _POINTER_BYTES and path.read_bytes().startswith(_POINTER):
                    return path.name
            except OSError:
                continue
    return None


def _other_folder(key: str, folder: Path, needs: tuple[str, ...]) -> str:
    """Names what a folder is in place of a model, and how that is used."""
    if (folder / _ADAPTER).is_file() and _ADAPTER not in needs:
        return f"a LoRA adapter and no whole model; {_use_adapter(key, folder)}"
    inside = folder / "model"
    if any((inside / name).is_file() for name in needs):
        return f"a run's folder; the model that it trained is {key}={inside}"
    if (inside / _ADAPTER).is_file() and _ADAPTER not in needs:
        return f"a run's folder; it trained a LoRA adapter: {_use_adapter(key, inside)}"
    if (folder / "checkpoints").is_dir():
        return f"a run's folder without an exported model; resume={folder} finishes the run"
    snapshots = [own for name in needs for own in folder.glob(f"snapshots/*/{name}")]
    if snapshots:
        return f"a folder of the hub's cache; name its {key}={snapshots[0].parent}"
    if any(folder.glob("*.gguf")):
        return _GGUF
    below = [own.parent for name in needs for own in sorted(folder.glob(f"*/{name}"))]
    hint = f"; it is in {key}={below[0]}" if len(below) == 1 else ""
    return f"the folder has no {' or '.join(needs)}{hint}"


def _use_adapter(key: str, folder: Path) -> str:
    if key == "reference.pretrained":
        return f"as the reference it is peft=lora reference.adapter={folder}"
    if key != "model.pretrained":
        return "merge it into its base model (peft.merge=true) and name that"
    base = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        base = json.loads((folder / _ADAPTER).read_text()).get("base_model_name_or_path")
    return f"go on with it: peft=lora peft.adapter={folder} model.pretrained={base or '<its base>'}"


def missing_weights(folder: Path) -> str | None:
    """Says what a folder has in place of safetensors, and what to do; None if it has some."""
    if any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").is_file():
        return None
    pickles = [path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))]
    others = [kind for pattern, kind in _OF_OTHERS.items() if any(folder.glob(pattern))]
    # Settings that trainers leave beside the weights.
    pickles = [name for name in pickles if name != "training_args.bin"]
    if pickles:
        return (
            f"no weights in safetensors: {pickles[0]} is a pickle, which could run code and is not "
            'loaded; if you trust it, convert it with `python -c "from transformers import '
            f"AutoModelForCausalLM as A; A.{_LOAD}('{folder}', "
            f"dtype='auto').save_pretrained('{folder}')\"`"
        )
    if any(folder.glob("*.gguf")):
        return f"no weights in safetensors: {_GGUF}"
    if others:
        return f"no weights in safetensors, only {others[0]}'s; name a folder with *.safetensors"
    return "no weights: the folder has no *.safetensors; name a folder that has"
