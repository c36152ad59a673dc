"""Property tests have no deadline by the clock, and the same examples in each run."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# By default, an example that takes 0.2 s fails its test, which happens to any test on a busy host.
settings.register_profile(
    "unit",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("unit")
