"""Block-diffusion language models in TransformerLens; importing this registers the adapter."""

from pathlib import Path

from transformer_lens_bd3lm.analysis.dependency import Dependency as Dependency
from transformer_lens_bd3lm.analysis.dependency import dependency as dependency
from transformer_lens_bd3lm.analysis.dial import DialComparison as DialComparison
from transformer_lens_bd3lm.analysis.dial import compare_block_sizes as compare_block_sizes
from transformer_lens_bd3lm.analysis.diff import Diff as Diff
from transformer_lens_bd3lm.analysis.diff import diff as diff
from transformer_lens_bd3lm.analysis.family import Family as Family
from transformer_lens_bd3lm.analysis.family import compare_models as compare_models
from transformer_lens_bd3lm.analysis.halves import clean_half as clean_half
from transformer_lens_bd3lm.analysis.halves import noisy_half as noisy_half
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
from transformer_lens_bd3lm.bridge.forward import block_size as block_size
from transformer_lens_bd3lm.bridge.forward import set_block_size as set_block_size
from transformer_lens_bd3lm.bridge.registration import register
from transformer_lens_bd3lm.checkpoint.converting import boot_lightning as boot_lightning
from transformer_lens_bd3lm.checkpoint.converting import convert_lightning as convert_lightning
from transformer_lens_bd3lm.checkpoint.saving import save as save
from transformer_lens_bd3lm.diffusion import grammar as grammar
from transformer_lens_bd3lm.diffusion.denoise import denoise as denoise
from transformer_lens_bd3lm.diffusion.denoise import denoise_steps as denoise_steps
from transformer_lens_bd3lm.diffusion.exact import Exact as Exact
from transformer_lens_bd3lm.diffusion.exact import ExactEffect as ExactEffect
from transformer_lens_bd3lm.diffusion.exact import exact as exact
from transformer_lens_bd3lm.diffusion.exact import exact_backward as exact_backward
from transformer_lens_bd3lm.diffusion.exact import exact_effect as exact_effect
from transformer_lens_bd3lm.diffusion.force import Force as Force
from transformer_lens_bd3lm.diffusion.likelihood import Likelihood as Likelihood
from transformer_lens_bd3lm.diffusion.likelihood import likelihood as likelihood
from transformer_lens_bd3lm.diffusion.loss import diffusion_loss as diffusion_loss
from transformer_lens_bd3lm.diffusion.mediate import Mediation as Mediation
from transformer_lens_bd3lm.diffusion.mediate import mediate as mediate
from transformer_lens_bd3lm.diffusion.nelbo import Clip as Clip
from transformer_lens_bd3lm.diffusion.nelbo import Nelbo as Nelbo
from transformer_lens_bd3lm.diffusion.nelbo import nelbo as nelbo
from transformer_lens_bd3lm.diffusion.noise import Noise as Noise
from transformer_lens_bd3lm.diffusion.record import Record as Record
from transformer_lens_bd3lm.diffusion.replay import Replay as Replay
from transformer_lens_bd3lm.diffusion.replay import fork as fork
from transformer_lens_bd3lm.diffusion.replay import replay as replay
from transformer_lens_bd3lm.diffusion.rows import current_step as current_step
from transformer_lens_bd3lm.diffusion.run import Run as Run
from transformer_lens_bd3lm.diffusion.samplers import Ancestral as Ancestral
from transformer_lens_bd3lm.diffusion.samplers import Confidence as Confidence
from transformer_lens_bd3lm.diffusion.samplers import FirstHitting as FirstHitting
from transformer_lens_bd3lm.diffusion.steps import Step as Step
from transformer_lens_bd3lm.diffusion.steps import StepHooks as StepHooks
from transformer_lens_bd3lm.diffusion.stop import EndOfText as EndOfText
from transformer_lens_bd3lm.diffusion.stop import LowEntropy as LowEntropy
from transformer_lens_bd3lm.diffusion.subs import log_probs as log_probs
from transformer_lens_bd3lm.diffusion.units import Nats as Nats
from transformer_lens_bd3lm.errors import BD3LMError as BD3LMError
from transformer_lens_bd3lm.errors import OffDistributionWarning as OffDistributionWarning

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
    "Dependency",
    "DialComparison",
    "Diff",
    "EndOfText",
    "Exact",
    "ExactEffect",
    "Family",
    "FirstHitting",
    "Force",
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
    "clean_half",
    "compare_block_sizes",
    "compare_models",
    "convert_lightning",
    "current_step",
    "denoise",
    "denoise_steps",
    "dependency",
    "diff",
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
    "noisy_half",
    "register",
    "repeated_tokens",
    "replay",
    "save",
    "set_block_size",
    "sweep_block_sizes",
    "verify",
]

register()
