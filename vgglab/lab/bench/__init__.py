"""Benchmarks, always against a reference in the same run: times are noisy, ratios much less."""
