"""Frozen models whose weights stay on the host or a disk and visit the device once per pass."""
