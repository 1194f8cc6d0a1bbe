"""Worker processes that compile ahead of the process that launches: they fill the cache on disk that all of them share."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, wait
from typing import Any


class Builders:
    """A pool of processes that live until the block ends. Nothing comes back from them: what fails there fails again here.

    Args:
        workers: How many; with 0 or 1 there is no pool, and everything is built where it is launched.
    """

    def __init__(self, workers: int) -> None:
        self.pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # a forked process could not use CUDA
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, context, initializer=_quiet)
            # all start now and import what they need meanwhile; `run` reports those that cannot
            with contextlib.suppress(BrokenExecutor):
                for _ in range(workers):
                    self.pool.submit(int)

    def run(self, work: Callable[..., object], items: Iterable[tuple[Any, ...]], until: float) -> None:
        """Call `work` with each tuple of arguments, side by side, and wait for it.

        Args:
            work: A function of a module.
            items: Arguments.
            until: When to stop waiting, on the monotonic clock. What runs then runs on, and nothing else starts.
        """
        if self.pool is None:
            return
        try:
            futures = [self.pool.submit(_in_time, until, work, item) for item in items]
            done, late = wait(futures, max(0.0, until - time.monotonic()))
            for future in late:
                future.cancel()
            for future in done:
                if isinstance(error := future.exception(), BrokenExecutor):
                    raise error
        except BrokenExecutor as error:
            print(f"  no more workers, launches are built one after the other: {error}", flush=True)
            self.close()

    def close(self) -> None:
        """End the workers at once, whatever they do."""
        if self.pool is None:
            return
        # a long compilation hears of nothing else; kill_workers() came with Python 3.14
        processes = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.pool = None
        for process in processes:
            process.kill()

    def __enter__(self) -> Builders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _quiet() -> None:
    """In a worker: nothing is printed, not by compilers either, and Ctrl-C is left to the parent, which ends the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def _in_time(until: float, work: Callable[..., object], item: tuple[Any, ...]) -> None:
    """In a worker: the pool hands out work before it is begun, which cannot be cancelled any more. The clock is system-wide."""
    if time.monotonic() < until:
        with contextlib.suppress(Exception):
            work(*item)
