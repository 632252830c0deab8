"""Parts of Lightning that are replaced: its signal handlers, its watch over the other ranks."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from dpo_lightning.processes.child_ranks import PARENT, ChildRanks


def take_over(trainer: pl.Trainer, children: ChildRanks) -> None:
    """Replaces Lightning's handling of signals, and of ranks that ended.

    Its handler of SIGTERM sends a message to all ranks, which hangs where they do not all send one;
    and before each step another one asks whether rank 0 had that signal. Our ranks ask each other
    once a step, after the backward pass, about everything at once. Its observer of the other ranks
    kills this one, so that nothing says how the run ended.
    """
    trainer._signal_connector = _NoHandlers(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
    launcher = trainer.strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        trainer.strategy._launcher = _ObservedLauncher(launcher, children)


def start_others(trainer: pl.Trainer) -> None:
    """Starts the other ranks of this machine now, and not when the training begins."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _ObservedLauncher):
        launcher.start()


def _nothing() -> None:
    pass


class _NoHandlers(_SignalConnector):
    """Connector that leaves the signals to their present handlers."""

    def register_signal_handlers(self) -> None:
        """Registers no handlers."""

    def teardown(self) -> None:
        """Does nothing: there is nothing to restore."""


class _ObservedLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks as Lightning does; ``children`` looks after them."""

    def __init__(self, launcher: _SubprocessScriptLauncher, children: ChildRanks) -> None:
        super().__init__(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        self._children = children
        self._port: socket.socket | None = None

    def start(self) -> None:
        """Starts the other ranks, unless they are there."""
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if environment.creates_processes_externally:
            return
        # Until the ranks meet, no other program is to be given the port.
        self._port = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            self._port.bind(("", environment.main_port))
        os.environ[PARENT] = str(os.getpid())
        try:
            self._call_children_scripts()
        finally:
            del os.environ[PARENT]
        self._children.observe(self.procs)

    def launch(
        self, function: Any, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any
    ) -> Any:
        """Starts the other ranks, once, and calls the function."""
        self.start()
        if self._port is not None:
            self._port.close()
            self._port = None
        self._children.meet()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)
