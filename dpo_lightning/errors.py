"""Errors that a user can act on, each with the exit code of the command line.

The message of each is one line: the key or ``file:line``, the value that was found, and the remedy.
"""

from typing import Any

__all__ = [
    "CorruptArtifactError",
    "DivergedError",
    "DpoLightningError",
    "OutOfMemoryError",
    "StorageError",
    "UserError",
]


class DpoLightningError(Exception):
    """Base of the errors below; the command line prints the message, exits with its code."""

    exit_code = 1


class UserError(DpoLightningError):
    """The configuration, the data or a named model cannot be used as given."""

    exit_code = 2


class OutOfMemoryError(UserError):
    """A step needs more memory than the device has; the message says what to turn."""


class DivergedError(DpoLightningError):
    """The loss, the gradient norm or the weights are not finite; nothing of it was saved.

    Attributes:
        report: What is known of the step, plain values; None where nothing is.
    """

    exit_code = 3

    def __init__(self, message: str, report: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = report


class CorruptArtifactError(DpoLightningError):
    """A checkpoint or another file that was written earlier is damaged."""

    exit_code = 4


class StorageError(DpoLightningError):
    """A file of the run cannot be written: the disk is full, or its folder is gone or read-only."""

    exit_code = 2
