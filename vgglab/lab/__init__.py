"""Layer-by-layer analysis, benchmarks, small experiments, feature maps, and run planning."""
