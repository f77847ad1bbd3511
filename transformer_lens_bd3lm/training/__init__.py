"""Training: the loss of block diffusion, and the recipes of the embedded models."""
