"""Types of the results that the public functions return, for annotations and ``isinstance``.

Each has ``table()`` and ``to_dict()``; those with a figure have ``plot()`` as well.
"""

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
from transformer_lens_bd3lm.analysis.features import Context, Feature, Features
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
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.runs import Runs
from transformer_lens_bd3lm.denoising.step import RevealedStep
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import Likelihood
from transformer_lens_bd3lm.likelihoods.exact import Exact
from transformer_lens_bd3lm.likelihoods.exact_effect import ExactEffect
from transformer_lens_bd3lm.likelihoods.nelbo import Nelbo
from transformer_lens_bd3lm.likelihoods.statistics import Nats
from transformer_lens_bd3lm.result import Contract, Result
from transformer_lens_bd3lm.training.training import Training

__all__ = [
    "AttentionOverSteps",
    "BlockSizeComparison",
    "Calibration",
    "CheckpointComparison",
    "CircuitComparison",
    "Commitment",
    "Context",
    "Contract",
    "DependencyDepths",
    "DepthRedundancy",
    "Direction",
    "EdgeAttribution",
    "EffectGrid",
    "Effects",
    "Exact",
    "ExactEffect",
    "Experiment",
    "FarMasks",
    "Harvest",
    "Feature",
    "FeatureActivity",
    "Features",
    "HeadScores",
    "Influence",
    "Likelihood",
    "Mediation",
    "ModelComparison",
    "Nats",
    "Nelbo",
    "OrderCost",
    "ParallelCost",
    "Price",
    "ProbeScores",
    "Replay",
    "Result",
    "RevealedStep",
    "Run",
    "RunComparison",
    "RunLens",
    "Runs",
    "SaeScores",
    "SaeTraining",
    "Sinks",
    "Speed",
    "Steering",
    "Sweep",
    "Training",
    "Verification",
]
