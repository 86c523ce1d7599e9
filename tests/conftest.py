"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Other work on the machine must not fail a test: no limits on time, and failures print their seed.
settings.register_profile(
    "unhurried", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unhurried")

# Before torch is imported, here or in a process that a test starts: the models are so small that a
# second thread only waits for the first one, and on a busy machine for very long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# Folders whose tests share a mesh, or images, over their files.
SHARING = ("chaos", "compose")
RUNNING = ("integration", *SHARING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run two at a time (pytest-xdist), those that share processes run one after the
    other: a file of integration, and all of a folder that shares more."""
    for item in items:
        folder = Path(item.path).parent.name
        if folder in RUNNING and item.get_closest_marker("xdist_group") is None:
            name = folder if folder in SHARING else item.path.name
            item.add_marker(pytest.mark.xdist_group(name))
