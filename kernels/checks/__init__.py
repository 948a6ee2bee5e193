"""The kernels' cases and their truths, for tests, benchmarks and start-up."""
