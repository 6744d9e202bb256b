"""Measuring, always beside a reference in the same run: machines are noisy, ratios are not."""
