"""The denoising loop: its noise, samplers, steps, hooks and runs."""
