"""How redundant depth is: what each layer changes at masked positions, and what skipping it costs.

At every step of a run, for each layer::

    cosine   cosine of the residual stream before and after the layer, at masked positions
    loss     nats that the text's own tokens lose when the layer is skipped: hook_resid_post is
             hook_resid_pre at the active block's positions, or at its masks alone

The contexts are those of the run: its tokens are pinned, and the stored keys and values of finished
blocks are those of the whole network. So a loss is what the layer does for this block's
predictions, not what it did for the blocks before it.

A cosine near 1 says that a layer turns the residual stream little, not that nothing reads what it
writes: read it beside the loss.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.checks import check_choice
from transformer_lens_bd3lm.denoising.along import (
    along,
    along_edited,
    log_p_of_written,
    run_or_texts,
)
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.model.modules import at_least_float32
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values


@dataclass(frozen=True, kw_only=True, repr=False)
class DepthRedundancy(Result):
    """What each layer changes, and what skipping it costs, by step; float64, CPU.

    Attributes:
        model: the checkpoint's name.
        block_size: tokens per block.
        positions: ``"active"`` or ``"masked"``: where a layer was skipped.
        cosine: cosine of a layer's input and output, mean over the masked positions of a row
            ``[step, batch, layer]``; NaN where a row has none.
        loss: nats that the text's tokens lose when the layer is skipped, mean over the masked
            positions of a row ``[step, batch, layer]``.
        revealed_loss: the same summed over the tokens that the step reveals: these add up to the
            change of -log p of the text in its order.
        tokens: number of tokens that each row wrote ``[batch]``.
        masks_left: masked positions of the block before the step ``[step, batch]``.
        contract: what was measured.
    """

    model: str
    block_size: int
    positions: str
    cosine: Float[Tensor, "step batch layer"] = field(repr=False)
    loss: Float[Tensor, "step batch layer"] = field(repr=False)
    revealed_loss: Float[Tensor, "step batch layer"] = field(repr=False)
    tokens: Int[Tensor, " batch"] = field(repr=False)
    masks_left: Int[Tensor, "step batch"] = field(repr=False)
    contract: Contract

    @property
    def mean_cosine(self) -> Float[Tensor, " layer"]:
        """Return the cosine of each layer: over the steps of each text, then over texts."""
        return self.cosine.nanmean(0).nanmean(0)

    def nats_per_token(self, texts: Any = None, level: float = 0.95) -> Effects:
        """Compute what skipping each layer costs, in nats a token of the text, ``[layer]``.

        It is the change of -log p of each text in the order in which it was revealed. Where orders
        are uniformly random it is an unbiased estimate of the change of the NELBO.

        Args:
            texts: number of each row's text, if rows share texts, as in :func:`mean_effects`.
            level: of the intervals over texts.
        """
        return mean_effects(self.revealed_loss.nansum(0) / self.tokens[:, None], texts, level=level)

    def by_masks_left(
        self, texts: Any = None, level: float = 0.95
    ) -> tuple[list[int], Effects, Float[Tensor, "masks_left layer"]]:
        """Return loss and cosine by the number of masks left.

        Args:
            texts: number of each row's text, if rows share texts.
            level: of the intervals over texts.

        Returns:
            The numbers of masks left, ascending; the loss in nats a masked position, mean over
            texts ``[masks_left, layer]``, corrected for all of these cells; and the cosine.
        """
        numbers = sorted({int(n) for n in self.masks_left.unique()} - {0})
        at = [(self.masks_left == n)[..., None] for n in numbers]
        loss, cosine = (
            torch.stack([x.where(here, torch.nan).nanmean(0) for here in at], dim=1)
            for x in (self.loss, self.cosine)
        )
        return numbers, mean_effects(loss, texts, level=level), cosine.nanmean(0)

    def _figures(self) -> str:
        loss, layers = self.nats_per_token(), self.loss.shape[2]
        least = int(loss.mean.nan_to_num(torch.inf).argmin())
        return (
            f"{self.model}, block size {self.block_size}, {count(self.loss.shape[1], 'text')}: of "
            f"{count(layers, 'layer')}, {least} costs least, {loss.text(least)} nats a token"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return cosine and loss by layer and by masks left as plain values for JSON."""
        numbers, loss, cosine = self.by_masks_left()
        values = {
            "model": self.model,
            "block_size": self.block_size,
            "positions": self.positions,
            "cosine": self.mean_cosine,
            "nats_per_token": self.nats_per_token().to_dict(),
            "masks_left": numbers,
            "loss_nats_by_masks_left": loss.to_dict(),
            "cosine_by_masks_left": cosine,
            "contract": vars(self.contract),
        }
        return plain_values(values)


class _Cosines:
    """Reduces the residuals before and after each layer as a pass runs."""

    def __init__(self) -> None:
        self.before = torch.empty(0)
        self.by_layer: list[Tensor] = []

    def keep(self, x: Tensor, hook: Any, step: Step) -> None:
        """Keep a layer's input."""
        self.before = x.clone()  # a hook further on may write into the stream

    def compare(self, x: Tensor, hook: Any, step: Step) -> None:
        """Compare a layer's output with its input, at the masked positions."""
        before, after = (at_least_float32(y).cpu().double() for y in (self.before, x))
        cosine = cosine_similarity(before, after, dim=-1, eps=1e-30)
        kept = step.masked
        self.by_layer.append(cosine.where(kept, 0.0).sum(1) / kept.sum(1))

    def take(self) -> Float[Tensor, "batch layer"]:
        """Return the cosines of the step that has run."""
        result, self.by_layer = torch.stack(self.by_layer, dim=1), []
        return result


def _skip_hooks(layer: int, positions: str) -> list[tuple[str, Any]]:
    """Return hooks that put a layer's input in place of its output."""
    kept: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> None:
        kept[:] = [x.clone()]

    def put_back(x: Tensor, hook: Any, step: Step) -> Tensor:
        if positions == "active":
            return kept[0]
        return torch.where(step.masked.to(x.device)[..., None], kept[0], x)

    return [
        (f"blocks.{layer}.hook_resid_pre", keep),
        (f"blocks.{layer}.hook_resid_post", put_back),
    ]


def _log_probs_skipped(run: Run, layer: int, positions: str) -> list[Tensor]:
    """Return log p of the run's tokens at each step's masks, nats, with a layer skipped."""
    steps = along_edited(run, _skip_hooks(layer, positions))
    return [log_p_of_written(run, step, log_probs) for step, log_probs, _ in steps]


@torch.no_grad()
def depth_redundancy(
    source: Any,
    texts: Any = None,
    *,
    block_size: Any = None,
    positions: str = "active",
    seed: int = 0,
    progress: bool | None = None,
) -> DepthRedundancy:
    """Measure what each layer changes at masked positions, and what skipping it costs, by step.

    Nothing needs to have been recorded. The run is replayed with its tokens pinned, once as it was
    and once for each skipped layer.

    Args:
        source: a finished run; or a bridge, or a checkpoint's name, beside ``texts``.
        texts: texts of one length, which are revealed in a random order; None beside a run.
        block_size: tokens per block, beside texts; the bridge's by default.
        positions: where a layer is skipped: at all positions of the ``"active"`` block, or at those
            that are ``"masked"`` alone.
        seed: random seed of that order.
        progress: show a bar over layers; by default on a terminal.

    Raises:
        InputError: for anything else, a run from a file that does not hold its functions, or the
            autoregressive baseline.
        NotExactError: where the bridge is no longer what the run was made with, or the run's own
            hooks return other values.
    """
    check_choice("positions", positions, ("active", "masked"))
    run = run_or_texts(source, texts, block_size, seed)
    layers, reader = range(run.bridge.cfg.n_layers), _Cosines()
    hooks: list[tuple[str, Any]] = []
    for layer in layers:
        hooks += [
            (f"blocks.{layer}.hook_resid_pre", reader.keep),
            (f"blocks.{layer}.hook_resid_post", reader.compare),
        ]
    cosines, base, masks_left = [], [], []
    for step, log_probs, _ in along(run, hooks=hooks):
        cosines.append(reader.take())
        base.append(log_p_of_written(run, step, log_probs))
        masks_left.append(step.masks_left)
    loss, revealed_loss = [], []
    with progress_bar("skipped layers", len(layers), progress) as update:
        for layer in layers:
            skipped = _log_probs_skipped(run, layer, positions)
            lost = [a - b for a, b in zip(base, skipped, strict=True)]
            loss.append(torch.stack([x.nanmean(1) for x in lost]))
            pairs = zip(lost, run.steps, strict=True)
            revealed_loss.append(
                torch.stack([x.where(step.revealed, 0.0).sum(1) for x, step in pairs])
            )
            update(advance=1)
    return DepthRedundancy(
        model=Path(run.bridge.cfg.model_name).name,
        block_size=run.block_size,
        positions=positions,
        cosine=torch.stack(cosines),
        loss=torch.stack(loss, dim=-1),
        revealed_loss=torch.stack(revealed_loss, dim=-1),
        tokens=(run.commit_step_all >= 0).sum(-1),
        masks_left=torch.stack(masks_left),
        contract=Contract(
            target="-log p of the run's own tokens, nats; cosine of a layer's input and output",
            edited=f"one layer at a time: its output is its input, at {positions} positions",
            fixed="tokens and order of the run, stored keys and values of finished blocks",
            masks="those that each step of the run met",
        ),
    )
