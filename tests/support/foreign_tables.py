"""Settings inside the answers to foreign keys, and in the tables of docs/coming_from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dpo_lightning.objectives.objective import known_losses
from dpo_lightning.settings.keys import is_known, settings
from dpo_lightning.settings.rules import fits
from dpo_lightning.settings.schema import CONF
from tests.support.runs import ROOT

FOLDER = ROOT / "docs" / "coming_from"


def settings_in(text: str) -> list[tuple[str, str]]:
    """Keys and values of the settings that a text names."""
    return re.findall(r"(?<![\w.])([a-z][\w.]*)=(\[<[^>]*>\]|\{[^}]*\}|<[^>]*>|\S*)", text)


def group_options(group: str) -> set[str]:
    """The choices of a group of settings."""
    files = {path.stem for path in (CONF / group).glob("*.yaml")}
    return files | ({*known_losses()} if group == "loss" else set())


def check_settings(text: str) -> None:
    """Each setting of a text exists, and takes the value or the alternatives that are given."""
    for key, value in settings_in(text):
        if key in ("hydra.run.dir", "hydra.verbose"):
            continue
        assert is_known(key), text
        options = re.fullmatch(r"<([\w|-]+\|[\w|-]+)>", value)
        values = options[1].split("|") if options else [value]
        for one in values:
            if one.startswith(("<", "[<", "{")) or not one:
                continue
            if settings()[key].is_section:
                assert one in group_options(key), text
            else:
                told = {"true": True, "false": False, "null": None}.get(one, one)
                number = re.fullmatch(r"\d+(\.\d+)?", one)
                told = (float(one) if "." in one else int(one)) if number else told
                assert told is None or fits(key, told), text
                assert told is not None or settings()[key].optional, text


@dataclass(frozen=True)
class TableRow:
    """A row of a table: keys of theirs, settings of ours in one text each, a remark."""

    page: str
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    remark: str

    @property
    def keys(self) -> set[str]:
        """Keys of the settings of ours."""
        return {key for text in self.ours for key, _ in settings_in(text)}


def rows_of(page: str, text: str) -> list[TableRow]:
    """The rows of the tables whose second column is headed *here* and third *remark*."""
    found, inside = [], False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        parts = [part.strip().replace(r"\|", "|") for part in re.split(r"(?<!\\)\|", line)[1:-1]]
        if parts[1:] == ["here", "remark"]:
            inside = True
        elif inside and set(line) - set("|-"):
            theirs, ours = (re.findall(r"`([^`]+)`", part) for part in parts[:2])
            # A value of theirs follows its setting: `a=1` for `true`.
            values = re.findall(r" for `([^`]+)`", parts[1])
            ours = [text for text in ours if text not in values or "=" in text]
            found.append(TableRow(page, tuple(theirs), tuple(ours), parts[2]))
    return found


def table_rows() -> list[TableRow]:
    """The rows of all pages on coming from another program."""
    return [
        row for path in sorted(FOLDER.glob("*.md")) for row in rows_of(path.name, path.read_text())
    ]
