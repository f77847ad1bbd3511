"""Results as tables, figures and pages: the floor that draws what the floors below compute.

Importing it gives every result its ``table()`` and ``plot()``. What draws is imported when
something is drawn, matplotlib with it.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from transformer_lens_bd3lm.analysis.by_depth.measure import DependencyDepths
from transformer_lens_bd3lm.analysis.compare_block_sizes import BlockSizeComparison
from transformer_lens_bd3lm.analysis.compare_checkpoints.compare import CheckpointComparison
from transformer_lens_bd3lm.analysis.compare_models import ModelComparison
from transformer_lens_bd3lm.analysis.sweep import Sweep
from transformer_lens_bd3lm.denoising.mediate import Mediation
from transformer_lens_bd3lm.denoising.replay import Replay
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.result import figure_of, table_of

TABLES = {
    CheckpointComparison: "terminal:diff_tables",
    Mediation: "run_tables:mediation_table",
    Replay: "run_tables:replay_table",
    Run: "run_tables:run_table",
}
FIGURES = {
    DependencyDepths: "checkpoint_figures:dependency_figure",
    BlockSizeComparison: "figures:dial_figure",
    CheckpointComparison: "checkpoint_figures:diff_figure",
    ModelComparison: "checkpoint_figures:family_figure",
    Sweep: "figures:sweep_figure",
}


def _drawing(place: str) -> Callable[..., Any]:
    """Return a function that imports the drawing at ``module:name`` and draws."""
    module, _, name = place.partition(":")

    def draw(result: Any, **options: Any) -> Any:
        return getattr(import_module(f"{__name__}.{module}"), name)(result, **options)

    return draw


for _registry, _places in ((table_of, TABLES), (figure_of, FIGURES)):
    for _type, _place in _places.items():
        _registry.register(_type, _drawing(_place))
