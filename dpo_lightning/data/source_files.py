"""The files behind the name of a source: one, those of a pattern, or those of a folder.

A folder is one that ``datasets`` saved, a clone of a data set, whose files have the names of its
splits, or any other. Nothing is opened but a clone's README. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dpo_lightning.data.source_names import (
    COMPRESSIONS,
    ROW_SUFFIXES,
    data_files,
    is_address,
    is_hub_id,
    is_local_data,
    is_pattern,
    row_suffix,
)
from dpo_lightning.data.texts import list_names, printable
from dpo_lightning.errors import UserError

_SHARD = re.compile(r"(.*?)[-_.](\d{3,})-of-(\d{3,})$")
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
_HEADER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.S | re.M)
_LONGEST_README = 1 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """The place of a source.

    Attributes:
        files: Its files, in their order; none where it is not of files.
        saved: The folder that ``datasets`` saved, or None.
        note: A line to say once; empty where there is nothing to say.
    """

    files: tuple[Path, ...] = ()
    saved: Path | None = None
    note: str = ""

    @property
    def on_hub(self) -> bool:
        """True if it is no place of this machine."""
        return not self.files and self.saved is None


def find_source(source: str, *, split: str | None, subset: str | None, key: str) -> Found:
    """Finds the files of a source.

    A string names a data set of the hub when there is no such path, it looks like an id, and it has
    no suffix of a data file.

    Args:
        source: A path, a pattern of paths, or an id.
        split: The split to take of a folder's files; None takes the only one.
        subset: The part of a folder to take.
        key: The configuration key that ``source`` is a value of, for errors.

    Raises:
        UserError: If there is no such source, or it has no rows that could be read.
    """
    where = f"{key}={printable(source)}"
    if not source.strip():
        raise UserError(f"{where}: empty; name a file ({_any_of(ROW_SUFFIXES)}) or a data set")
    if is_address(source):
        # What follows may be a key.
        shown = re.sub(r"//[^/]*@", "//", source.partition("?")[0])
        where = f"{key}={printable(shown)}"
        raise UserError(f"{where}: addresses are not read; name a file or a data set of the hub")
    try:
        path = Path(source).expanduser()
        if not path.exists():
            if is_pattern(source):
                return _of_pattern(str(path), where)
            if not is_local_data(source) and is_hub_id(source):
                return Found()
            raise UserError(f"{where}: no such file{_hint(path, source, key)}")
        if path.is_dir():
            return _of_folder(path, where, split=split, subset=subset, key=key)
    except PermissionError as error:
        raise UserError(
            f"{where}: {error.strerror}; check its permissions, or name another"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        # Among others: no such user's home, a name that no file can have.
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where}: no such file ({reason})") from error
    if not row_suffix(path.name)[0]:
        suffix = "".join(path.suffixes[-2:] if path.suffix in COMPRESSIONS else [path.suffix])
        found = f"suffix {printable(suffix)}" if suffix else "a name without a suffix"
        raise UserError(f"{where}: {found}, expected {_any_of(ROW_SUFFIXES)}")
    return Found((path,))


def all_files(source: str) -> list[Path]:
    """Every file that a source of this machine may be read from, for a hash of its content."""
    path = Path(source).expanduser()
    if path.is_dir():
        about = [path / "README.md"] if (path / "README.md").is_file() else []
        return [*data_files(path), *about]
    if path.is_file():
        return [path]
    return _matching(str(path))


def _matching(pattern: str) -> list[Path]:
    """The paths of a pattern, in the order of their names."""
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts) - 1)
    found = sorted(Path(*parts[:fixed]).glob(str(Path(*parts[fixed:]))))
    # As in a shell, hidden files are found only by a pattern that begins like them.
    return [path for path in found if parts[-1].startswith(".") or not path.name.startswith(".")]


def _of_pattern(pattern: str, where: str) -> Found:
    found = _matching(pattern)
    files = [path for path in found if path.is_file() and row_suffix(path.name)[0]]
    if not files:
        others = f", but for {list_names(p.name for p in found)}" if found else ""
        raise UserError(
            f"{where}: no file has a name like that{others}; rows are read from files that end in "
            f"{_any_of(ROW_SUFFIXES)}"
        )
    _check_shards(files, where)
    return Found(tuple(files), note=_which(files, where))


def _of_folder(
    folder: Path, where: str, *, split: str | None, subset: str | None, key: str
) -> Found:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return Found(saved=folder)
    listed = _listed(folder, where, split=split, subset=subset, key=key)
    if listed is not None:
        return listed
    files = [p for p in data_files(folder) if not p.name.startswith("dataset_info")]
    if subset is not None:
        files = [p for p in files if subset in p.relative_to(folder).parts[:-1]]
        if not files:
            raise UserError(f"data.subset={printable(subset)}: {where} has no folder of that name")
    if not files:
        raise UserError(
            f"{where}: the folder has no file of rows; they end in {_any_of(ROW_SUFFIXES)}"
        )
    files = _of_split(files, folder, split, where, key)
    kinds = sorted({row_suffix(path.name)[0] for path in files})
    if len(kinds) > 1:
        raise UserError(
            f"{where}: the folder has files of several kinds ({', '.join(kinds)}), maybe of the "
            f"same rows; name those to read, as in '{key}={printable(str(folder))}/*{kinds[0]}'"
        )
    _check_shards(files, where)
    return Found(tuple(files), note=_which(files, where))


def _of_split(
    files: list[Path], folder: Path, split: str | None, where: str, key: str
) -> list[Path]:
    """The files of a split: named like it, or else with its name among their words."""
    names = {path: _split_names(path.relative_to(folder)) for path in files}
    if split is None:
        split = "train"
    exact = [path for path in files if split in names[path]]
    if exact:
        return exact
    words = next((words for words in _SPLITS.values() if split in words), (split,))
    known = {word for group in _SPLITS.values() for word in group}
    near = [path for path in files if _words(names[path]) & set(words)]
    stems = {names[path][-1] for path in near}
    if len(stems) == 1:
        return near
    if not near and split == "train" and not any(_words(names[p]) & known for p in files):
        return files
    there = list_names(dict.fromkeys(names[path][-1] for path in near or files))
    raise UserError(
        f"{key}_split={printable(split)}: {where} has several files that may be meant ({there}); "
        f"name one with {key}_split="
        if near
        else f"{key}_split={printable(split)}: {where} has no such split; there are {there}"
    )


def _split_names(path: Path) -> list[str]:
    """Names that may be a split's: of the folders of a file, and its own without shard's number."""
    stem = path.name.lower()
    suffix, packed = row_suffix(path.name)
    stem = path.name[: len(stem) - len(suffix) - len(packed)]
    shard = _SHARD.match(stem)
    return [*path.parts[:-1], shard.group(1) if shard else stem]


def _words(names: Sequence[str]) -> set[str]:
    return {word for name in names for word in re.split(r"[\W_]+", name.lower())}


def _listed(
    folder: Path, where: str, *, split: str | None, subset: str | None, key: str
) -> Found | None:
    """The files that a clone's README names; None where it names none."""
    config = _config(folder, where, subset)
    if config is None:
        return None
    declared = config.get("data_files")
    wanted = split or "train"
    parts: dict[str, list[str]] = {}
    for item in declared if isinstance(declared, list) else [declared]:
        if isinstance(item, dict) and "path" in item:
            paths = item["path"] if isinstance(item["path"], list) else [item["path"]]
            parts.setdefault(str(item.get("split", "train")), []).extend(map(str, paths))
        elif isinstance(item, str):
            parts.setdefault("train", []).append(item)
    if not parts:
        return None
    if wanted not in parts:
        raise UserError(
            f"{key}_split={printable(wanted)}: {where} has no such split; there are "
            f"{list_names(parts)}"
        )
    files = sorted(
        path
        for pattern in parts[wanted]
        if not Path(pattern).is_absolute() and ".." not in Path(pattern).parts
        for path in folder.glob(pattern)
        if path.is_file() and row_suffix(path.name)[0]
    )
    if not files:
        raise UserError(
            f"{where}: its README names {list_names(parts[wanted])} for the split {wanted}, and "
            "there is no such file; clone it again, with its large files"
        )
    _check_shards(files, where)
    return Found(tuple(files), note=_which(files, where))


def _config(folder: Path, where: str, subset: str | None) -> dict[str, Any] | None:
    import yaml

    try:
        with (folder / "README.md").open(encoding="utf-8") as file:
            header = _HEADER.match(file.read(_LONGEST_README))
        found = yaml.safe_load(header.group(1)) if header else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return None
    configs = found.get("configs") if isinstance(found, dict) else None
    if not isinstance(configs, list):
        return None
    known = {str(c.get("config_name", "default")): c for c in configs if isinstance(c, dict)}
    if subset is not None:
        if subset not in known:
            raise UserError(
                f"data.subset={printable(subset)}: {where} has {list_names(known)}; name one"
            )
        return known[subset]
    chosen = [c for c in known.values() if c.get("default")] or list(known.values())
    if "default" in known and len(chosen) > 1:
        chosen = [known["default"]]
    if len(chosen) > 1:
        raise UserError(f"data.subset=null: {where} has {list_names(known)}; name one of them")
    return chosen[0] if chosen else None


def _check_shards(files: Sequence[Path], where: str) -> None:
    """Raises a UserError if one of the files that belong together is missing."""
    parts: dict[tuple[Path, str, int], set[int]] = {}
    for path in files:
        suffix, packed = row_suffix(path.name)
        shard = _SHARD.match(path.name[: len(path.name) - len(suffix) - len(packed)])
        if shard:
            stem, number, total = shard.group(1), int(shard.group(2)), int(shard.group(3))
            parts.setdefault((path.parent, stem, total), set()).add(number)
    for (parent, stem, total), numbers in parts.items():
        first = 1 if total in numbers else 0
        missing = set(range(first, total + first)) - numbers if total < 100_000 else set()
        if missing:
            raise UserError(
                f"{where}: {len(missing)} of the {total} files {stem}-*-of-* in "
                f"{printable(str(parent))} are missing, the first is number {min(missing)}"
            )


def _which(files: Sequence[Path], where: str) -> str:
    count = f"{len(files)} files" if len(files) > 1 else "1 file"
    return f"{where}: reads {count}: {list_names(path.name for path in files)}"


def _hint(path: Path, source: str, key: str) -> str:
    """Returns a hint at the path that was meant, for one that does not exist."""
    if "," in source:
        listed = ",".join(part.strip() for part in source.split(","))
        return f"; several files are a list: '{key}=[{printable(listed)}]'"
    here = "" if path.is_absolute() else f" (here is {Path.cwd()})"
    if not path.parent.is_dir():
        return f"; there is no directory {printable(str(path.parent))} either{here}"
    near = get_close_matches(path.name, _rows_in(path.parent), n=1, cutoff=0.8)
    if near:
        return f"; did you mean {printable(str(path.with_name(near[0])))}?"
    return f"{here}; name a file ({_any_of(ROW_SUFFIXES)}) in {key}="


def _rows_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if row_suffix(path.name)[0])
    except OSError:
        return []


def _any_of(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"
