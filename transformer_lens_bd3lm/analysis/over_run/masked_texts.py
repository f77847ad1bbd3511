"""Given texts under drawn masks: predictions and activations at the masked positions.

At time t every position but the first is masked with probability t, by the reveal times of
``Noise``; the blocks before are read without masks, as in training.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.over_run.written import quarter_of
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.host import Bridge, require_bridge
from transformer_lens_bd3lm.bridge.texts import is_ids, read_ids, tokens_of
from transformer_lens_bd3lm.checks import check_finished, is_real
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.ids import check_ids
from transformer_lens_bd3lm.model.subs import masked_log_probs

TIMES = (1.0, 0.75, 0.5, 0.25)
"""Default times of the masks, each the probability that a token is masked."""

_ROWS = 64  # texts in a pass


@dataclass(frozen=True)
class MaskedTexts:
    """Finished texts, sorted by length, and times at which they are masked.

    Attributes:
        bridge: a BD3LM bridge.
        texts: ids of each text.
        size: tokens per block; None without blocks.
        times: times of the masks.
        seed: random seed of the masks.
    """

    bridge: Bridge
    texts: list[Tensor]
    size: int | None
    times: tuple[float, ...]
    seed: int

    def batches(self) -> list[tuple[list[int], int]]:
        """Return the numbers of the texts of each pass, and the number of its time."""
        by_length: dict[int, list[int]] = {}
        for number, ids in enumerate(self.texts):
            by_length.setdefault(len(ids), []).append(number)
        parts = [
            numbers[i : i + _ROWS] for numbers in by_length.values()
            for i in range(0, len(numbers), _ROWS)
        ]  # fmt: skip
        return [(part, time) for time in range(len(self.times)) for part in parts]

    def masks(self, numbers: list[int], time: int) -> "TextMasks":
        """Return the masks of some texts of one length, at a time."""
        ids = torch.stack([self.texts[i] for i in numbers])
        masked = Noise(self.seed, rows=numbers).times(len(ids), 0, ids.shape[1]) < self.times[time]
        masked[:, 0] = False
        return TextMasks(ids, masked, torch.tensor(numbers), self.size, time)

    def passes(
        self, update: Callable[..., None], names: Sequence[str] = ()
    ) -> Iterator[tuple["TextMasks", Float[Tensor, "entry d_vocab"], dict[str, Tensor]]]:
        """Run every batch: yield masks, log-probabilities in nats, and activations by name.

        Predictions and activations ``[entry, ...]`` are of the masked positions, row-major.
        """
        bridge = self.bridge
        mask_id = bridge.cfg.mask_token_id
        for numbers, time in self.batches():
            masks, seen = self.masks(numbers, time), {}
            where = masks.masked.to(bridge.cfg.device)

            def see(x: Tensor, hook: Any, name: str, where: Tensor, seen: dict) -> None:
                seen[name] = x[:, : where.shape[1]][where].detach()

            fns = [(name, partial(see, name=name, where=where, seen=seen)) for name in names]
            ids = masks.ids.to(bridge.cfg.device)
            dual = {} if self.size is None else {"clean": ids, "block_size": self.size}
            with torch.no_grad(), read_pass_hooks(bridge, fns or None).on():
                logits = bridge(ids.masked_fill(where, mask_id), **dual)
            yield masks, masked_log_probs(logits[where].cpu().double(), mask_id), seen
            update(advance=1)


@dataclass(frozen=True)
class TextMasks:
    """Masks of some texts of one length; entries are the masked positions, row-major.

    Attributes:
        ids: the finished texts ``[batch, pos]``.
        masked: which positions are masked ``[batch, pos]``.
        numbers: number of each row's text ``[batch]``.
        size: tokens per block; None without blocks.
        time: number of the time.
    """

    ids: Int[Tensor, "batch pos"]
    masked: Bool[Tensor, "batch pos"]
    numbers: Int[Tensor, " batch"]
    size: int | None
    time: int

    @property
    def position(self) -> Int[Tensor, " entry"]:
        """Position of each entry."""
        return self.masked.nonzero()[:, 1]

    @property
    def text(self) -> Int[Tensor, " entry"]:
        """Number of each entry's text."""
        return self.numbers[self.masked.nonzero()[:, 0]]

    @property
    def token(self) -> Int[Tensor, " entry"]:
        """The true token of each entry."""
        return self.ids[self.masked]

    @property
    def block(self) -> Int[Tensor, " entry"]:
        """Block of each entry."""
        return self.position // (self.size or self.ids.shape[1])

    @property
    def masks_left(self) -> Int[Tensor, " entry"]:
        """Masks in the entry's block."""
        return self._in_block(self.masked)

    @property
    def quarter(self) -> Int[Tensor, " entry"]:
        """Bin of the share of the block's positions after BOS that are masked."""
        maskable = torch.ones_like(self.masked)
        maskable[:, 0] = False
        return quarter_of(self.masks_left, self._in_block(maskable))

    def _in_block(self, which: Bool[Tensor, "batch pos"]) -> Int[Tensor, " entry"]:
        """Count positions of each entry's block."""
        n = which.shape[1]
        block = torch.arange(n) // (self.size or n)
        counts = torch.zeros(len(which), int(block[-1]) + 1, dtype=torch.long)
        counts.index_add_(1, block, which.long())
        return counts[:, block][self.masked]


def read_masked_texts(
    bridge: Any, texts: Any, block_size: Any, times: Any, seed: int
) -> MaskedTexts:
    """Check texts and times, before anything is run.

    Raises:
        InputError: for the autoregressive baseline, and for texts or times that do not fit.
        BlockSizeError: for a value that is not a block size of this checkpoint.
    """
    bridge = require_bridge(bridge)
    config = bridge.original_model.config
    if config.causal:
        raise InputError(
            "this checkpoint is the autoregressive baseline (causal=True): it has never seen a mask"
        )
    if isinstance(texts, str):
        texts = [texts]
    if is_ids(texts):
        rows = list(read_ids(bridge, texts, "texts").cpu())
    elif isinstance(texts, list | tuple) and texts and isinstance(texts[0], str):
        rows = tokens_of(bridge, texts, True)
    elif isinstance(texts, list | tuple) and texts and all(is_ids(ids) for ids in texts):
        rows = [check_ids(ids[None], config.vocab_size, "texts")[0].cpu() for ids in texts]
    else:
        raise InputError(f"texts={type(texts).__name__}: give strings, or ids of each text")
    for number, ids in enumerate(rows):
        if not 2 <= len(ids) <= config.model_length:
            raise InputError(
                f"texts[{number}] has {len(ids)} tokens: give BOS and at least one more, at most "
                f"{config.model_length}"
            )
        check_finished(f"texts[{number}]", ids, bridge.cfg.mask_token_id)
    listed = isinstance(times, tuple | list) and len(times) > 0
    if not listed or not all(is_real(time) and 0 < time <= 1 for time in times):
        raise InputError(f"times={times}: give a list of times above 0 and at most 1")
    size = block_size_of(bridge, block_size) if config.cross_attn else None
    return MaskedTexts(bridge, rows, size, tuple(float(t) for t in times), seed)
