"""How TransformerLens sees a checkpoint."""
