"""Hypothesis runs the same examples each time: a failure in CI is a failure here."""

from hypothesis import settings

settings.register_profile("planning", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("planning")
