"""Sampling responses: continuous batching over a paged cache."""
