"""What all tests share."""

from __future__ import annotations

import gc
import os

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


@pytest.fixture(autouse=True, scope="module")
def _collections_are_short() -> None:
    """Whoever loads a stage collects garbage, and tests do it thousands of times: what was imported
    by now need not be looked through each time."""
    gc.collect()
    gc.freeze()
