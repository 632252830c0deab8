"""Names of sources: a file of this machine, an id of the hub, or an address.

Names are only looked at, but for whether there is such a file. Imports nothing heavy.
"""

import re
from pathlib import Path

ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
"""Endings of the files that rows are read from."""

FILE_SUFFIXES = frozenset(ROW_SUFFIXES) | frozenset(
    {".arrow", ".bz2", ".csv", ".feather", ".gz", ".ndjson", ".pkl", ".pt", ".tar", ".tsv", ".txt"}
    | {".xlsx", ".xz", ".yaml", ".yml", ".zip", ".zst"}
)
"""Those, and endings of files that people have rows in and that are not read: no data set's."""

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def is_hub_id(source: str) -> bool:
    """True if a name has the form of a model's or a data set's on the hub.

    Example:
        >>> is_hub_id("owner/name"), is_hub_id("gpt2"), is_hub_id("a/b/c"), is_hub_id("-x")
        (True, True, False, False)
    """
    return _HUB_ID.fullmatch(source) is not None


def is_local_data(source: str) -> bool:
    """True if a data source names a file of this machine, and not a hub data set."""
    return (
        source.startswith((".", "/", "~"))
        or Path(source).suffix.lower() in FILE_SUFFIXES
        or Path(source).exists()
    )


def is_address(source: str) -> bool:
    """True if the name is an address in a network."""
    return "://" in source
