"""Claims on a trial's folder, kept in the folder itself, for machines that share it.

Two small files: the *order* is written by the sweep alone and names the attempt that counts; the
*claim* is written by the runner on the node that carries the order out. A runner whose order or
claim is no longer the one in the folder ends its trial at once. A runner that finds the claim of
another takes it over, and starts only when the other is gone: seen to be gone where both run on one
machine, else after longer than the other needs to notice.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from pathlib import Path
from typing import Any

from dpo_lightning.files import read_json, write_json
from dpo_lightning.processes.groups import group_lives
from dpo_lightning.processes.ownership import birth, is_alive, machine

_ORDER = ".order.json"
_CLAIM = ".claim.json"
_PART = ".rank-{}.json"

CHECK_SECONDS = 1.0
"""How often a runner looks at the two files."""

TAKE_OVER_SECONDS = 30.0
"""How long another's trial may need to end once its claim was taken over."""


class Taken(Exception):
    """Another runner's processes are still at work in the folder."""


def give_order(folder: Path) -> str:
    """Writes a new order; whoever carries out an older one stops.

    Returns:
        Its name.
    """
    attempt = uuid.uuid4().hex
    write_json(folder / _ORDER, {"attempt": attempt, "given": time.time()})
    return attempt


def note_job(folder: Path, attempt: str, job: str) -> None:
    """Notes in an order which job of a cluster carries it out."""
    write_json(folder / _ORDER, {"attempt": attempt, "job": job})


def withdraw_order(folder: Path) -> None:
    """Withdraws the folder's order, so that its runner stops the trial."""
    write_json(folder / _ORDER, {"attempt": None})


def stop_other(folder: Path) -> None:
    """Stops an earlier command's job that is at work in a folder, and waits until it is gone.

    Raises:
        Taken: If its processes do not end.
    """
    if order(folder).get("attempt") is None:
        return
    withdraw_order(folder)
    claim = read_json(folder / _CLAIM)
    if claim.get("state") == "open":
        _wait_until_gone(claim)


def order(folder: Path) -> dict[str, Any]:
    """The folder's order: ``attempt``, and when it was ``given`` or, once known, its ``job``."""
    return read_json(folder / _ORDER)


def claim_of(folder: Path, attempt: str) -> dict[str, Any]:
    """The claim of an attempt's runner; empty while there is none.

    Returns:
        ``run`` (names this start), ``starts`` (of this attempt so far), ``devices``, and ``state``:
        ``open``, ``left`` (its processes are gone, it may start again) or ``ended``, then with
        ``exit_code`` and ``reason``.
    """
    claim = read_json(folder / _CLAIM)
    return claim if claim.get("attempt") == attempt else {}


class ClaimReader:
    """Follows how an attempt fares on its node; looks at most every second.

    Args:
        folder: The trial's.
        attempt: The order.
    """

    def __init__(self, folder: Path, attempt: str) -> None:
        self._folder = folder
        self._attempt = attempt
        self._claim: dict[str, Any] = {}
        self._looked = -math.inf

    def look(self, *, now: bool = False) -> dict[str, Any]:
        """Returns the newest answer of :func:`claim_of`."""
        time_now = time.monotonic()
        if now or time_now - self._looked >= CHECK_SECONDS:
            self._looked = time_now
            # One that cannot be read just now is as it was.
            self._claim = claim_of(self._folder, self._attempt) or self._claim
        return self._claim


class Claim:
    """The right of one runner to a trial's folder.

    Args:
        folder: The trial's.
        attempt: The order that it carries out.
        run: Name of this start; all tasks of a job share it.
    """

    def __init__(self, folder: Path, attempt: str, run: str) -> None:
        self._folder = folder
        self._attempt = attempt
        self._run = run
        self._content: dict[str, Any] = {}

    def is_ordered(self) -> bool:
        """True if the order still counts; one that cannot be read just now does."""
        return bool(order(self._folder).get("attempt", self._attempt) == self._attempt)

    def is_withdrawn(self) -> bool:
        """True if the sweep wants the end of the trial, and no other start of it."""
        return order(self._folder).get("attempt", self._attempt) is None

    def take(self, devices: list[str]) -> int:
        """Takes the folder, from another runner if there is one, and waits until that is gone.

        Args:
            devices: Devices that this runner runs on, as a reader knows them.

        Returns:
            Number of times that this attempt was started so far, with this start.

        Raises:
            Taken: If the other's processes do not end.
        """
        other = read_json(self._folder / _CLAIM)
        starts = other.get("starts", 0) if other.get("attempt") == self._attempt else 0
        self._content = {
            "state": "open",
            "attempt": self._attempt,
            "run": self._run,
            "starts": starts + 1,
            "devices": devices,
            "machine": machine(),
            "runner": birth(os.getpid()),
        }
        self._write()
        if other.get("state") == "open":
            _wait_until_gone(other)
            now = read_json(self._folder / _CLAIM)
            if now.get("run") == other.get("run") and now.get("state") != "ended":
                self._write()  # the other noted something between its last look and its end
        return starts + 1

    def note_group(self, group: int) -> None:
        """Notes the process group of the trial."""
        self._note(group=birth(group))

    def holds(self) -> bool:
        """True if order and claim are still this runner's.

        A runner whose order was given anew while it took the folder may have put its claim there;
        that is put right.
        """
        if not self.is_ordered():
            return False
        if read_json(self._folder / _CLAIM).get("run", self._run) != self._run:
            if not self._may_write():
                return False
            self._write()
        return True

    def _may_write(self) -> bool:
        """True if the folder's claim is this runner's, or of an order that does not count."""
        claim = read_json(self._folder / _CLAIM)
        return bool(
            claim.get("run") == self._run
            or claim.get("attempt") != self._attempt == order(self._folder).get("attempt")
        )

    def is_open(self) -> bool:
        """True if the runner of the first rank has begun this start and not ended it."""
        claim = read_json(self._folder / _CLAIM)
        return claim.get("run") == self._run and claim.get("state") == "open"

    def leave(self) -> None:
        """Notes that the trial's processes are gone, though it has not ended."""
        self._note(state="left")

    def end(self, exit_code: int | None, *, reason: str | None = None) -> None:
        """Notes that the trial has ended."""
        self._note(state="ended", exit_code=exit_code, reason=reason)

    def _note(self, **content: Any) -> None:
        # Another runner may hold the folder by now.
        if self._content and self._may_write():
            self._content |= content
            self._write()

    def end_part(self, rank: int, exit_code: int) -> None:
        """Notes that another rank than the first has ended."""
        write_json(self._folder / _PART.format(rank), {"run": self._run, "exit_code": exit_code})

    def failed_part(self) -> int | None:
        """The exit code of another rank that failed."""
        for path in self._folder.glob(_PART.format("*")):
            part = read_json(path)
            if part.get("run") == self._run and part.get("exit_code"):
                return int(part["exit_code"])
        return None

    def _write(self) -> None:
        write_json(self._folder / _CLAIM, self._content)


def _wait_until_gone(claim: dict[str, Any]) -> None:
    """Waits until another runner and its trial are gone.

    Raises:
        Taken: If they are seen to stay.
    """
    deadline = time.monotonic() + TAKE_OVER_SECONDS
    if claim.get("machine") != machine():
        # Nothing is seen of it from here; a runner that lives looks at its claim often enough.
        time.sleep(TAKE_OVER_SECONDS)
        return
    group = claim.get("group")
    while _is_alive(group, group=True) if group else _is_alive(claim.get("runner")):
        if time.monotonic() > deadline:
            if group:
                raise Taken(f"process group {group[0]} of an earlier start still writes there")
            return  # it has no trial, and has looked at its claim by now
        time.sleep(0.1)


def _is_alive(process: list[int] | None, *, group: bool = False) -> bool:
    if process is None:
        return False
    if not group:
        return is_alive(process)
    pid, born = process
    try:
        os.kill(pid, 0)
        if birth(pid)[1] != born:
            return False  # the number is another's by now
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    return group_lives(pid)
