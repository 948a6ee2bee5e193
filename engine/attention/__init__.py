"""Attention of rows that lie end to end, as in training and prefill, and over the paged cache."""
