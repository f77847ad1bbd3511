"""The training loss, and the recipes of the embedded models."""
