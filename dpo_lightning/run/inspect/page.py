"""Answer of ``inspect`` as a page of HTML that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo_lightning.errors import UserError
from dpo_lightning.files import write_whole
from dpo_lightning.run.inspect.content import Section
from dpo_lightning.run.inspect.visible import visible
from dpo_lightning.run.page.environment import page_environment


def check_page(path: Path) -> None:
    """Checks that a page can be written, before anything is read.

    Args:
        path: The file.

    Raises:
        UserError: If it cannot be a file there.
    """
    where = f"--html {visible(str(path))}"
    if path.is_dir():
        raise UserError(f"{where}: is a folder; name a file in it, such as {path / 'rows.html'}")
    if not path.parent.is_dir():
        raise UserError(f"{where}: no folder {visible(str(path.parent))}; make it first")


def write_page(path: Path, parts: Sequence[Section], *, command: str) -> None:
    """Writes the page.

    Args:
        path: The file.
        parts: The content.
        command: What was typed.

    Raises:
        UserError: If it cannot be written.
    """
    # Rows are texts of anybody: each of them is escaped.
    environment = page_environment("run/inspect/templates")
    page = environment.get_template("page.html").render(parts=parts, command=visible(command))
    try:
        write_whole(path, page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written: {error.strerror or error}") from error
