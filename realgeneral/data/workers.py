"""Data-loading processes of a data loader: their errors, the signals that they get, and their end."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from realgeneral.errors import Failure, UsageError

_deaf: list[BaseProcess] = []


@contextmanager
def from_workers() -> Iterator[None]:
    """Around a data loader: its processes put their traceback before the message of an error, which is taken off."""
    try:
        yield
    except (UsageError, Failure) as error:
        kind = type(error)
        raise kind(str(error).rpartition(f"{kind.__name__}: ")[2].strip()) from None


def loaded(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader with `leave_signals` as `worker_init_fn` yields; its processes end with this one in any case."""
    others = active_children()
    iterator = iter(loader)
    _deaf[:] = [process for process in _deaf if process.is_alive()]
    _deaf.extend(process for process in active_children() if process not in others)
    with from_workers():
        yield from iterator


def leave_signals(worker: int) -> None:
    """In a data-loading process: ignore SIGTERM and SIGINT.

    Launchers and terminals signal the whole process group, but the process that trains still needs its workers for the step
    that runs.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _kill() -> None:
    # at exit multiprocessing sends SIGTERM to the processes of an iterator that still lives (in a traceback, say), and waits
    if _deaf:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each
    for process in _deaf:
        process.kill()
