"""A tiny base and adapter that stand for nano."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from realgeneral import RealGeneralPipeline
from realgeneral.model.adapter import save_adapter
from realgeneral.model.adapter_info import adapter_info
from realgeneral.tasks import get_task
from tests.realgeneral.helpers.checkpoints import save_checkpoint, tiny_transformer
from tests.realgeneral.helpers.models import trained_model

SPECS = ("canny", "colouring")


def save_nano_like(folder: Path) -> Path:
    """A folder like nano's: a 64 px base and an adapter."""
    save_checkpoint(folder / "base", "5b")
    tiny_transformer("5b", sample_width=8).save_pretrained(folder / "base" / "transformer")
    model = trained_model(folder / "base", "cached").float()
    model.register_to_config(tasks=tuple(get_task(spec).name for spec in SPECS))
    save_adapter(model, folder / "adapter", adapter_info(model, SPECS, "tiny"))
    return folder


def shorten_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emoji names are longer than the tiny text window."""
    monkeypatch.setattr("realgeneral.data.sources.packaged.caption", lambda concept, style, colours=(): "a red pot")
    monkeypatch.setattr(RealGeneralPipeline, "_subject_embeds", lambda *_: None)
    monkeypatch.setattr("realgeneral.data.samples.subject_span_mask", lambda *_: None)
    monkeypatch.setattr("realgeneral.training.objective.subject_span_mask", lambda *args: torch.zeros(len(args[1]), args[3]))
