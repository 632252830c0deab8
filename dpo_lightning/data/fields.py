"""Account of the fields of rows and messages: each is read, or named as unread, or refused.

What may carry text for the model is never left unread: a value that is not used refuses its row,
unless ``data.ignore_fields`` names it. Everything else is named once.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from dpo_lightning.data.texts import RowError, list_names, printable, show, typed_name

NOT_READ = "(not read)"
"""Stand-in for a value that is too dear to read, such as the bytes of an image."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_FOR_THE_MODEL = _set(
    "system sys developer persona prompt prompts question questions query queries instruction "
    "instructions input inputs problem context contexts document documents passage passages "
    "background knowledge history post trajectory message messages conversation conversations "
    "dialog dialogue dialogues turns tool tools function functions reasoning thinking thought "
    "thoughts image images picture pictures img video videos audio audios attachment attachments"
)
"""Words of a name whose field may hold text, or something else, that the model is to be given."""

_WHOLE_NAMES = frozenset({"name", "text", "value", "prefix", "parts", "refusal"})

_OFTEN_MISTYPED = ("prompt", "system", "system_prompt", "instruction", "context", "tools")

_ABOUT_IT = _set(
    "id ids uid uuid hash model source sources count counts num number n length len score scores "
    "rating ratings type types token tokens lang language labelling generation raw category "
    "domain date time url link idx index config configs params quality difficulty level "
    "intent safety explanation reward version label labels"
)
"""Words that make a name one about the text, and not of the text."""

_HEAVY = _set("image images picture pictures img video videos audio audios pixel pixels")

_PROMPTS = _set(
    "prompt prompts question questions query queries instruction instructions input inputs problem "
    "task context contexts history post trajectory messages conversation conversations dialog "
    "dialogue user human"
)

_ROLE_KEYS = ("role", "from")


@functools.cache
def words_of(name: str) -> frozenset[str]:
    """The words of a name, in small letters."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return frozenset(re.findall(r"[^\W_]+", spaced.lower()))


@functools.cache
def may_be_for_the_model(name: str) -> bool:
    """True if a field of that name may hold what the model is to be given.

    Example:
        >>> [may_be_for_the_model(n) for n in ("system_prompt", "images", "prompt_id", "rating")]
        [True, True, False, False]
    """
    words = words_of(name)
    if name.lower() in _WHOLE_NAMES:
        return True
    mistyped = get_close_matches(name.lower(), _OFTEN_MISTYPED, cutoff=0.85)
    return bool((words & _FOR_THE_MODEL or mistyped) and not words & _ABOUT_IT)


@functools.cache
def may_be_the_prompt(name: str) -> bool:
    """True if a column of that name may hold the prompt, its name mistyped perhaps."""
    words = words_of(name)
    if words & _ABOUT_IT:
        return False
    return bool(words & _PROMPTS or get_close_matches(name.lower(), ["prompt"], cutoff=0.7))


def is_heavy(name: str) -> bool:
    """True if a column of that name holds what takes long to read and is no text."""
    return bool(words_of(name) & _HEAVY and not words_of(name) & _ABOUT_IT)


def leaves(value: object) -> Iterator[tuple[str, object]]:
    """Each value inside a value of any depth, with the key that it stands under, in its order."""
    waiting: list[tuple[str, object]] = [("", value)]
    while waiting:
        key, item = waiting.pop()
        if isinstance(item, dict):
            waiting += reversed([(str(name), inner) for name, inner in item.items()])
        elif isinstance(item, list | tuple):
            waiting += reversed([(key, inner) for inner in item])
        else:
            yield key, item


def is_empty(value: object) -> bool:
    """True if there is nothing in a value: a null, a blank text, or no more than those inside."""
    if value is None or isinstance(value, bool | int | float):
        return value is None
    return not any(
        item is not None and not (isinstance(item, str | bytes) and not item.strip())
        for _, item in leaves(value)
    )


def texts_of(value: object) -> set[str]:
    """The texts inside a value, names of roles apart."""
    return {
        item.strip()
        for key, item in leaves(value)
        if isinstance(item, str) and key not in _ROLE_KEYS and item.strip()
    }


def holds_text(value: object) -> bool:
    """True if there is text, or bytes, inside a value."""
    return any(isinstance(item, str | bytes) and item.strip() for _, item in leaves(value))


class UnusedField(RowError):
    """A field may be for the model and is not used.

    Attributes:
        name: Its name, as ``data.ignore_fields`` takes it.
        remedy: The ways out.
    """

    def __init__(self, field: str, name: str, hint: str = "") -> None:
        self.name = name
        ways = [hint] if hint else []
        ways.append(f"leave it out with 'data.ignore_fields=[{typed_name(name)}]'")
        self.remedy = ", or ".join(ways)
        super().__init__(field, f"may be for the model and is not used; {self.remedy}")


_HINTS = {
    "system": "map it with 'data.columns={{system: {0}}}' if it is the system message",
    "tool": "map it with 'data.columns={{tools: {0}}}' if it lists the tools",
    "input": "map it with 'data.columns={{input: {0}}}' if it is to follow the prompt",
}


def _hint(name: str) -> str:
    words = words_of(name)
    if words & {"system", "sys", "developer", "persona"}:
        kind = "system"
    elif words & {"tool", "tools", "function", "functions"}:
        kind = "tool"
    elif words & {"input", "inputs", "context", "contexts", "passage", "document"}:
        kind = "input"
    else:
        return ""
    return _HINTS[kind].format(typed_name(name))


class FieldAccount:
    """Fields of a source's rows, and what became of each.

    Args:
        ignored: ``data.ignore_fields``: columns, and keys of messages as ``messages.<key>``.

    Attributes:
        met: Those of ``ignored`` that a row had.
        said: Counts of rows by what was inferred or changed in them.
        unread: Counts of rows by the name of a field that was not read.
        told: Counts of rows by the name of a field whose text is in a field that was read.
        roles: Counts of messages by a role's name and the one that it was read as.
    """

    def __init__(self, ignored: Iterable[str] = ()) -> None:
        self.ignored = frozenset(ignored)
        self.met: set[str] = set()
        self.said: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()
        self.told: Counter[str] = Counter()
        self.roles: Counter[tuple[str, str]] = Counter()

    def ignores(self, name: str) -> bool:
        """True if the user wants nothing of the field."""
        if name not in self.ignored:
            return False
        self.met.add(name)
        return True

    def close(self, row: dict[str, object], used: Iterable[str], place: str = "") -> None:
        """Accounts for the columns of a row that were not used.

        Args:
            row: The row.
            used: The columns that were used.
            place: Name of an object inside the row whose keys they are, with a dot.

        Raises:
            UnusedField: If one may be for the model and has what is used nowhere else.
        """
        known = used if isinstance(used, set | frozenset) else set(used)
        texts: set[str] | None = None
        for column, value in row.items():
            if column in known:
                continue
            name = f"{place}{column}"
            if self.ignores(name) or is_empty(value):
                continue
            if may_be_for_the_model(column) and (holds_text(value) or is_heavy(column)):
                if texts is None:
                    texts = texts_of([row[other] for other in known if other in row])
                if is_heavy(column) or not _is_told(texts_of(value), texts):
                    raise UnusedField(printable(name), name, "" if place else _hint(column))
                self.told[name] += 1
            else:
                self.unread[name] += 1

    def notes(self, where: str) -> list[str]:
        """Lines about what was not read."""
        lines = []
        if self.told:
            names = list_names(sorted(self.told))
            lines.append(f"{where}: not read, since what is read has their text: {names}")
        if self.unread:
            names = list_names(sorted(self.unread))
            lines.append(f"{where}: not read: {names} (data.ignore_fields= silences this)")
        return lines


def _is_told(texts: set[str], known: set[str]) -> bool:
    """True if each text stands in a known one, as words of its own."""
    for text in texts - known:
        pattern = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")
        if not any(text in other and pattern.search(other) for other in known):
            return False
    return True


def misses(ignored: Iterable[str], met: Iterable[str], there: Iterable[str]) -> list[str]:
    """Lines about names of ``data.ignore_fields`` that no row has."""
    met, there = set(met), list(there)
    lines = []
    for name in ignored:
        if name not in met:
            near = get_close_matches(name, there, n=1)
            hint = f"; did you mean {show(near[0])}?" if near else ""
            lines.append(f"data.ignore_fields: no row has {show(name)}{hint}")
    return lines
