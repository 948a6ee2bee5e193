"""The ranks of a run: how they start, talk, and end."""
