"""What the block size changes inside the model, on the same noised text.

The block size only changes which positions read which. The same dual view ``[x_t | x_0]`` runs at
block size a and at block size b, and the two passes are compared hook point by hook point; the
measures are in ``similarity``.

Position p of the noisy stream and of the clean stream are two keys: attention that goes from one to
the other has changed.

It does not say at which block size the model is better; ``sweep`` compares likelihoods.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.noised_text import (
    StreamChange,
    compare_passes,
    read_noised_text,
)
from transformer_lens_bd3lm.analysis.similarity import prediction_change
from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.model.inputs import read_block_size
from transformer_lens_bd3lm.result import Result, count, plain_values


@dataclass(frozen=True, repr=False)
class BlockSizeComparison(Result):
    """Similarity of two passes over one noised text, at two block sizes; float64 on the CPU.

    Attributes:
        model: the checkpoint's name.
        a: block size of one pass, as it was given.
        b: block size of the other.
        tokens: the finished texts x_0 ``[batch, pos]``.
        masked: which positions of x_t are masked ``[batch, pos]``.
        words: the first row's tokens as text.
        noisy: similarity of the noisy stream's residuals.
        clean: similarity of the clean stream's residuals; it never reads the noisy stream, but the
            block size changes its mask as well.
        attention_change: total variation distance between the attention of masked queries at a and
            b, mean over them ``[layer, head]``; 0 is the same, 1 has no key in common.
        noisy_share: share of that attention on the noisy stream, which is the query's own block;
            the rest is on earlier clean blocks. At a and at b ``[2, layer, head]``.
        kl: KL(p_a || p_b) in nats of the SUBS predictions at masked positions ``[batch, pos]``; NaN
            elsewhere.
    """

    model: str
    a: int | str
    b: int | str
    tokens: Int[Tensor, "batch pos"] = field(repr=False)
    masked: Bool[Tensor, "batch pos"] = field(repr=False)
    words: tuple[str, ...] = field(repr=False)
    noisy: StreamChange = field(repr=False)
    clean: StreamChange = field(repr=False)
    attention_change: Float[Tensor, "layer head"] = field(repr=False)
    noisy_share: Float[Tensor, "2 layer head"] = field(repr=False)
    kl: Float[Tensor, "batch pos"] = field(repr=False)

    @property
    def mean_kl(self) -> float:
        """Mean KL(p_a || p_b) over masked positions, nats."""
        return float(self.kl[self.masked].mean())

    @property
    def title(self) -> str:
        """Name of the model and the two block sizes."""
        return f"{self.model}: block size {self.a} → {self.b}"

    def _figures(self) -> str:
        return (
            f"{self.a} → {self.b}: mean KL {self.mean_kl:.4f} nats at "
            f"{count(int(self.masked.sum()), 'masked position')}, attention changes by "
            f"{float(self.attention_change.mean()):.2f} of 1"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all measures as plain values for JSON."""
        streams = {
            name: {
                "cosine": stream.cosine,
                "cka": stream.cka,
                "cka_by_position": stream.cka_by_position,
            }
            for name, stream in (("noisy", self.noisy), ("clean", self.clean))
        }
        values = {
            "model": self.model,
            "block_sizes": [self.a, self.b],
            "tokens": self.tokens,
            "masked": self.masked,
            "mean_kl_nats": self.mean_kl,
            "kl_nats": self.kl,
            "streams": streams,
            "attention_change": self.attention_change,
            "noisy_share": self.noisy_share,
        }
        return plain_values(values)


@torch.no_grad()
def compare_block_sizes(
    bridge: Bridge,
    tokens: Any,
    a: Any,
    b: Any,
    *,
    x_t: Any = None,
    seed: int = 0,
    hooks: Any = None,
    timesteps: Any = None,
) -> BlockSizeComparison:
    """Compare the passes of one model at block sizes a and b, on one noised text.

    It runs two dual passes (Arriola et al., section 3) and leaves the bridge's own block size as it
    is. The residuals and masked queries' attention of the first pass are kept until the second has
    been compared with them.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name, which is booted.
        tokens: a string, strings of equally many tokens, or ids ``[batch, pos]``; position 0 is
            BOS. Finished texts, without masks.
        a: a block size in tokens, or ``"full"``.
        b: another. At a block size that it was not trained at, a checkpoint is off-distribution.
        x_t: the ids with masks ``[batch, pos]``. By default each position but BOS is masked with
            probability 1/2, as a run under ``Noise(seed)`` is at time 1/2.
        seed: random seed of those masks.
        hooks: TransformerLens's ``[(name or filter, fn), ...]``, in both passes; they see
            ``[noisy | clean]``. Hooks that are set on the bridge fire too.
        timesteps: sigma of the passes, for checkpoints with time conditioning.

    Raises:
        InputError: for arguments that do not fit.
        BlockSizeError: for a block size that does not fit; for a checkpoint without blocks
            (``cross_attn=False``), every one.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        HookNameError: for a hook name that the bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: in training mode with dropout, which would make the passes differ by chance.
    """
    bridge = read_bridge(bridge)
    config = bridge.original_model.config
    for size in (a, b):
        read_block_size(size, config.model_length, config.cross_attn)
    require_eval(bridge)
    text = read_noised_text(bridge, tokens, x_t, seed)
    pass_hooks = read_pass_hooks(bridge, hooks)

    def pass_at(size: Any) -> Any:
        return partial(text.pass_at, size, timesteps, pass_hooks)

    change = compare_passes(pass_at(a), pass_at(b), text)
    masked = text.masked.cpu()
    kl = torch.full(masked.shape, torch.nan, dtype=torch.float64)
    kl[masked] = prediction_change(*change.logits, bridge.cfg.mask_token_id)
    noisy, clean = change.streams
    attention_change, *shares = change.attention
    return BlockSizeComparison(
        model=Path(bridge.cfg.model_name).name,
        a=a,
        b=b,
        tokens=text.tokens.cpu(),
        masked=masked,
        words=tuple(bridge.tokenizer.decode([token]) for token in text.tokens[0].tolist()),
        noisy=noisy,
        clean=clean,
        attention_change=attention_change,
        noisy_share=torch.stack(shares),
        kl=kl,
    )
