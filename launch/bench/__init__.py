"""Benchmarks: `gearshift bench PART`."""
