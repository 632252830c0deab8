"""Templates of all pages: one head, one style, one script, and what a page adds."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from dpo_lightning.run.page.text import address

SORT = "sort.js"
"""The template of the script that sorts tables of the class ``sortable``."""


def page_environment(
    *folders: str, escape: bool = True, finalize: Callable[[object], str] | None = None
) -> Environment:
    """Templates of a page, and those that all pages share.

    Args:
        folders: The page's own folders of templates, below the package.
        escape: True for HTML, of which no text that is placed is markup.
        finalize: What whatever is placed goes through, where it is not HTML.
    """
    loaders = [PackageLoader("dpo_lightning", own) for own in (*folders, "run/page/templates")]
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=finalize,
    )
    environment.filters["address"] = address
    environment.filters["source"] = _source
    return environment


def sort_script(environment: Environment) -> str:
    """The script of a page with tables to sort, for its entry ``script``.

    Args:
        environment: The page's.
    """
    script: str = environment.get_template(SORT).render()
    return script


def _source(script: str) -> str:
    """The source that a page's policy allows: this very script, by its hash."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
