"""Recognition: linear and k-shot probes, zero-shot, fine-tuning, training from scratch."""
