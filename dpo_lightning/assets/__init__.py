"""Files that ship with the package."""

from pathlib import Path

BUNDLED_MODEL: Path = Path(__file__).parent / "tiny_llama"
"""The bundled tiny Llama and its tokenizer: the reference model of the controlled task."""
