"""Several training processes on one machine, each forked from a server that has imported everything already."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["realgeneral.training.train", "tests.realgeneral.helpers.processes"])
# the server has no other way to find the modules it is to import
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@dataclass
class Outcome:
    """What a process returned, or the error that ended it: its class's name, its text, the traceback."""

    value: Any = None
    kind: str = ""
    text: str = ""
    trace: str = ""


def start(function: Callable[..., Any], *args: Any, rank: int = 0, world: int = 1, port: int = 0) -> tuple[Any, Any]:
    """Start one process of a group; returns it and the end of a pipe for its `Outcome`."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_child, args=(sender, rank, world, port, function, args))
    process.start()
    sender.close()
    return process, receiver


def run_processes(function: Callable[..., Any], *args: Any, world: int = 2, seconds: float = 120) -> list[Outcome]:
    """Run `function(rank, *args)` in `world` processes of one group; a group that hangs fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [start(function, rank, *args, rank=rank, world=world, port=port) for rank in range(world)]
    end, outcomes = time.monotonic() + seconds, []
    try:
        for _, receiver in started:
            if not receiver.poll(max(0.0, end - time.monotonic())):
                stacks = "\n".join(stack(*waiting) for waiting in started[len(outcomes) :])
                raise AssertionError(f"hangs; ended: {outcomes}; at:\n{stacks}")
            outcomes.append(receiver.recv())
        for process, _ in started:
            process.join(max(0.1, end - time.monotonic()))
            assert process.exitcode is not None, "a process does not exit"
    finally:
        for process, receiver in started:
            process.kill()
            process.join()
            receiver.close()
    return outcomes


def stack(process: Any, receiver: Any) -> str:
    """Where the threads of a process without an outcome are."""
    if not process.is_alive():
        return "dead"
    os.kill(process.pid, signal.SIGUSR1)
    return os.read(receiver.fileno(), 2**16).decode(errors="replace") if receiver.poll(5) else "no answer"


def _child(sender: Any, rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import warnings

    import torch

    torch.set_num_threads(1)
    # answers even if a thread waits for ever with the GIL
    faulthandler.register(signal.SIGUSR1, sender.fileno())
    # as in pytest, but for what libraries say when a group of processes ends
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # DeepSpeed's calls
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    if world > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS="1",
        )
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        outcome = Outcome(function(*args))
    except BaseException as error:  # Killed too: the test looks at it
        outcome = Outcome(None, type(error).__name__, str(error), traceback.format_exc())
    sender.send(outcome)
    sender.close()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
