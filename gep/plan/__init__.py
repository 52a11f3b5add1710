"""What a pretraining run will cost, from its config: `gep plan`."""
