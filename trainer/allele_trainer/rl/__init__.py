"""Samples to packed micro-batches, and the token losses. Algorithms (advantages, cohorts) live in the driver."""
