"""What specs, tests and benchmarks share."""
