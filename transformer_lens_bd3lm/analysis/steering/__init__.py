"""Directions of the residual stream, what they do to the text, and what they cost."""

from transformer_lens_bd3lm.analysis.steering.direction import Direction, direction
from transformer_lens_bd3lm.analysis.steering.steer import Steering, steer

__all__ = ["Direction", "Steering", "direction", "steer"]
