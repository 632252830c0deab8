"""Files of an exported model that leave this machine. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpo_lightning.errors import UserError
from dpo_lightning.settings.credentials import is_secret_text

# What transformers, PEFT and vLLM read, and no code or pickle.
_KINDS = (".safetensors", ".json", ".md", ".jinja", ".txt", ".model")
# Files whose texts are a person's or this project's; a vocabulary may hold anything.
_WRITTEN = ("README.md", "config.json", "generation_config.json", "adapter_config.json")

CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Contents:
    """Files of an export.

    Attributes:
        sizes: Bytes by name, of what goes.
        left_out: Names of what does not.
    """

    sizes: dict[str, int]
    left_out: list[str]

    @property
    def total(self) -> int:
        """Bytes of all that goes."""
        return sum(self.sizes.values())

    def entries(self) -> list[dict[str, int | str]]:
        """The files, as ``--json`` prints them."""
        return [{"name": name, "bytes": size} for name, size in self.sizes.items()]


def contents_of(folder: Path) -> Contents:
    """The files of an export.

    Args:
        folder: The export.

    Raises:
        UserError: If there are no weights, or a file holds what looks like a secret.
    """
    sizes: dict[str, int] = {}
    left_out = []
    for path in sorted(folder.iterdir()):
        if path.suffix in _KINDS and path.is_file() and not path.is_symlink():
            sizes[path.name] = path.stat().st_size
        else:
            left_out.append(path.name)
    if not any(name.endswith(".safetensors") for name in sizes):
        raise UserError(f"{folder}: no weights in safetensors there; name a run that finished")
    for name in _WRITTEN:
        if name in sizes and is_secret_text((folder / name).read_text(errors="replace")):
            raise UserError(
                f"{folder / name}: it holds what looks like a credential, so nothing of it goes; "
                "take that out"
            )
    return Contents(sizes, left_out)


def in_words(count: int) -> str:
    """A size as a person reads it.

    Args:
        count: Bytes.

    Example:
        >>> in_words(999), in_words(2048), in_words(3 << 30)
        ('999 bytes', '2.0 KiB', '3.0 GiB')
    """
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{count} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
