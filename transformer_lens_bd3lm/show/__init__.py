"""Results as tables and figures: the floor that draws what others compute.

Importing it gives every result its ``table()`` and ``plot()``. What draws a result, and matplotlib
with it, is imported when it is drawn.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from transformer_lens_bd3lm.analysis.attention_over_steps import AttentionOverSteps
from transformer_lens_bd3lm.analysis.by_depth import DependencyDepths
from transformer_lens_bd3lm.analysis.circuits import CircuitComparison, EdgeAttribution
from transformer_lens_bd3lm.analysis.compare_block_sizes import BlockSizeComparison
from transformer_lens_bd3lm.analysis.compare_checkpoints import CheckpointComparison
from transformer_lens_bd3lm.analysis.compare_models import ModelComparison
from transformer_lens_bd3lm.analysis.depth_redundancy import DepthRedundancy
from transformer_lens_bd3lm.analysis.effect_grid import EffectGrid
from transformer_lens_bd3lm.analysis.effects import Effects
from transformer_lens_bd3lm.analysis.experiment import Experiment
from transformer_lens_bd3lm.analysis.far_masks import FarMasks
from transformer_lens_bd3lm.analysis.features import Feature, Features
from transformer_lens_bd3lm.analysis.features.result import feature_page, feature_pages
from transformer_lens_bd3lm.analysis.harvest import Harvest
from transformer_lens_bd3lm.analysis.heads import HeadScores
from transformer_lens_bd3lm.analysis.influence import Influence
from transformer_lens_bd3lm.analysis.order_cost import OrderCost
from transformer_lens_bd3lm.analysis.over_run import Calibration, Commitment, ProbeScores, RunLens
from transformer_lens_bd3lm.analysis.parallel_cost import ParallelCost
from transformer_lens_bd3lm.analysis.sae import FeatureActivity, SaeScores, SaeTraining
from transformer_lens_bd3lm.analysis.sinks import Sinks
from transformer_lens_bd3lm.analysis.speed import Speed
from transformer_lens_bd3lm.analysis.steering import Direction, Steering
from transformer_lens_bd3lm.analysis.sweep import Price, Sweep
from transformer_lens_bd3lm.analysis.verify import Verification
from transformer_lens_bd3lm.denoising.compare_runs import RunComparison
from transformer_lens_bd3lm.denoising.mediate import Mediation
from transformer_lens_bd3lm.denoising.replay import Replay
from transformer_lens_bd3lm.denoising.run import Run, run_page
from transformer_lens_bd3lm.denoising.runs import Runs
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import Likelihood
from transformer_lens_bd3lm.likelihoods.exact import Exact
from transformer_lens_bd3lm.likelihoods.exact_effect import ExactEffect
from transformer_lens_bd3lm.likelihoods.nelbo import Nelbo
from transformer_lens_bd3lm.likelihoods.statistics import Nats
from transformer_lens_bd3lm.result import Contract, Result, figure_of, html_of, table_of
from transformer_lens_bd3lm.training.training import Training

TABLES = {
    AttentionOverSteps: "attention_over_steps:attention_table",
    BlockSizeComparison: "compare_block_sizes:block_sizes_table",
    Calibration: "over_run_scores:calibration_table",
    CheckpointComparison: "compare_checkpoints:checkpoints_tables",
    CircuitComparison: "circuits:comparison_tables",
    Commitment: "over_run:commitment_tables",
    Contract: "tables:contract_table",
    DependencyDepths: "by_depth:by_depth_tables",
    DepthRedundancy: "depth_redundancy:depth_table",
    Direction: "steering:direction_table",
    EdgeAttribution: "circuits:edges_table",
    EffectGrid: "effect_grid:effect_grid_table",
    Effects: "effects:effects_table",
    Exact: "exact:exact_table",
    ExactEffect: "exact:exact_effect_table",
    Experiment: "experiment:experiment_table",
    FarMasks: "far_masks:far_masks_table",
    Harvest: "harvest:harvest_table",
    Feature: "feature:feature_tables",
    FeatureActivity: "sae:activity_table",
    Features: "feature:features_table",
    HeadScores: "heads:head_table",
    Influence: "influence:influence_table",
    Likelihood: "likelihood:likelihood_table",
    Mediation: "run_tables:mediation_table",
    ModelComparison: "compare_models:models_table",
    Nats: "likelihood:nats_table",
    Nelbo: "likelihood:nelbo_table",
    OrderCost: "order_cost:order_table",
    ParallelCost: "parallel_cost:parallel_table",
    Price: "sweep:price_table",
    ProbeScores: "over_run_scores:probe_table",
    Replay: "run_tables:replay_table",
    Run: "run_tables:run_table",
    RunComparison: "run_tables:comparison_table",
    RunLens: "over_run:run_lens_table",
    Runs: "run_tables:runs_table",
    SaeScores: "sae:scores_table",
    SaeTraining: "sae_training:sae_training_table",
    Sinks: "sinks:sinks_table",
    Speed: "speed:speed_tables",
    Steering: "steering:steering_table",
    Sweep: "sweep:sweep_table",
    Training: "training:training_table",
    Verification: "verification:verification_tables",
}
FIGURES = {
    AttentionOverSteps: "attention_over_steps:attention_figure",
    BlockSizeComparison: "compare_block_sizes:block_sizes_figure",
    Calibration: "over_run_scores:calibration_figure",
    CheckpointComparison: "compare_checkpoints:checkpoints_figure",
    CircuitComparison: "circuits:comparison_figure",
    Commitment: "over_run:commitment_figure",
    DependencyDepths: "by_depth:by_depth_figure",
    DepthRedundancy: "depth_redundancy:depth_figure",
    Direction: "steering:direction_figure",
    EdgeAttribution: "circuits:edges_figure",
    EffectGrid: "effect_grid:effect_grid_figure",
    Effects: "effects:effects_figure",
    Exact: "exact:exact_figure",
    Experiment: "experiment:experiment_figure",
    FarMasks: "far_masks:far_masks_figure",
    Feature: "feature:feature_figure",
    FeatureActivity: "sae:activity_figure",
    HeadScores: "heads:head_figure",
    Influence: "influence:influence_figure",
    ModelComparison: "compare_models:models_figure",
    OrderCost: "order_cost:order_figure",
    ParallelCost: "parallel_cost:parallel_figure",
    ProbeScores: "over_run_scores:probe_figure",
    Replay: "run:replay_figure",
    Run: "run:run_figure",
    RunLens: "over_run:run_lens_figure",
    SaeScores: "sae:scores_figure",
    SaeTraining: "sae_training:sae_training_figure",
    Sinks: "sinks:sinks_figure",
    Steering: "steering:steering_figure",
    Sweep: "sweep:sweep_figure",
    Training: "training:training_figure",
}


def _imported(place: str) -> Callable[..., Any]:
    """Return a function that imports ``module:name`` of this folder and calls it."""
    module, _, name = place.partition(":")

    def call(*args: Any, **options: Any) -> Any:
        return getattr(import_module(f"{__name__}.{module}"), name)(*args, **options)

    return call


def drawn(place: str) -> Callable[..., Any]:
    """Return a function that draws by ``module:name`` of this folder, and finishes the figure."""
    draw, finish = _imported(place), _imported("finish:finish")

    def plot(
        *args: Any,
        dark: bool = False,
        width: float | None = None,
        interactive: bool = False,
        **options: Any,
    ) -> Any:
        return finish(draw(*args, **options), dark, width, interactive)

    return plot


for _type, _place in TABLES.items():
    table_of.register(_type, _imported(_place))
for _type, _place in FIGURES.items():
    figure_of.register(_type, drawn(_place))
for _type in (Result, Replay):
    html_of.register(_type, _imported("html_tables:result_html"))
html_of.register(Run, _imported("page.write:notebook_view"))
run_page.register(Run, _imported("page.write:write_page"))
feature_page.register(Feature, _imported("feature_page.write:write_feature"))
feature_pages.register(Features, _imported("feature_page.write:write_features"))
