"""`make gpu-check`: what is run once on a GPU machine."""
