"""What a pretrained model is for: one folder a task, each with its `task.py` and `run.py`."""
