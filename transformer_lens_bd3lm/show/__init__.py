"""Results as tables, figures and pages: the floor that draws what the floors below compute.

Importing it gives every result its ``table()`` and ``plot()``. What draws is imported when
something is drawn, matplotlib with it.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from transformer_lens_bd3lm.analysis.by_depth import DependencyDepths
from transformer_lens_bd3lm.analysis.compare_block_sizes import BlockSizeComparison
from transformer_lens_bd3lm.analysis.compare_checkpoints.compare import CheckpointComparison
from transformer_lens_bd3lm.analysis.compare_models import ModelComparison
from transformer_lens_bd3lm.analysis.heads import HeadScores
from transformer_lens_bd3lm.analysis.sweep import Sweep
from transformer_lens_bd3lm.analysis.verify import Verification
from transformer_lens_bd3lm.result import figure_of, table_of

TABLES = {
    CheckpointComparison: "terminal:diff_tables",
    DependencyDepths: "by_depth:by_depth_tables",
    HeadScores: "heads:head_table",
    Verification: "verification:verification_tables",
}
FIGURES = {
    DependencyDepths: "by_depth:by_depth_figure",
    BlockSizeComparison: "figures:dial_figure",
    CheckpointComparison: "checkpoint_figures:diff_figure",
    ModelComparison: "checkpoint_figures:family_figure",
    HeadScores: "heads:head_figure",
    Sweep: "figures:sweep_figure",
}


def _drawing(place: str) -> Callable[..., Any]:
    """Return a function that imports the drawing at ``module:name`` and draws."""
    module, _, name = place.partition(":")

    def draw(result: Any, *args: Any, **options: Any) -> Any:
        return getattr(import_module(f"{__name__}.{module}"), name)(result, *args, **options)

    return draw


for _registry, _places in ((table_of, TABLES), (figure_of, FIGURES)):
    for _type, _place in _places.items():
        _registry.register(_type, _drawing(_place))
