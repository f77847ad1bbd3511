"""Where and when a prediction comes from: clean activations put into a corrupted run, cell by cell.

``pairs`` reads two texts and the states of their common reveal order, ``patching`` runs the
patches, ``grid`` gathers them over texts.
"""

from transformer_lens_bd3lm.analysis.effect_grid.grid import EffectGrid, effect_grid

__all__ = ["EffectGrid", "effect_grid"]
