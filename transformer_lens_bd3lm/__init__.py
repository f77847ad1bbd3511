"""Block-diffusion language models in TransformerLens; importing this registers the adapter."""

from pathlib import Path

from transformer_lens_bd3lm import grammar as grammar
from transformer_lens_bd3lm import show as _show  # noqa: F401  (gives results table and plot)
from transformer_lens_bd3lm.analysis.by_depth import DependencyDepths as DependencyDepths
from transformer_lens_bd3lm.analysis.by_depth import by_dependency_depth as by_dependency_depth
from transformer_lens_bd3lm.analysis.compare_block_sizes import (
    BlockSizeComparison as BlockSizeComparison,
)
from transformer_lens_bd3lm.analysis.compare_block_sizes import (
    compare_block_sizes as compare_block_sizes,
)
from transformer_lens_bd3lm.analysis.compare_checkpoints import (
    CheckpointComparison as CheckpointComparison,
)
from transformer_lens_bd3lm.analysis.compare_checkpoints import (
    compare_checkpoints as compare_checkpoints,
)
from transformer_lens_bd3lm.analysis.compare_models import ModelComparison as ModelComparison
from transformer_lens_bd3lm.analysis.compare_models import compare_models as compare_models
from transformer_lens_bd3lm.analysis.heads import HeadScores as HeadScores
from transformer_lens_bd3lm.analysis.heads import MaskedText as MaskedText
from transformer_lens_bd3lm.analysis.heads import RepeatedTokens as RepeatedTokens
from transformer_lens_bd3lm.analysis.heads import detect_heads as detect_heads
from transformer_lens_bd3lm.analysis.heads import repeated_tokens as repeated_tokens
from transformer_lens_bd3lm.analysis.lens import logit_lens as logit_lens
from transformer_lens_bd3lm.analysis.sweep import Price as Price
from transformer_lens_bd3lm.analysis.sweep import Sweep as Sweep
from transformer_lens_bd3lm.analysis.sweep import sweep_block_sizes as sweep_block_sizes
from transformer_lens_bd3lm.analysis.verify import Verification as Verification
from transformer_lens_bd3lm.analysis.verify import verify as verify
from transformer_lens_bd3lm.bridge.adapter import (
    BD3LMArchitectureAdapter as BD3LMArchitectureAdapter,
)
from transformer_lens_bd3lm.bridge.block_size import block_size as block_size
from transformer_lens_bd3lm.bridge.block_size import set_block_size as set_block_size
from transformer_lens_bd3lm.bridge.boot import boot_lightning as boot_lightning
from transformer_lens_bd3lm.bridge.registration import register
from transformer_lens_bd3lm.bridge.save import save as save
from transformer_lens_bd3lm.bridge.streams import clean_stream as clean_stream
from transformer_lens_bd3lm.bridge.streams import noisy_stream as noisy_stream
from transformer_lens_bd3lm.checkpoint.lightning import convert_lightning as convert_lightning
from transformer_lens_bd3lm.denoising import generate as _generate  # noqa: F401  (on the bridge)
from transformer_lens_bd3lm.denoising.denoise import denoise as denoise
from transformer_lens_bd3lm.denoising.denoise import denoise_steps as denoise_steps
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals as ForcedReveals
from transformer_lens_bd3lm.denoising.fork import fork as fork
from transformer_lens_bd3lm.denoising.hook_rows import current_step as current_step
from transformer_lens_bd3lm.denoising.mediate import Mediation as Mediation
from transformer_lens_bd3lm.denoising.mediate import mediate as mediate
from transformer_lens_bd3lm.denoising.noise import Noise as Noise
from transformer_lens_bd3lm.denoising.record import Record as Record
from transformer_lens_bd3lm.denoising.replay import Replay as Replay
from transformer_lens_bd3lm.denoising.replay import replay as replay
from transformer_lens_bd3lm.denoising.run import Run as Run
from transformer_lens_bd3lm.denoising.samplers import Ancestral as Ancestral
from transformer_lens_bd3lm.denoising.samplers import Confidence as Confidence
from transformer_lens_bd3lm.denoising.samplers import FirstHitting as FirstHitting
from transformer_lens_bd3lm.denoising.step import Step as Step
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks as StepHooks
from transformer_lens_bd3lm.denoising.stop import EndOfText as EndOfText
from transformer_lens_bd3lm.denoising.stop import LowEntropy as LowEntropy
from transformer_lens_bd3lm.errors import BD3LMError as BD3LMError
from transformer_lens_bd3lm.errors import OffDistributionWarning as OffDistributionWarning
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import Likelihood as Likelihood
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import likelihood as likelihood
from transformer_lens_bd3lm.likelihoods.exact import Exact as Exact
from transformer_lens_bd3lm.likelihoods.exact import exact as exact
from transformer_lens_bd3lm.likelihoods.exact_effect import ExactEffect as ExactEffect
from transformer_lens_bd3lm.likelihoods.exact_effect import exact_backward as exact_backward
from transformer_lens_bd3lm.likelihoods.exact_effect import exact_effect as exact_effect
from transformer_lens_bd3lm.likelihoods.mask_draws import Clip as Clip
from transformer_lens_bd3lm.likelihoods.nelbo import Nelbo as Nelbo
from transformer_lens_bd3lm.likelihoods.nelbo import nelbo as nelbo
from transformer_lens_bd3lm.likelihoods.statistics import Nats as Nats
from transformer_lens_bd3lm.model.subs import log_probs as log_probs
from transformer_lens_bd3lm.training.loss import diffusion_loss as diffusion_loss

TINY = str(Path(__file__).parent / "checkpoint" / "tiny")
"""Path of the embedded default: a 3 M parameter BD3LM, trained over the whole dial."""

GRAMMAR = str(Path(__file__).parent / "checkpoint" / "grammar")
"""Path of the second embedded model: eight tokens and a copying rule, all of it known."""

__all__ = [
    "GRAMMAR",
    "TINY",
    "Ancestral",
    "BD3LMArchitectureAdapter",
    "BD3LMError",
    "Clip",
    "Confidence",
    "DependencyDepths",
    "BlockSizeComparison",
    "CheckpointComparison",
    "EndOfText",
    "Exact",
    "ExactEffect",
    "ModelComparison",
    "FirstHitting",
    "ForcedReveals",
    "HeadScores",
    "Likelihood",
    "LowEntropy",
    "MaskedText",
    "Mediation",
    "Nats",
    "Nelbo",
    "Noise",
    "OffDistributionWarning",
    "Price",
    "Record",
    "RepeatedTokens",
    "Replay",
    "Run",
    "Step",
    "StepHooks",
    "Sweep",
    "Verification",
    "block_size",
    "boot_lightning",
    "clean_stream",
    "compare_block_sizes",
    "compare_models",
    "convert_lightning",
    "current_step",
    "denoise",
    "denoise_steps",
    "by_dependency_depth",
    "compare_checkpoints",
    "diffusion_loss",
    "detect_heads",
    "exact",
    "exact_backward",
    "exact_effect",
    "fork",
    "grammar",
    "likelihood",
    "log_probs",
    "logit_lens",
    "mediate",
    "nelbo",
    "noisy_stream",
    "register",
    "repeated_tokens",
    "replay",
    "save",
    "set_block_size",
    "sweep_block_sizes",
    "verify",
]

register()
