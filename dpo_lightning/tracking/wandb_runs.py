"""Runs in wandb: begun offline where the server does not answer, found again, ended. No torch."""

from __future__ import annotations

import logging
import os
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from dpo_lightning.errors import UserError
from dpo_lightning.settings.names import slug
from dpo_lightning.tracking.logger_settings import LoggerSettings
from dpo_lightning.tracking.rows import Known, known_values, rows_of_file

log = logging.getLogger(__name__)

STEP = "trainer/global_step"
"""Everything is drawn over optimizer steps."""

SYNC = "wandb sync "
"""Beginning of the command that uploads what was recorded offline."""

# How long a run waits for a server that takes it and then says nothing: at its start, and at its
# end for what is not uploaded yet. What is recorded in its folder can be uploaded later.
_INIT_SECONDS = 60.0
_FINISH_SECONDS = 120.0

_ID_FILE = Path("wandb", "id.txt")
_TAGGED = Path("wandb", "pruned")

PRUNED = "pruned"
"""Tag of the runs of trials that their sweep stopped early."""

_PROJECT = "dpo-lightning"
# As wandb and transformers read them.
_MODES = {"dryrun": "offline", "run": "online", "shared": "online"}
_TRUE = ("1", "on", "yes", "true")

TRIAL_PREFIX = "WANDB_TRIAL_PREFIX"
"""Environment variable with what the names of a sweep's trials in wandb begin with."""


def ready_for_trials() -> None:
    """Takes the id and the name of one run, which no two trials can have, from the environment.

    A name becomes the beginning of all trials' names.
    """
    if os.environ.pop("WANDB_RUN_ID", None):
        log.warning("WANDB_RUN_ID names one run: the trials of a sweep have ids of their own")
    if name := os.environ.pop("WANDB_NAME", None):
        os.environ[TRIAL_PREFIX] = name


def start_run(
    settings: LoggerSettings,
    *,
    run_name: str,
    folder: Path,
    config: Mapping[str, Any],
    continued: bool,
    run_id: str | None = None,
    job_type: str | None = None,
) -> Any:
    """Begins a run, or goes on with the one that the folder belongs to.

    Args:
        settings: The ``logger`` group.
        run_name: Name of the run.
        folder: Where its files and its id go.
        config: Its configuration.
        continued: True if what is logged goes on from what the folder's run had.
        run_id: The run to go on with where the folder has none.
        job_type: What kind of run it is.

    Returns:
        wandb's run, None where wandb is switched off.

    Raises:
        UserError: If wandb cannot start even offline.
    """
    import wandb

    own_id = continued_id(folder, continued=continued, other=run_id)
    finish_timeout = float(os.environ.get("WANDB_FINISH_TIMEOUT") or _FINISH_SECONDS)

    def start(mode: str) -> Any:
        return _init(
            settings,
            finish_timeout,
            mode=mode,
            id=own_id,
            name=_name(settings, run_name, folder),
            job_type=job_type,
            # What writes there may be a process of a parent's, which has another current folder.
            dir=folder.absolute(),
            config=dict(config),
        )

    try:
        mode = wandb_mode(settings.mode)
        if mode == "disabled":
            return None
        run = _start_or_record(start, mode, refused=wandb.Error)
    except Exception as error:  # whatever its environment, files and settings hold
        raise UserError(
            f"logger=wandb: {' '.join(str(error).split())}; logger=csv or logger=none goes without"
        ) from error
    return run


def start_logged(
    settings: LoggerSettings,
    *,
    run_name: str,
    folder: Path,
    config: Mapping[str, Any],
    facts: Mapping[str, Any],
    earlier: Path | None,
    run_id: str | None,
) -> tuple[Any, Known] | None:
    """Begins the run of an experiment, its axes and columns defined.

    Args:
        settings: The ``logger`` group.
        run_name: Name of the run.
        folder: The run's folder.
        config: The resolved configuration.
        facts: Columns of its summary that are known by now.
        earlier: Folder of the run that it goes on with exactly; None where it is another one.
        run_id: The run in wandb that it goes on with where the folder has none.

    Returns:
        wandb's run, and the values that it has already; None where wandb is switched off.

    Raises:
        UserError: If wandb cannot start even offline.
    """
    continued = earlier is not None
    goes_on = continued_id(folder, continued=continued, other=run_id) is not None
    known = known_values(rows_of_file(earlier)) if earlier is not None and goes_on else {}
    run = start_run(
        settings,
        run_name=run_name,
        folder=folder,
        config=config,
        continued=continued,
        run_id=run_id,
    )
    if run is None:
        return None
    # Axes are defined before anything is logged: later, it has no effect on what is there.
    run.define_metric(STEP)
    for prefix in ("train", "eval", "controlled", "samples"):
        run.define_metric(f"{prefix}/*", step_metric=STEP)
    run.summary.update(dict(facts))
    return run, known


def keep_model(run: Any, folder: Path) -> None:
    """Keeps an exported model as an artifact of a run.

    Args:
        run: wandb's run.
        folder: The export.
    """
    import wandb

    artifact = wandb.Artifact(slug(f"{run.name}-model"), type="model")
    artifact.add_dir(str(folder))
    run.log_artifact(artifact)


def note_run(folder: Path, run_id: str) -> None:
    """Notes which run in wandb a folder belongs to, for a run that goes on there."""
    (folder / _ID_FILE).parent.mkdir(exist_ok=True)
    (folder / _ID_FILE).write_text(f"{run_id}\n")


def _init(settings: LoggerSettings, finish_timeout: float, **arguments: Any) -> Any:
    """Wandb's own start of a run."""
    import wandb

    return wandb.init(
        project=settings.project or os.environ.get("WANDB_PROJECT") or _PROJECT,
        # What is None wandb reads from the environment.
        entity=settings.entity,
        group=settings.group,
        tags=list(settings.tags) or None,
        resume="allow",
        settings=wandb.Settings(
            silent=True,
            init_timeout=_INIT_SECONDS,
            finish_timeout=finish_timeout,
            finish_timeout_raises=True,
        ),
        **arguments,
    )


def _start_or_record(start: Callable[[str], Any], mode: str, *, refused: type[Exception]) -> Any:
    """A run in that mode, or offline where the server refuses it."""
    try:
        return start(mode)
    except refused as error:
        if mode != "online":
            raise
        log.warning(
            "wandb: the server refused this run, so it is recorded offline (%s)",
            " ".join(str(error).split()),
        )
        return start("offline")


def continued_id(folder: Path, *, continued: bool, other: str | None) -> str | None:
    """The id of the run to go on with; None for a new one.

    Args:
        folder: The run's folder, which may have an id.
        continued: True if what is logged goes on from what that run had.
        other: The id where the folder has none.
    """
    # An agent of wandb's own sweeps has chosen one already.
    if not continued or "WANDB_RUN_ID" in os.environ:
        return None
    try:
        return (folder / _ID_FILE).read_text().strip() or other
    except OSError:
        return other


def _name(settings: LoggerSettings, run_name: str, folder: Path) -> str:
    """The name of the run in wandb: the one that was set, that of the environment, our own."""
    if settings.run_name is not None:
        return run_name
    if prefix := os.environ.get(TRIAL_PREFIX):
        return f"{prefix}-{folder.resolve().name}"
    return os.environ.get("WANDB_NAME") or run_name


def _mode_of_environment() -> str:
    """The mode that the environment asks for; ``auto`` where it asks for none."""
    if os.environ.get("WANDB_DISABLED", "").lower() in _TRUE:
        log.info("wandb: switched off by WANDB_DISABLED")
        return "disabled"
    asked = os.environ.get("WANDB_MODE", "").lower()
    asked = _MODES.get(asked, asked)
    return asked if asked in ("online", "offline", "disabled") else "auto"


def wandb_mode(mode: str) -> str:
    """Resolves ``logger.mode``: online only where one is logged in and the server answers.

    A run is not ended for want of its dashboard: it is recorded offline then, and that is said.
    ``WANDB_MODE`` and ``WANDB_DISABLED`` in the environment decide for ``auto``, as users expect.
    """
    if mode == "auto":
        mode = _mode_of_environment()
    if mode not in ("auto", "online"):
        return mode
    import wandb

    # Who asked for online should not miss it.
    level = logging.WARNING if mode == "online" else logging.INFO
    if not _logged_in(wandb):
        log.log(
            level,
            "wandb: not logged in, so this run is recorded offline (wandb login changes that)",
        )
        return "offline"
    host, answers = _ask_server(wandb)
    if not answers:
        log.log(level, "wandb: %s does not answer, so this run is recorded offline", host)
        return "offline"
    return "online"


@dataclass(frozen=True, slots=True)
class ServerState:
    """State of the wandb server.

    Attributes:
        host: Its name.
        answers: True if it answers, or a proxy stands before it.
        logged_in: True if there is a key for it.
    """

    host: str
    answers: bool
    logged_in: bool


def server_state() -> ServerState:
    """Asks for the server that runs would be sent to."""
    import wandb

    host, answers = _ask_server(wandb)
    return ServerState(host, answers, _logged_in(wandb))


def _ask_server(wandb: Any) -> tuple[str, bool]:
    """Name of the server, and True if it answers."""
    server = urlparse(wandb.setup().settings.base_url)
    host, port = server.hostname or "", server.port or (443 if server.scheme == "https" else 80)
    through_proxy = any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    if through_proxy and server.scheme == "https":
        return host, True
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError:
        return host, False
    return host, True


def _logged_in(wandb: Any) -> bool:
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.Error:  # such as a key that none can be
        return False


def finish_run(run: Any, *, summary: Mapping[str, Any], exit_code: int) -> str:
    """Ends a run, however it went, and returns how to find it.

    Args:
        run: wandb's run.
        summary: Values for its summary.
        exit_code: What it ended with.
    """
    sync = _sync_run(Path(run.settings.sync_dir), run.id)
    where = sync if run.offline else run.url
    try:
        run.summary.update(dict(summary))
        run.finish(exit_code=exit_code)
    except Exception as error:  # of many kinds, and none is worth the result of a run
        reason = "the server stopped answering" if isinstance(error, TimeoutError) else error
        log.warning("wandb: %s; what is not uploaded is in the run's folder: %s", reason, sync)
        return sync
    return str(where)


def _sync_run(recorded: Path, run_id: str) -> str:
    """The command that uploads a run with its earlier sessions, which wandb records apart."""
    sessions = list(recorded.parent.glob(f"*run-*-{run_id}"))
    if len(sessions) > 1:
        folder = shlex.quote(short_path(recorded.parent))
        return f"{SYNC}{folder}/*run-*-{run_id}"
    return f"{SYNC}{shlex.quote(short_path(recorded))}"


def sync_command(sweep: Path) -> str | None:
    """The command that uploads all runs of a sweep that were recorded offline; None without any.

    Args:
        sweep: The sweep's folder.
    """
    folder = shlex.quote(short_path(sweep))
    found = [
        f"{folder}/{pattern}"
        for pattern in ("wandb/offline-run-*", "*/wandb/offline-run-*")
        if any(sweep.glob(pattern))
    ]
    return f"{SYNC}{' '.join(found)}" if found else None


def short_path(path: Path) -> str:
    """A path as one would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def tag_pruned(settings: LoggerSettings, trial: Path) -> None:
    """Tags the run of a trial that its sweep has pruned; once, and nothing without a run.

    Args:
        settings: The ``logger`` group of the sweep.
        trial: The trial's folder, inside the sweep's.
    """
    run_id = continued_id(trial, continued=True, other=None)
    mode = wandb_mode(settings.mode)
    if run_id is None or mode == "disabled" or (trial / _TAGGED).exists():
        return
    group = settings.group or os.environ.get("WANDB_RUN_GROUP") or trial.resolve().parent.name
    try:
        run = _init(
            replace(settings, group=group),
            _FINISH_SECONDS,
            mode=mode,
            id=run_id,
            dir=trial.absolute(),
        )
        run.tags = (*(run.tags or ()), PRUNED)
        run.finish()
    except Exception as error:  # of many kinds, and none is worth the end of a sweep
        log.warning("wandb: %s is not tagged as pruned: %s", trial.name, error)
        return
    (trial / _TAGGED).touch()


def untag_pruned(run: Any, trial: Path) -> None:
    """Takes the tag away from the run of a trial that goes on after all."""
    if (trial / _TAGGED).exists():
        run.tags = tuple(tag for tag in run.tags or () if tag != PRUNED)
        (trial / _TAGGED).unlink()


def report_sweep(
    settings: LoggerSettings,
    folder: Path,
    *,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    picture: Path,
    summary: Mapping[str, Any],
) -> str | None:
    """Records a sweep's table and picture as one run of its group.

    Args:
        settings: The ``logger`` group of the sweep.
        folder: The sweep's folder, whose name is the group unless the settings have one.
        columns: Of the table.
        rows: Of the table, one per trial.
        picture: The frontier, a PNG.
        summary: Values for the run's summary.

    Returns:
        How to find it, None where wandb is switched off.

    Raises:
        UserError: If wandb cannot start even offline.
    """
    import wandb

    name = folder.resolve().name
    group = settings.group or os.environ.get("WANDB_RUN_GROUP") or name
    run = start_run(
        replace(settings, group=group, run_name=f"{name}-report"),
        run_name=f"{name}-report",
        folder=folder,
        config={},
        continued=True,
        job_type="report",
    )
    if run is None:
        return None
    note_run(folder, run.id)
    table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
    run.log({"trials": table, "frontier": wandb.Image(str(picture))})
    return finish_run(run, summary=summary, exit_code=0)
