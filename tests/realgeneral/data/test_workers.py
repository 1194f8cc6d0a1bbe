"""Data-loading processes end with the process that trains, whatever state either of them is in."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOADER = """
import time, torch
from torch.utils.data import DataLoader
from realgeneral.data.workers import leave_signals, loaded

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, i):
        time.sleep(3600 if i == stuck else 0)
        return i

stuck = {stuck}
rows = loaded(DataLoader(Rows(), None, num_workers=1, worker_init_fn=leave_signals))
print(next(rows))
{end}
"""


@pytest.mark.parametrize("stuck", [-1, 1])
@pytest.mark.parametrize(("end", "status"), [("", 0), ("1 / 0", 1)], ids=["end", "error"])
def test_a_process_with_workers_exits(stuck: int, end: str, status: int) -> None:
    """A loader that is still open at exit, as in a traceback, with a worker that waits or is stuck."""
    code = LOADER.format(stuck=stuck, end=end)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "0\n"
    assert done.returncode == status
    assert done.stderr.strip().splitlines()[-1:] == (["ZeroDivisionError: division by zero"] if status else [])
