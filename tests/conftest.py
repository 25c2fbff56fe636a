"""Of every test: how long an example takes is no part of its answer (timings are benchmarks)."""

from hypothesis import settings

settings.register_profile("autoplan", deadline=None)
settings.load_profile("autoplan")
