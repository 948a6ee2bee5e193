"""Attention while generating: over prompts of different lengths, and over the paged cache."""
