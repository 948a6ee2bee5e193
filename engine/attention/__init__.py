"""Attention of rows that lie end to end, in training, scoring and prefill, and over the paged cache."""
