"""The configuration of a run: every key, read, checked and told back."""
