"""A denoising step: one evaluation of the network, before its draw and after it.

Hooks, samplers and ``when`` predicates see a :class:`Step` before anything is drawn; the loop
yields a :class:`RevealedStep`, which also says what was revealed.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.subs import log_probs
from transformer_lens_bd3lm.result import count, one_line

Scope = Literal["active", "commit", "prefix"]


@dataclass(frozen=True, repr=False)
class Step:
    """One network evaluation of the denoising loop, as seen before anything is drawn.

    The steps that :func:`denoise_steps` yields and ``run.steps`` holds also say what was drawn:
    ``after``, ``revealed``, ``log_p`` and ``lead``, which are None inside hooks.

    Attributes:
        index: counts all steps of the run from 0.
        block: the block being denoised, counted from 0 at the first block of the run that holds a
            mask; not ``position // block_size``.
        step: counts the steps within the block from 0.
        window: absolute positions ``start, end`` of the block, ``end`` excluded.
        t: time of this step, per row ``[batch]``, from 1 down to 0; 0 in a row that has no mask.
        masked: positions of the block to be denoised and still masked before the step
            ``[batch, block]``, on the CPU.
        tokens: token ids of prompt, revealed tokens and masks before the step ``[batch, pos]``.
        mask_id: the mask token's id.
        scope: which rows a hook is being shown; ``"active"`` outside hooks.
        after: the same after the step ``[batch, pos]``.
        revealed: positions of the block that the step revealed ``[batch, block]``.
        log_p: log-probability in nats, under the network, of each token that it revealed
            ``[batch, block]``, NaN elsewhere.
        lead: by how much, in nats, that token's score (log p + Gumbel) beat the runner-up's
            ``[batch, block]``, NaN elsewhere and where it was forced: a near tie is a small lead.
        masked_logits: raw logits of the masked positions ``[masked, d_vocab]``, in row-major order;
            None inside hooks, and in a finished run's steps.
    """

    index: int
    block: int
    step: int
    window: tuple[int, int]
    t: Float[Tensor, " batch"]
    masked: Bool[Tensor, "batch block"]
    tokens: Int[Tensor, "batch pos"]
    mask_id: int
    scope: Scope = "active"
    after: Int[Tensor, "batch pos"] | None = None
    revealed: Bool[Tensor, "batch block"] | None = None
    log_p: Float[Tensor, "batch block"] | None = None
    lead: Float[Tensor, "batch block"] | None = None
    masked_logits: Float[Tensor, "masked d_vocab"] | None = None

    @property
    def masks_left(self) -> Int[Tensor, " batch"]:
        """Count the masked tokens of the block before the step, per row."""
        return self.masked.sum(-1)

    @property
    def logits(self) -> Float[Tensor, "batch block d_vocab"]:
        """Raw logits of the block's rows; NaN at clean positions, where nothing is trained.

        Raises:
            InputError: inside hooks, and for a step of a finished run, which keeps no logits.
        """
        if self.masked_logits is None:
            raise InputError(
                "this step has no logits: read them on the steps that denoise_steps yields"
            )
        rows = self.masked_logits
        full = rows.new_full((*self.masked.shape, rows.shape[-1]), torch.nan)
        full[self.masked.to(rows.device)] = rows
        return full

    @property
    def log_probs(self) -> Float[Tensor, "batch block d_vocab"]:
        """SUBS log-probabilities of the block's rows in nats, computed from the logits.

        Raises:
            InputError: where the step has no logits.
        """
        return log_probs(self.logits, self.tokens[:, slice(*self.window)], self.mask_id)

    @property
    def probs(self) -> Float[Tensor, "batch block d_vocab"]:
        """SUBS probabilities of the block's rows.

        Raises:
            InputError: where the step has no logits.
        """
        return self.log_probs.exp()

    @property
    def margin(self) -> Float[Tensor, "batch block"]:
        """Log-probability of the likeliest token minus the second's, in nats; NaN where clean.

        Raises:
            InputError: where the step has no logits.
        """
        top = self.log_probs.topk(2, dim=-1).values
        gap = top[..., 0] - top[..., 1]
        return gap.masked_fill(~self.masked.to(gap.device), torch.nan)

    def __repr__(self) -> str:
        start, end = self.window
        line = f"index={self.index}, block={self.block}, step={self.step}, "
        line += f"positions {start}..{end - 1}, masks_left={self.masks_left.tolist()}"
        if self.revealed is not None and self.log_p is not None:
            revealed = int(self.revealed.sum())
            line += f", revealed {count(revealed, 'token')}"
            if revealed:
                line += f", mean log p {float(self.log_p[self.revealed].mean()):.3f} nats"
        return one_line(f"{type(self).__name__}({line})")

    def before_draw(self) -> "Step":
        """Return the step without what it revealed, as hooks see it."""
        return Step(
            self.index,
            self.block,
            self.step,
            self.window,
            self.t,
            self.masked,
            self.tokens,
            self.mask_id,
            self.scope,
        )

    def for_rows(self, rows: Int[Tensor, " row"]) -> "Step":
        """Return the step, before its draw, for other batch rows, some maybe several times."""
        tokens = self.tokens[rows.to(self.tokens.device)]
        return replace(self.before_draw(), t=self.t[rows], masked=self.masked[rows], tokens=tokens)


@dataclass(frozen=True, kw_only=True, repr=False)
class RevealedStep(Step):
    """A step with its outcome; see :class:`Step` for the attributes."""

    after: Int[Tensor, "batch pos"] = field()
    revealed: Bool[Tensor, "batch block"] = field()
    log_p: Float[Tensor, "batch block"] = field()
    lead: Float[Tensor, "batch block"] = field()

    def stored(self) -> Step:
        """Return a block's last step as hooks of scope "commit" see it: clean, nothing to predict.

        Its keys and values are stored in the pass of the next block's first step.
        """
        return replace(
            self.before_draw(),
            tokens=self.after,
            masked=torch.zeros_like(self.masked),
            scope="commit",
        )
