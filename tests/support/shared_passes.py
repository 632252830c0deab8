"""Runs whose reference pass has many blocks, with an account of who computed which."""

from collections import Counter
from pathlib import Path

from tests.support.reference_caches import values_in

# Blocks of at most 64 tokens, of which 96 + 40 pairs of a few tokens fill a dozen or more.
BLOCKS = (
    *("plugins=[tests.support.block_log]", "data.micro_batch_tokens=16"),
    *("data.controlled.train_groups=96", "data.controlled.eval_groups=40"),
    *("data.batch_size=16", "trainer.max_steps=6", "evaluation.partition_samples=0"),
)


def environment(folder: Path, *, processes: int = 1, seconds: float = 0.0) -> dict[str, str | None]:
    """Variables by which a run notes its blocks below a folder.

    Args:
        folder: The folder.
        processes: A block begins when so many processes have one.
        seconds: Time that a block takes longer.
    """
    numbers = {"BLOCK_SECONDS": str(seconds), "BLOCK_PROCESSES": str(processes)}
    return {"BLOCK_LOG": str(folder / "blocks.log"), **numbers}


def noted(folder: Path) -> list[tuple[int, str]]:
    """Process and name of each block that was begun, in the order of these beginnings."""
    path = folder / "blocks.log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(pid), name) for pid, name in map(str.split, lines)]


def shares(folder: Path) -> Counter[int]:
    """Blocks that each process began."""
    return Counter(pid for pid, _ in noted(folder))


def assert_each_once(folder: Path, cache: Path) -> None:
    """Asserts that each block that is there was begun once."""
    names = [name for _, name in noted(folder)]
    assert len(names) == len({*names})
    assert {f"{name}.safetensors" for name in names} == values_in(cache).keys()
    assert [*cache.rglob(".*.claim")] == []
