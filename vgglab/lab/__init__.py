"""Experiments with networks: their cost layer by layer, benchmarks, what they see, what a training will cost."""
