"""The images are built once for all compose tests, in the way that users build them."""

from __future__ import annotations

import pytest
from support.containers import BUILD_TIMEOUT_S, Project, require_engine


@pytest.fixture(scope="session")
def images() -> None:
    require_engine()
    Project().compose("build", timeout_s=BUILD_TIMEOUT_S)
