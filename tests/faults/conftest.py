"""The fixtures of realgeneral's tests that faults need."""

from __future__ import annotations

from tests.realgeneral.conftest import _one_thread, fresh_accelerate

__all__ = ["_one_thread", "fresh_accelerate"]
