"""Checks of the sources of rows that the settings name. Nothing of them is opened."""

from collections.abc import Iterator

from dpo_lightning.data.source_files import find_source
from dpo_lightning.data.source_names import entries, is_address, is_hub_id, is_local_data
from dpo_lightning.errors import UserError


def source_problems(
    key: str, source: object, *, split: str | None, subset: str | None
) -> Iterator[str]:
    """Yields what is wrong with the names in a value of ``data.train`` or ``data.eval``."""
    paths = [entry.path for entry in entries(source)]
    for path in paths:
        if not is_local_data(path) and not is_hub_id(path) and not is_address(path):
            yield f"{key}={path}: no such file, and a hub id has the form owner/name"
            continue
        try:
            find_source(path, split=split, subset=subset, key=key)
        except UserError as error:
            yield str(error)
    twice = [path for path in dict.fromkeys(paths) if paths.count(path) > 1]
    if twice:
        yield f"{key}: {twice[0]} is in the list twice; its rows would count double; name it once"
