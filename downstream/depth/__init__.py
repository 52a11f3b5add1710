"""Monocular depth: metres a pixel, by probing, fine-tuning or training from scratch."""
