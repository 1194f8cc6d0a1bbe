"""The settings of ZeRO-2, and its package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from realgeneral.errors import UsageError
from realgeneral.settings.train import TrainConfig
from realgeneral.training.processes.zero2 import zero_settings
from tests.realgeneral.helpers.deepspeed import ZERO2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"needs a JSON file in --deepspeed-config, got '.*zero2\.json'"),
        ("{", "needs a JSON file in --deepspeed-config"),
        ("[]", "must hold zero_optimization alone"),
        ('{"zero_optimization": {"stage": 2}}', r"whole numbers for \['allgather_bucket_size'"),
        ('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 9, "allgather_bucket_size": 8}}', "of stage 2"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "allgather_bucket_size": 8}}', "whole numbers"),
        (ZERO2.read_text()[:-2] + ', "bf16": {"enabled": true}}', "must hold zero_optimization alone"),
    ],
)
def test_deepspeed_file(tmp_path: Path, text: str | None, message: str) -> None:
    """Only ZeRO-2 and its buckets; the rest are options of train."""
    path = tmp_path / "zero2.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        zero_settings(TrainConfig(engine="deepspeed", deepspeed_config=str(path)))


def test_deepspeed_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to install."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UsageError, match=r"needs the package deepspeed \(pip install 'realgeneral\[deepspeed\]'\), got: "):
        zero_settings(TrainConfig(engine="deepspeed", deepspeed_config=str(ZERO2)))
