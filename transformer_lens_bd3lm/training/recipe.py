"""Recipes of the embedded models: small BD3LMs, trained at all block sizes.

Every step draws a block size, so one set of weights is on-distribution from the autoregressive
order (block size 1) to full diffusion (the whole context).

A recipe holds numbers alone: what they do is in ``closed_form_loss``, ``data``, ``training_run``
and ``train_recipe``.
"""

from dataclasses import dataclass

import torch

from transformer_lens_bd3lm import grammar
from transformer_lens_bd3lm.model.config import BD3LMConfig


@dataclass(frozen=True)
class Recipe:
    """Numbers that decide the weights, together with the rows that are trained on.

    Attributes:
        vocab_size: tokens of the vocabulary, the mask (last id) included.
        context: tokens of a row, BOS included.
        block_sizes: block sizes in tokens, one of which is drawn in each step; each divides
            ``context``. One that stands twice is drawn twice as often.
        hidden_dim: width of the residual stream.
        n_blocks: layers.
        n_heads: heads.
        cond_dim: width of the conditioning vector.
        dropout: residual dropout.
        steps: optimizer steps.
        schedule: steps of the cosine; if it is longer than the run, the moving average anneals.
        batch: rows a step.
        learning_rate: peak of the cosine schedule.
        warmup: steps of linear warm-up.
        weight_decay: weight decay of AdamW, for matrices.
        ema: decay a step of the moving average of the weights, which is what is exported.
        autocast: whether the forward pass runs in bfloat16; a very small model is as fast without.
        seed: random seed of weights, rows, masks and dropout.
        block_size: block size that the checkpoint boots with.
    """

    vocab_size: int = 1024
    context: int = 256
    block_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 256)
    hidden_dim: int = 192
    n_blocks: int = 6
    n_heads: int = 6
    cond_dim: int = 32
    dropout: float = 0.0
    steps: int = 3_000
    schedule: int = 4_000
    batch: int = 16
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.05
    ema: float = 0.999
    autocast: bool = True
    seed: int = 0
    block_size: int = 4

    def config(self) -> BD3LMConfig:
        """Return the config of the checkpoint: the released architecture, small."""
        return BD3LMConfig(
            block_size=self.block_size, model_length=self.context, vocab_size=self.vocab_size,
            hidden_dim=self.hidden_dim, cond_dim=self.cond_dim, n_blocks=self.n_blocks,
            n_heads=self.n_heads, dropout=self.dropout, attn_backend="sdpa", var_min=False,
            architectures=["BD3LM"], dtype="float32", bos_token_id=0,
            eos_token_id=0, trained_block_sizes=sorted(set(self.block_sizes)),
        )  # fmt: skip


GRAMMAR_RECIPE = Recipe(
    vocab_size=grammar.MASK + 1, context=grammar.CONTEXT, block_sizes=(1, 2, 4, 8, 8),
    hidden_dim=64, n_blocks=3, n_heads=4, cond_dim=8, steps=4_000, schedule=4_000, batch=256,
    learning_rate=3e-3, weight_decay=0.01, autocast=False,
)  # fmt: skip


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = min(1.0, (step - recipe.warmup) / max(1, recipe.schedule - recipe.warmup))
    return recipe.learning_rate * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * done)).item())
