"""Mutated recordings through every reader: `python -m tests.fuzz`; `run.fuzz` is what the tests call."""
