"""Layer-by-layer analysis, benchmarks, small experiments, features, and plans of runs."""
