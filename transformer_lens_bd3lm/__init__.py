"""Block-diffusion language models in TransformerLens; importing this registers the adapter."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from transformer_lens_bd3lm import grammar, results
from transformer_lens_bd3lm import show as _show  # noqa: F401  (gives results table and plot)
from transformer_lens_bd3lm.analysis.attention_over_steps import (
    attention_over_steps,
    attention_shares,
)
from transformer_lens_bd3lm.analysis.by_depth import by_dependency_depth
from transformer_lens_bd3lm.analysis.circuits import attribute_edges, compare_circuits
from transformer_lens_bd3lm.analysis.compare_block_sizes import compare_block_sizes
from transformer_lens_bd3lm.analysis.compare_checkpoints import compare_checkpoints
from transformer_lens_bd3lm.analysis.compare_models import compare_models
from transformer_lens_bd3lm.analysis.depth_redundancy import depth_redundancy
from transformer_lens_bd3lm.analysis.effect_grid import effect_grid
from transformer_lens_bd3lm.analysis.effects import mean_effects
from transformer_lens_bd3lm.analysis.experiment import WordFrequency, experiment
from transformer_lens_bd3lm.analysis.far_masks import far_masks
from transformer_lens_bd3lm.analysis.features import (
    RandomChange,
    feature,
    feature_arms,
    features,
)
from transformer_lens_bd3lm.analysis.harvest import Harvest, harvest
from transformer_lens_bd3lm.analysis.heads import (
    MaskedText,
    RepeatedTokens,
    detect_heads,
    repeated_tokens,
)
from transformer_lens_bd3lm.analysis.influence import influence
from transformer_lens_bd3lm.analysis.lens import logit_lens
from transformer_lens_bd3lm.analysis.order_cost import order_cost
from transformer_lens_bd3lm.analysis.over_run import calibration, commitment, probe
from transformer_lens_bd3lm.analysis.parallel_cost import parallel_cost
from transformer_lens_bd3lm.analysis.sae import (
    SavedSae,
    Splice,
    feature_activity,
    load_sae,
    sae_scores,
    train_sae,
)
from transformer_lens_bd3lm.analysis.sinks import sinks
from transformer_lens_bd3lm.analysis.speed import measure_speed
from transformer_lens_bd3lm.analysis.steering import Direction, direction, steer
from transformer_lens_bd3lm.analysis.sweep import sweep_block_sizes
from transformer_lens_bd3lm.analysis.verify import verify
from transformer_lens_bd3lm.bridge.adapter import BD3LMArchitectureAdapter
from transformer_lens_bd3lm.bridge.block_size import block_size, set_block_size
from transformer_lens_bd3lm.bridge.boot import boot_lightning
from transformer_lens_bd3lm.bridge.cuda_graphs import cuda_graphs
from transformer_lens_bd3lm.bridge.packed import packed
from transformer_lens_bd3lm.bridge.registration import register
from transformer_lens_bd3lm.bridge.save import save
from transformer_lens_bd3lm.bridge.streams import clean_stream, noisy_stream
from transformer_lens_bd3lm.checkpoint.lightning import convert_lightning
from transformer_lens_bd3lm.denoising import dataset as _dataset  # noqa: F401  (run.dataset)
from transformer_lens_bd3lm.denoising import generate as _generate  # noqa: F401  (on the bridge)
from transformer_lens_bd3lm.denoising.compare_runs import compare_runs
from transformer_lens_bd3lm.denoising.denoise import denoise, denoise_steps
from transformer_lens_bd3lm.denoising.denoise_many import denoise_many
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals
from transformer_lens_bd3lm.denoising.fork import fork
from transformer_lens_bd3lm.denoising.hook_rows import current_step
from transformer_lens_bd3lm.denoising.mediate import mediate
from transformer_lens_bd3lm.denoising.noise import Noise, sigma_of
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.replay import replay
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.samplers import Ancestral, Confidence, FirstHitting, Sampler
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.denoising.stop import EndOfText, LowEntropy
from transformer_lens_bd3lm.errors import (
    BD3LMError,
    BlockSizeError,
    CheckpointError,
    HookNameError,
    HookReturnError,
    InputError,
    LossError,
    NotExactError,
    OffDistributionWarning,
    TokenizerError,
)
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import likelihood
from transformer_lens_bd3lm.likelihoods.exact import exact
from transformer_lens_bd3lm.likelihoods.exact_effect import exact_backward, exact_effect
from transformer_lens_bd3lm.likelihoods.mask_draws import Clip
from transformer_lens_bd3lm.likelihoods.nelbo import nelbo
from transformer_lens_bd3lm.model.subs import log_probs
from transformer_lens_bd3lm.show.pictures import plot_attention, plot_heat_map
from transformer_lens_bd3lm.training.loss import diffusion_loss
from transformer_lens_bd3lm.training.train import train

__version__ = "0.1.0"

TINY = str(Path(__file__).parent / "checkpoint" / "tiny")
"""Path of the embedded default: a BD3LM of 3.3 M parameters, trained at eight block sizes."""

TINY_SAE = str(Path(__file__).parent / "checkpoint" / "tiny_sae")
"""Path of the embedded sparse autoencoder of :data:`TINY`, which :func:`load_sae` reads."""

GRAMMAR = str(Path(__file__).parent / "checkpoint" / "grammar")
"""Path of the embedded model of ``bd3lm.grammar``, a language whose probabilities are known."""

__all__ = [
    "Ancestral",
    "attention_over_steps",
    "attention_shares",
    "attribute_edges",
    "BD3LMArchitectureAdapter",
    "BD3LMError",
    "block_size",
    "BlockSizeError",
    "boot_lightning",
    "by_dependency_depth",
    "calibration",
    "CheckpointError",
    "clean_stream",
    "Clip",
    "commitment",
    "compare_block_sizes",
    "compare_checkpoints",
    "compare_circuits",
    "compare_models",
    "compare_runs",
    "Confidence",
    "convert_lightning",
    "cuda_graphs",
    "current_step",
    "denoise",
    "denoise_many",
    "denoise_steps",
    "depth_redundancy",
    "detect_heads",
    "diffusion_loss",
    "Direction",
    "direction",
    "effect_grid",
    "EndOfText",
    "exact",
    "exact_backward",
    "exact_effect",
    "experiment",
    "far_masks",
    "feature",
    "feature_activity",
    "feature_arms",
    "features",
    "FirstHitting",
    "ForcedReveals",
    "fork",
    "grammar",
    "GRAMMAR",
    "Harvest",
    "harvest",
    "HookNameError",
    "HookReturnError",
    "influence",
    "InputError",
    "likelihood",
    "load_sae",
    "log_probs",
    "logit_lens",
    "LossError",
    "LowEntropy",
    "MaskedText",
    "mean_effects",
    "measure_speed",
    "mediate",
    "nelbo",
    "Noise",
    "noisy_stream",
    "NotExactError",
    "OffDistributionWarning",
    "order_cost",
    "packed",
    "parallel_cost",
    "plot_attention",
    "plot_heat_map",
    "probe",
    "RandomChange",
    "Record",
    "register",
    "repeated_tokens",
    "RepeatedTokens",
    "replay",
    "results",
    "Run",
    "sae_scores",
    "Sampler",
    "save",
    "SavedSae",
    "set_block_size",
    "sigma_of",
    "sinks",
    "Splice",
    "steer",
    "Step",
    "StepHooks",
    "sweep_block_sizes",
    "TINY",
    "TINY_SAE",
    "TokenizerError",
    "train",
    "train_sae",
    "verify",
    "WordFrequency",
]


def __getattr__(name: str) -> ModuleType:
    """Import ``bd3lm.lm_eval``, which needs an extra, when it is first asked for."""
    if name == "lm_eval":
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
