"""Training checkpoints of PyTorch Lightning, read as data."""
