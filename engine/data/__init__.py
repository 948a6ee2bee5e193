"""From dataset files to batches of prompts and pretraining text."""
