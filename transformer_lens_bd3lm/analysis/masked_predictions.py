"""Finished texts of any lengths, and the model's whole predictions where some of it is masked.

``likelihoods.masked_passes`` reads the log-probability of the true token alone; here every word's
is read, so that tokens can be drawn, and distributions compared. With several blocks a pass is the
dual view ``[x_t | x_0]``: each block reads the clean text before it, and no other block's masks. So
all blocks of a text are measured at once. Padding is hidden, and nothing is predicted there.

Predictions must not depend on t: with time conditioning there is one for each t.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.distribution import masks_anywhere
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.texts import refuse_path, tokens_of
from transformer_lens_bd3lm.checks import check_finished, check_int
from transformer_lens_bd3lm.denoising.canvas import read_prompts
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.model.config import trained_block_sizes
from transformer_lens_bd3lm.model.modules import at_least_float32
from transformer_lens_bd3lm.model.subs import masked_log_probs


@dataclass(frozen=True)
class FinishedTexts:
    """Finished texts of any lengths at one block size.

    Attributes:
        bridge: a BD3LM bridge.
        tokens: the texts ``[batch, pos]`` on the bridge's device, padded on the right.
        counted: which positions may be masked ``[batch, pos]``, on the CPU: all but those given and
            the padding.
        block_size: tokens per block, at most the length of the longest text.
        trained_at: block sizes that the checkpoint was trained at, if the one asked for is none of
            them; else empty.
        rows: largest number of positions in one pass, unless one text has more.
    """

    bridge: Bridge
    tokens: Int[Tensor, "batch pos"]
    counted: Bool[Tensor, "batch pos"]
    block_size: int
    trained_at: tuple[int, ...]
    rows: int

    @property
    def lengths(self) -> list[int]:
        """Number of counted tokens of each text."""
        return self.counted.sum(-1).tolist()

    def by_block(self, x: Shaped[Tensor, "*dims pos"]) -> Shaped[Tensor, "*dims block place"]:
        """Cut positions into blocks; the last one is filled up with zeros."""
        size = self.block_size
        return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))

    def log_probs(
        self, x_t: Int[Tensor, "row pos"], text: Int[Tensor, " row"] | None = None
    ) -> Float[Tensor, "row pos d_vocab"]:
        """Compute ``log p(x_i | x_t)`` of every word, in nats, as if each position were masked.

        Args:
            x_t: ids with masks of each row, on the bridge's device.
            text: number of each row's text, whose clean tokens earlier blocks are read from.
                Without it, rows may end early, and only the last block of a row may have masks.

        Returns:
            float32 or wider, on the bridge's device; the mask's own is -inf. Only predictions at
            masked positions are trained.

        Raises:
            NotExactError: if a prediction at a masked position is NaN.
        """
        bridge, masked = self.bridge, x_t == self.bridge.cfg.mask_token_id
        kwargs: dict[str, Any] = {}
        if bridge.original_model.config.cross_attn:
            dual = text is not None and self.block_size < x_t.shape[1]
            kwargs = {"clean": self.tokens[text]} if dual else {"sample_mode": True}
            kwargs["block_size"] = self.block_size
        with masks_anywhere(bridge):
            logits = at_least_float32(bridge(x_t, **kwargs))
        log_p = masked_log_probs(logits, bridge.cfg.mask_token_id)
        if bool(log_p.isnan().any(-1)[masked.to(log_p.device)].any()):
            raise NotExactError(f"predictions are NaN in {logits.dtype}: boot in a wider dtype")
        return log_p

    def parts(self, rows: int, numbers: int = 1) -> Iterator[slice]:
        """Yield slices of ``rows`` rows, each small enough for one pass.

        Args:
            rows: number of rows.
            numbers: whole predictions that are kept for each position at a time.
        """
        n = self.tokens.shape[1]
        kept = numbers * n * self.bridge.original_model.config.vocab_size
        at_once = max(min(self.rows // n, 2**26 // kept), 1)
        for start in range(0, rows, at_once):
            yield slice(start, min(start + at_once, rows))


def require_masks(bridge: Bridge) -> None:
    """Refuse a checkpoint whose predictions under masks are not one distribution each.

    Raises:
        InputError: for the autoregressive baseline.
        NotExactError: with time conditioning, or in training mode with dropout.
    """
    config = bridge.original_model.config
    if config.causal:
        raise InputError(
            "this checkpoint is the autoregressive baseline (causal=True): it has never seen a "
            "mask, and writes one token at a time; give a checkpoint that is trained on masks"
        )
    if config.time_conditioning:
        raise NotExactError(
            "this checkpoint sees t (time_conditioning=True): its prediction under a mask pattern "
            "depends on t, so there is not one order or joint distribution to measure"
        )
    require_eval(bridge)


def read_rows(bridge: Bridge, texts: Any) -> list[Tensor]:
    """Return the ids of each text, at any length: BOS and the text's own tokens.

    Raises:
        InputError: for anything but strings or ids, and for the name of a file.
    """
    given = [texts] if isinstance(texts, str) else texts
    if isinstance(given, list | tuple) and given and all(isinstance(x, str) for x in given):
        for text in given:
            refuse_path(text, "texts")
        given = tokens_of(bridge, given, prepend_bos=True)
    return read_prompts(bridge, given)


def padded(bridge: Bridge, rows: list[Tensor]) -> Int[Tensor, "batch pos"]:
    """Return rows of ids as a batch on the bridge's device, padded on the right."""
    pad_id: Any = bridge.cfg.pad_token_id
    ids = pad_sequence(rows, batch_first=True, padding_value=-1 if pad_id is None else pad_id)
    return ids.to(bridge.cfg.device)


def read_finished(
    bridge: Bridge, texts: Any, block_size: Any = None, given: int = 1, rows: int = 4096
) -> FinishedTexts:
    """Check texts and a block size; nothing is run.

    Args:
        bridge: a BD3LM bridge.
        texts: strings, or ids ``[batch, pos]`` that may be padded.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        given: number of leading positions that are never masked; 1 is BOS alone.
        rows: largest number of positions in one pass.

    Raises:
        InputError: for arguments that do not fit, and for the autoregressive baseline.
        BlockSizeError: for a value that is not a block size of this checkpoint.
        NotExactError: with time conditioning, or in training mode with dropout.
    """
    require_masks(bridge)
    config = bridge.original_model.config
    check_int("rows", rows, 1)
    words = read_rows(bridge, texts)
    asked = block_size_of(bridge, block_size)
    shortest, longest = min(map(len, words)), max(map(len, words))
    if not 2 <= shortest <= longest <= config.model_length:
        raise InputError(
            f"texts of {shortest} to {longest} tokens: give BOS and at least one more, at most "
            f"{config.model_length}"
        )
    rule = f"give at least 1 (BOS), and leave a token of each text to count (1..{shortest - 1})"
    check_int("given", given, 1, shortest - 1, rule)
    for row in words:
        check_finished("texts", row, bridge.cfg.mask_token_id)
    place = torch.arange(longest)
    trained = trained_block_sizes(config)
    return FinishedTexts(
        bridge=bridge,
        tokens=padded(bridge, words),
        counted=(place >= given) & (place < torch.tensor([len(row) for row in words])[:, None]),
        block_size=min(asked, longest),
        trained_at=() if asked in trained else trained,
        rows=rows,
    )
