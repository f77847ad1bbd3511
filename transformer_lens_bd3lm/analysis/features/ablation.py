"""What a feature does: predictions with it, without it, and with as large a change at random.

At every row where feature f is active, the activation x becomes, with the error kept::

    without     x' = x + c,        c = decode(f set to 0) - decode(f)
    at random   x' = x + |c| u,    u one random unit vector

Blocks in which the feature is active nowhere are not run: nothing changes there. Of each of the
others the three arms run as the same rows of a pass. Sums over masked rows have the NELBO's
weights, so the change of the NELBO, and the divergence sum KL(with || without), are in nats a text.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from transformer_lens_bd3lm.analysis.features.noised import NoisedBlocks, by_place
from transformer_lens_bd3lm.analysis.lens import MODULATION, lens_names, read_out
from transformer_lens_bd3lm.analysis.sae.splice import Splice
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks


@dataclass(frozen=True)
class RandomChange:
    """Hook that changes an activation along one random direction, as far as a splice would.

    Attributes:
        splice: the splice whose change is measured, row by row.
        seed: random seed of the direction.

    Raises:
        InputError: for a seed that is no int from 0 on.
    """

    splice: Splice
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("seed", self.seed, 0, 2**63 - 1)

    @property
    def hooks(self) -> list[Any]:
        """TransformerLens's ``[(name, fn)]``."""
        return [(self.splice.name, self)]

    def at(self, **selectors: Any) -> StepHooks:
        """Return the change at chosen steps of the denoising loop; see :meth:`Splice.at`.

        Raises:
            InputError: for selectors that do not fit.
        """
        return StepHooks().add(self.splice.name, self, **selectors)

    def __call__(self, activation: Tensor, hook: HookPoint) -> Tensor:
        """Return the activation, changed; its rows are those of its first two axes."""
        change = self.splice(activation, hook) - activation
        generator = torch.Generator().manual_seed(self.seed)
        u = torch.randn(activation.shape[2:], generator=generator, dtype=torch.float64)
        size = change.flatten(2).norm(dim=-1).reshape(*change.shape[:2], *[1] * u.dim())
        return activation + size * (u / u.norm()).to(activation)


@dataclass(frozen=True)
class Ablation:
    """Sums over the texts of one feature's ablation, float64, on the CPU.

    Attributes:
        nelbo: change of the NELBO without the feature, and at random ``[2, text, masks]``, nats.
        kl: divergence of the predictions, in the same two arms ``[2, text, masks]``, nats.
        own: the part of ``nelbo`` at masked rows where the feature is active.
        own_weight: weight of these rows in the NELBO ``[text, masks]``.
        measured: probability of each word with the feature minus without it, summed over these
            rows by weight ``[d_vocab]``.
        direct: what the feature writes, through the final norm and unembedding: the word's logit
            minus the mean over words, summed likewise ``[d_vocab]``.
        log_p: log p of the true tokens without the feature ``[block, place]`` of each length.
    """

    nelbo: Float[Tensor, "2 text masks"]
    kl: Float[Tensor, "2 text masks"]
    own: Float[Tensor, "2 text masks"]
    own_weight: Float[Tensor, "text masks"]
    measured: Float[Tensor, " d_vocab"]
    direct: Float[Tensor, " d_vocab"]
    log_p: list[Tensor] = field(default_factory=list)


def writes_residual(name: str) -> bool:
    """Whether what changes at a hook point is added to the residual stream as it is."""
    spec = lookup(name)
    return spec.kind in ("residual stream", "residual write") and spec.axes == "batch pos d_model"


def ablate(
    noised: list[NoisedBlocks],
    active: list[Tensor],
    splice: Splice,
    seed: int,
    texts: int,
    most: int,
) -> Ablation:
    """Run the blocks in which a feature is active, with it, without it, and changed at random.

    Args:
        noised: the blocks of the texts of each length.
        active: the feature's activation in them.
        splice: the splice that sets the feature to 0.
        seed: random seed of the direction of the control.
        texts: number of all texts.
        most: largest number of masks in a block.
    """
    bridge = noised[0].passes.bridge
    words = bridge.original_model.config.vocab_size
    nelbo, kl, own = torch.zeros(3, 2, texts, most, dtype=torch.float64)
    measured, direct = torch.zeros(2, words, dtype=torch.float64)
    own_weight = torch.zeros(texts, most, dtype=torch.float64)
    sums = Ablation(nelbo, kl, own, own_weight, measured, direct)
    for blocks, values in zip(noised, active, strict=True):
        log_p = torch.full(values.shape, torch.nan, dtype=torch.float64)
        on = values.nan_to_num() != 0
        for part in blocks.parts(on.any(-1)):
            log_p[part] = _add(sums, blocks, part, on[part], splice, RandomChange(splice, seed))
        sums.log_p.append(log_p)
    return sums


def _add(
    sums: Ablation,
    blocks: NoisedBlocks,
    part: Tensor,
    on: Tensor,
    splice: Splice,
    control: RandomChange,
) -> Float[Tensor, "block place"]:
    """Add the blocks of one pass; return log p of their true tokens without the feature."""
    noisy = blocks.noisy(part)
    block, place = (x[noisy.masked_rows] for x in noisy.rows)
    seen: dict[str, Tensor] = {}
    reading, idle = (_readers(blocks, splice.name, to) for to in (seen, {}))
    base = blocks.log_probs(noisy, reading)

    def without(activation: Tensor, hook: HookPoint) -> Tensor:
        edited = splice(activation, hook)
        seen["change"] = edited - activation
        return edited

    arms = [blocks.log_probs(noisy, [*idle, (splice.name, fn)]) for fn in (without, control)]
    true = blocks.passes.true(noisy)[noisy.masked_rows, None].cpu()
    weight = (blocks.share[part] / noisy.masked.sum(-1))[block]
    cell = (blocks.text_number[part][block], noisy.masked.sum(-1)[block] - 1)
    here = on[block, place]
    sums.own_weight.index_put_(cell, weight * here, accumulate=True)
    for number, arm in enumerate(arms):
        lost = (base - arm).gather(-1, true)[:, 0] * weight
        # The mask's own -inf has probability 0 in both.
        kl = torch.where(base.isfinite(), base.exp() * (base - arm), 0.0).sum(-1) * weight
        for total, values in ((sums.nelbo, lost), (sums.kl, kl), (sums.own, lost * here)):
            total[number].index_put_(cell, values, accumulate=True)
    at = here.nonzero()[:, 0]
    sums.measured.add_(weight[at] @ (base[at].exp() - arms[0][at].exp()))
    if writes_residual(splice.name) and len(at):
        sums.direct.add_(weight[at] @ _direct(blocks, seen, at))
    return by_place(noisy, arms[0].gather(-1, true)[:, 0])


def _readers(blocks: NoisedBlocks, name: str, seen: dict[str, Tensor]) -> list[tuple[str, Any]]:
    """Return hooks that keep what the read-out reads, and one at the spliced point.

    All arms have them, so that all run the same kernels.
    """
    names = lens_names(blocks.passes.bridge)
    last = max(i for i, each in enumerate(names) if each not in MODULATION)
    wanted = names[last:] if writes_residual(name) else []

    def reader(key: str) -> Any:
        def keep(x: Tensor, hook: HookPoint) -> None:
            seen["residual" if key == names[last] else key] = x

        return key, keep

    return [(name, lambda x, hook: None), *map(reader, wanted)]


def _direct(
    blocks: NoisedBlocks, seen: dict[str, Tensor], at: Tensor
) -> Float[Tensor, "token d_vocab"]:
    """Return each word's logit with the feature's own write minus without it, less their mean.

    The change is taken from the last residual stream alone: no layer between reads it. Norm and
    modulation are those of the row, with and without it.
    """
    bridge, residual = blocks.passes.bridge, seen["residual"]
    change, row = seen["change"], torch.zeros_like(at)
    with_it, without = (
        read_out(bridge, x, seen, row, at).cpu().double() for x in (residual, residual + change)
    )
    moved = (with_it - without).masked_fill(with_it.isinf(), 0.0)
    return (moved - moved.sum(-1, keepdim=True) / (moved.shape[-1] - 1)).masked_fill(
        with_it.isinf(), 0.0
    )
