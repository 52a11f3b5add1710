"""Runs that are killed at random moments, and what is left of them: `python -m tests.faults --kills 50`."""
