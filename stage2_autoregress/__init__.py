"""Stage 2: autoregressive pretraining on event and image tokens."""
