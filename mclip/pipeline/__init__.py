"""Notebooks as DVC stages: running one, what one depends on, and keeping their sources stripped."""
