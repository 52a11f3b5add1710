"""Stage 1: aligns an event encoder with a frozen image model."""
