"""Recordings of wandb, read by wandb's own reader of its files."""

import json
from pathlib import Path
from typing import Any


def records(path: Path) -> list[Any]:
    """The records of a ``.wandb`` file, in their order."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(path))
    found = []
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        found.append(record)
    return found


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's history, by the name of what was logged."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows
