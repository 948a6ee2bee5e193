"""The commands of `gearshift`, one per file."""
