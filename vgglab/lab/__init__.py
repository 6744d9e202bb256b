"""Layer-by-layer analysis, benchmarks, small experiments, feature maps, and planning of runs."""
