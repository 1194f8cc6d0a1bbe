"""Data sets in every format that holds rows."""

from __future__ import annotations

import pytest

from tests.realgeneral.helpers.datasets import WRITERS, Writer


@pytest.fixture(params=sorted(WRITERS))
def write(request: pytest.FixtureRequest) -> Writer:
    return WRITERS[request.param]
