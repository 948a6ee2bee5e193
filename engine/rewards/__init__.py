"""Scores of responses: Python functions, HTTP endpoints, reward models, and their sum."""
