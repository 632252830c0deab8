"""Writer of a run's page."""

from __future__ import annotations

import logging
from pathlib import Path

from dpo_lightning.errors import UserError
from dpo_lightning.files import METRICS_FILE, REPORT_FILE, RESULT_FILE, write_whole
from dpo_lightning.run.page.colours import variables
from dpo_lightning.run.page.content import make_content
from dpo_lightning.run.page.environment import page_environment, sort_script
from dpo_lightning.run.page.plots import SERIES
from dpo_lightning.settings.credentials import redact
from dpo_lightning.settings.program import typed

log = logging.getLogger(__name__)


def write_run_page(folder: Path) -> Path:
    """Writes the page of a run from the files in its folder.

    Args:
        folder: The run's folder.

    Returns:
        The page's path.

    Raises:
        UserError: If there is no run, or it left no metrics.
        OSError: If the page cannot be written.
    """
    if not (folder / RESULT_FILE).is_file():
        raise UserError(f"{folder}: no {RESULT_FILE} there; name the folder of a run that ended")
    if not (folder / METRICS_FILE).is_file():
        raise UserError(
            f"{folder}: no {METRICS_FILE} there, so there is nothing to draw; name a "
            "run that took a step"
        )
    environment = page_environment()
    page = environment.get_template("run.html").render(
        c=make_content(folder),
        figures={
            "light": variables(SERIES, dark=False),
            "dark": variables(SERIES, dark=True),
        },
        legend=[(name, colour.name) for name, colour in SERIES.items()],
        again=" ".join(typed("report")),
        script=sort_script(environment),
    )
    write_whole(folder / REPORT_FILE, page.encode("utf-8", "replace"), lasting=False)
    return folder / REPORT_FILE


def keep_run_page(folder: Path) -> None:
    """Writes the page of a run that left metrics; one that cannot be written is a line of the log.

    Args:
        folder: The run's folder.
    """
    if not (folder / METRICS_FILE).is_file():
        return
    try:
        write_run_page(folder)
    except Exception as error:  # a run of days must not end in an error of its page
        line = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning("%s: not written: %s", folder / REPORT_FILE, redact(line))
