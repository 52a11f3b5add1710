"""Semantic segmentation: see task.py and run.py."""
