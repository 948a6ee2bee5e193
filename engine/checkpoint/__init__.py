"""Saving a run, taking it up again, and exporting its models."""
