"""Which components cause a prediction: attribution of edges between them, at one block size or two.

``texts`` reads pairs of texts, ``components`` names nodes and edges, ``passes`` runs the gradients,
``attribute`` gathers them over texts, ``compare`` sets block sizes side by side.
"""

from transformer_lens_bd3lm.analysis.circuits.attribute import EdgeAttribution, attribute_edges
from transformer_lens_bd3lm.analysis.circuits.compare import CircuitComparison, compare_circuits

__all__ = ["CircuitComparison", "EdgeAttribution", "attribute_edges", "compare_circuits"]
