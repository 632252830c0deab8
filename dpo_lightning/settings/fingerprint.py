"""Hash of the inputs that decide a run's numbers, taken before loading. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_lightning.data.source_files import all_files
from dpo_lightning.data.source_names import entries, eval_entries, is_local_data
from dpo_lightning.errors import UserError
from dpo_lightning.settings.judging import hashed_evaluation, model_judge
from dpo_lightning.settings.loss_group import own_loss_settings
from dpo_lightning.settings.optimizer_group import own_optimizer_settings
from dpo_lightning.settings.rounds_section import own_rounds
from dpo_lightning.settings.schema import Config

# Where a run is written, watched or helped on does not change what it computes.
NOT_IN_HASH = ("name", "logger", "hydra", "resume", "resume_changed", "overwrite", "debug", "sweep")


def hashed_settings(resolved: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a run's numbers.

    Args:
        resolved: All settings as plain values.
    """
    kept = {key: value for key, value in resolved.items() if key not in NOT_IN_HASH}
    # What the cache holds is keyed by content; where it stands does not matter.
    reference = {k: v for k, v in kept["reference"].items() if k != "cache_dir"}
    if reference.get("sync_every") is None:
        # A reference that stays as it is has no entries of its updates, as runs of before.
        reference = {k: v for k, v in reference.items() if not k.startswith("sync_")}
    trainer = {k: v for k, v in kept["trainer"].items() if k != "memory_check"}
    own = {"reference": reference, "trainer": trainer}
    own |= _own_generation(kept.pop("generation", None))
    own |= own_rounds(kept.pop("rounds", None))
    own |= {"loss": own_loss_settings(kept["loss"])}
    own |= {"evaluation": hashed_evaluation(kept["evaluation"])}
    return kept | own | {"optimizer": own_optimizer_settings(kept["optimizer"])}


def _own_generation(section: dict[str, Any] | None) -> dict[str, Any]:
    """The entry of who draws answers; none for transformers, which runs of before had."""
    if section is None or section["backend"] == "hf":
        return {}
    return {"generation": {name: section[name] for name in ("backend", "model", "options")}}


def settings_hash(config: Config) -> str:
    """A hash of the settings and of the files that they name; 32 hexadecimal digits.

    Row files and plugins count by their content, model folders by the names, sizes and times of
    their files: weights take long to read, and a rerun too many costs less than one too few.

    Raises:
        UserError: If a file cannot be read.
    """
    files: dict[str, Any] = {}
    data = config.data
    template = [] if data.chat_template is None else [data.chat_template]
    question = config.evaluation.judge_prompt
    for key, names in (
        ("data.train", [entry.path for entry in entries(data.train)]),
        ("data.eval", [entry.path for entry in eval_entries(data.eval)]),
        ("data.chat_template", template),
        ("evaluation.judge_prompt", [] if question is None else [question]),
    ):
        for name in filter(is_local_data, names):
            files |= {str(path): _content(path, key) for path in all_files(name)}
    model = config.model
    for source in (
        *(model.pretrained, model.tokenizer, model.config),
        *(config.peft.adapter, config.reference.adapter),
        *(config.reference.pretrained, model_judge(config.evaluation)),
    ):
        if source is not None and Path(source).exists():
            files[source] = _listing(Path(source))
    for plugin in config.plugins:
        path = _plugin_file(plugin)
        if path is not None:
            files[plugin] = _content(path, "plugins")
    text = json.dumps([hashed_settings(asdict(config)), files], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _content(path: Path, key: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        raise UserError(
            f"{key}={path}: {error.strerror}; check its permissions, or name another"
        ) from error


def _listing(path: Path) -> list[tuple[str, int, int]]:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _plugin_file(name: str) -> Path | None:
    """The file of a module, found without importing anything of it."""
    search: list[str] | None = [*sys.path, str(Path.cwd())]
    spec = None
    for end in range(1, name.count(".") + 2):
        spec = importlib.machinery.PathFinder.find_spec(".".join(name.split(".")[:end]), search)
        if spec is None:
            return None
        search = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec is not None and spec.origin is not None else None
