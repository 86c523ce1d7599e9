"""What all tests share."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Other work on the machine must not fail a test: no limits on time, and failures print their seed.
settings.register_profile(
    "unhurried", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unhurried")
