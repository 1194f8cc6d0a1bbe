"""Accelerate keeps its settings per process; a trainer with other settings needs them gone."""

from __future__ import annotations

from accelerate.state import AcceleratorState, GradientState, PartialState


def reset_accelerate() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
