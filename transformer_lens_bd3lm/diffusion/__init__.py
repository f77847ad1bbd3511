"""Noise, denoising and training."""
