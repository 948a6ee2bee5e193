"""The memory and the seconds of a run before it starts, and beside what was measured."""
