"""Checkpoints: weights, configs and tokenizers from a folder, the Hub or a training run."""
