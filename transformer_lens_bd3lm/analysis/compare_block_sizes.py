"""What turning the dial changes inside the model, on the same noised text.

``block_size`` only changes who reads whom. The same dual view ``[x_t | x_0]`` runs at a setting a
and at a setting b, and the two passes are compared place by place; ``passes.py`` says how.

Position p of the noisy stream and of the clean stream are two keys: attention that goes from one to
the other has moved.

It does not say at which setting the model is better; the likelihood over the dial does.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from rich.table import Table
from rich.text import Text
from torch import Tensor

from transformer_lens_bd3lm.analysis.noised_text import (
    StreamChange,
    compare_passes,
    prediction_change,
    read_noised_text,
)
from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.model.inputs import read_block_size
from transformer_lens_bd3lm.result import Result


@dataclass(frozen=True)
class BlockSizeComparison(Result):
    """One noised text at two settings of the dial; float64 on the CPU.

    Attributes:
        model: the checkpoint's name.
        a: the dial of one pass, as it was given.
        b: the dial of the other.
        tokens: the finished texts x_0 ``[batch, pos]``.
        masked: where x_t hides them ``[batch, pos]``.
        words: the first row's tokens as text.
        noisy: residuals of the noisy stream.
        clean: residuals of the clean stream; it never reads the noisy one, but the dial turns its
            mask as well.
        attention_change: total variation distance between the attention of masked queries at a and
            b, mean over them ``[layer, head]``; 0 is the same, 1 is no key in common.
        noisy_share: of that attention, the part on the noisy stream, which is the query's own
            block; the rest is on earlier clean blocks. At a and at b ``[2, layer, head]``.
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
        """Which model, and between which settings."""
        return f"{self.model}: block size {self.a} → {self.b}"

    def table(self) -> Table:
        """A row a depth: what is left of the residuals, and how far attention moved."""
        table = Table(title=Text(self.title, "table.title"), title_justify="left")
        table.caption, table.caption_justify = self.caption(), "left"
        for name in (
            "after",
            "cosine\nnoisy",
            "cosine\nclean",
            "CKA\nnoisy",
            "CKA\nclean",
            "attn.\nchange",
            "most in\nhead",
            f"own block\n{self.a} → {self.b}",
        ):
            table.add_column(name, justify="left" if name == "after" else "right")
        layers = len(self.attention_change)
        for depth, name in enumerate(["embed", *(f"layer {i}" for i in range(layers))]):
            streams = (self.noisy, self.clean)
            alike = [float(s.cosine[depth].mean()) for s in streams]
            alike += [float(s.cka[depth]) for s in streams]
            attention = self.attention_cells(depth - 1) if depth else ["–"] * 3
            table.add_row(name, *map(two_figures, alike), *attention)
        return table

    def attention_cells(self, layer: int) -> list[str]:
        """One layer's mean change, the head that changes most, and the share on the own block."""
        change = self.attention_change[layer]
        head = int(change.argmax())
        shares = [two_figures(float(share)) for share in self.noisy_share[:, layer].mean(-1)]
        return [
            two_figures(float(change.mean())),
            f"{head} ({two_figures(float(change[head]))})",
            " → ".join(shares),
        ]

    def caption(self) -> str:
        """What the dial does to the predictions."""
        row, position = divmod(int(self.kl.nan_to_num(-1.0).argmax()), self.kl.shape[1])
        return (
            f"KL(p_{self.a} || p_{self.b}) at {int(self.masked.sum())} masked positions: mean "
            f"{self.mean_kl:.3f} nats, most {float(self.kl[row, position]):.3f} at position "
            f"{position}" + (f" of row {row}" if len(self.kl) > 1 else "")
        )


def two_figures(value: float) -> str:
    """A number between -1 and 1 in a table; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.2f}"


@torch.no_grad()
def compare_block_sizes(
    bridge: Any,
    tokens: Any,
    a: Any,
    b: Any,
    *,
    x_t: Any = None,
    seed: int = 0,
    hooks: Any = None,
    timesteps: Any = None,
) -> BlockSizeComparison:
    """What the dial changes inside the model between block sizes a and b, on one noised text.

    Two dual forwards; the bridge's own dial stays where it is. Of the first pass the residuals, and
    masked queries' attention, are kept until the second has been compared with them.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        tokens: a string, strings of equally many tokens, or ids ``[batch, pos]``; position 0 is
            BOS. Finished texts.
        a: a block size in tokens, or ``"full"``.
        b: another. A checkpoint at a block size that it was not trained at is off-distribution.
        x_t: the ids under masks of your choice ``[batch, pos]``. By default each position but BOS
            is masked with probability 1/2: as a run under ``Noise(seed)`` is at time 1/2.
        seed: of those masks.
        hooks: TransformerLens's ``[(name or filter, fn), ...]``, in both passes; they see
            ``[noisy | clean]``. Hooks that are set on the bridge fire too.
        timesteps: sigma of the forward, for checkpoints that see it.

    Raises:
        InputError: for what does not fit; a ``BlockSizeError`` also without blocks
            (``cross_attn=False``), where there is no dial.
        HookNameError: for a hook name that the bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: in training with dropout, which would change more than the dial does.
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

    found = compare_passes(pass_at(a), pass_at(b), text)
    masked = text.masked.cpu()
    kl = torch.full(masked.shape, torch.nan, dtype=torch.float64)
    kl[masked] = prediction_change(*found.logits, bridge.cfg.mask_token_id)
    noisy, clean = found.streams
    change, *shares = found.attention
    return BlockSizeComparison(
        model=Path(bridge.cfg.model_name).name,
        a=a,
        b=b,
        tokens=text.tokens.cpu(),
        masked=masked,
        words=tuple(bridge.tokenizer.decode([token]) for token in text.tokens[0].tolist()),
        noisy=noisy,
        clean=clean,
        attention_change=change,
        noisy_share=torch.stack(shares),
        kl=kl,
    )
