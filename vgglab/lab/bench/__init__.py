"""Benchmarks, always against a reference in the same run, because ratios are much less noisy than times."""
