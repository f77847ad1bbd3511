"""Whether masks distract: the prediction at one masked position against how many masks stand where.

One token of a text is masked, the target. Further masks are put in three places (the question of
arXiv 2511.21338)::

    behind       positions behind the text's end that nothing is known about; they hide no token
    hides near   over the tokens of the block nearest to the target
    hides far    over the tokens of the block farthest from it

Masks that hide tokens take information away, so that the prediction should change. Masks behind the
text take none: in a language with one probability for each beginning, as ``grammar``, the
prediction at the target is the same with any number of them, and a change is the model's own error.

    change = log p(x_i | text, m further masks) - log p(x_i | text)           nats, by text

A distance between target and masks cannot be left free of tokens, so it is the target that moves:
at distance d it is the d-th token from the end of the text, and the masks begin d positions on.

A model is trained on whole blocks. A text that ends within its last block is off-distribution until
masks complete that block: 0 masks is the pass of a reader who gives the text alone, not a neutral
one.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.analysis.masked_predictions import (
    FinishedTexts,
    padded,
    read_finished,
    read_rows,
)
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values

PLACES = ("behind", "hides near", "hides far")


@dataclass(frozen=True, kw_only=True, repr=False)
class FarMasks(Result):
    """Log-probability of a masked token against the number and place of further masks, in nats.

    Attributes:
        model: the checkpoint's name.
        block_size: tokens per block.
        places: where the further masks stand: ``"behind"`` the text, where they hide nothing;
            ``"hides near"`` and ``"hides far"``: over the tokens of the block that are nearest to
            the target and farthest from it.
        distances: positions from the target to the first one behind the text.
        masks: numbers of further masks, beside that of the target; the first is 0.
        log_p: log-probability of the target's token ``[text, place, distance, number]``, nats; NaN
            where a text has fewer tokens to hide.
        true: the same under the true conditionals; None if none were given.
        effects: change of ``log_p`` against no further mask ``[place, distance, number]``: mean
            over texts, with intervals over whole texts, and p corrected for all cells.
        error: change of ``log_p`` minus that of ``true``; None without ``true``.
        trained_at: block sizes that the checkpoint was trained at, if ``block_size`` is none of
            them; else empty.
        contract: what was measured.
    """

    model: str
    block_size: int
    places: tuple[str, ...]
    distances: tuple[int, ...]
    masks: tuple[int, ...]
    log_p: Float[Tensor, "text place distance number"] = field(repr=False)
    true: Float[Tensor, "text place distance number"] | None = field(repr=False)
    effects: Effects = field(repr=False)
    error: Effects | None = field(repr=False)
    trained_at: tuple[int, ...] = field(repr=False)
    contract: Contract = field(repr=False)

    @property
    def change(self) -> Float[Tensor, "text place distance number"]:
        """Change of the log-probability against no further mask, nats."""
        return self.log_p - self.log_p[..., :1]

    @property
    def true_change(self) -> Float[Tensor, "place distance number"] | None:
        """Mean change under the true conditionals, nats; None without them."""
        return None if self.true is None else (self.true - self.true[..., :1]).mean(0)

    @property
    def title(self) -> str:
        """Model and block size."""
        return f"{self.model}: one prediction against further masks, block size {self.block_size}"

    def _figures(self) -> str:
        behind = self.effects.mean[0].abs().nan_to_num(-1)
        best = [int(i) for i in torch.unravel_index(behind.argmax(), behind.shape)]
        return (
            f"up to {count(self.masks[-1], 'mask')} behind a text change log p by "
            f"{self.effects.text(0, *best)} nats, {count(len(self.log_p), 'text')}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain values for JSON."""
        values = vars(self) | {
            "effects": self.effects.to_dict(),
            "error": None if self.error is None else self.error.to_dict(),
            "true_change": self.true_change,
            "contract": vars(self.contract),
        }
        return plain_values(values)


@torch.no_grad()
def far_masks(
    bridge: Bridge,
    texts: Any,
    *,
    masks: Sequence[int] | None = None,
    distances: Sequence[int] | None = None,
    block_size: int | str | None = "full",
    truth: Callable[..., Tensor] | None = None,
    rows: int = 4096,
    progress: bool | None = None,
) -> FarMasks:
    """Compute the prediction at one masked position against how many masks stand where.

    Hooks that are set on the bridge fire.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        texts: strings of any lengths, or ids ``[batch, pos]`` that may be padded; position 0 is
            BOS. A text must end within its last block: masks behind it need room there.
        masks: numbers of further masks; by default 1, 2, 4, 8 and so on, and as many as the block
            of every text has room for. 0 is always measured.
        distances: positions from the target to the first one behind the text, 1 is its last token;
            by default 1, 2, 4, 8 and so on, as far as the last block of every text reaches back.
        block_size: tokens per block, or ``"full"``; the bridge's if None.
        truth: true conditionals, as :func:`grammar.conditional`: called with ids ``[row, pos]`` and
            ``block_size=``, it returns probabilities ``[row, pos, d_vocab]``.
        rows: largest number of positions in one pass.
        progress: whether a progress bar is shown; by default on a terminal.

    Raises:
        InputError: for arguments that do not fit, texts that leave no room in their last block,
            and the autoregressive baseline.
        BlockSizeError: for a value that is not a block size of this checkpoint.
        NotExactError: with time conditioning, in training mode with dropout, or where predictions
            are NaN.
        CheckpointError: for a name whose checkpoint cannot be loaded.
    """
    bridge = read_bridge(bridge)
    if block_size == "full" and not bridge.original_model.config.cross_attn:
        block_size = None
    finished = read_finished(bridge, texts, block_size, rows=rows)
    finished = replace(finished, block_size=block_size_of(bridge, block_size))
    if truth is not None and not callable(truth):
        raise InputError(f"truth={truth!r}: give a function, as bd3lm.grammar.conditional")
    words = [row.cpu() for row in read_rows(bridge, texts)]
    size, mask_id = finished.block_size, bridge.cfg.mask_token_id
    numbers, away = _read_cells(words, size, masks, distances)
    hidden = min(len(row) - _first(row, size) for row in words) - 1

    shape = (len(words), len(PLACES), len(away), len(numbers))
    log_p = torch.full(shape, torch.nan, dtype=torch.float64)
    true = None if truth is None else log_p.clone()
    targets = [(row, len(row) - distance) for row in words for distance in away]
    at = torch.tensor([at for _, at in targets])
    token = torch.stack([row[i] for row, i in targets])
    cells = [(0, 0), *itertools.product(range(len(PLACES)), range(1, len(numbers)))]
    with progress_bar("masking", len(cells), progress) as move:
        for place, number in cells:
            move(advance=1)
            more = numbers[number]
            if place and more > hidden:
                continue
            x_t = [_masked(row, i, PLACES[place], more, size, mask_id) for row, i in targets]
            values = _predicted(finished, x_t, at, token)
            log_p[:, place, :, number] = values.view(len(words), -1)
            if true is not None and truth is not None:
                values = _true(truth, x_t, at, token, size)
                true[:, place, :, number] = values.view(len(words), -1)
    for values in (log_p,) if true is None else (log_p, true):
        values[:, 1:, :, 0] = values[:, :1, :, 0]
    change = log_p - log_p[..., :1]
    return FarMasks(
        model=Path(bridge.cfg.model_name).name,
        block_size=size,
        places=PLACES,
        distances=away,
        masks=numbers,
        log_p=log_p,
        true=true,
        effects=mean_effects(change),
        error=None if true is None else mean_effects(change - true + true[..., :1]),
        trained_at=finished.trained_at,
        contract=Contract(
            target="log p of the token at one masked position, minus the same without further "
            "masks; nats",
            edited="further masks: appended behind the text, or over tokens of its last block",
            fixed="the text, and the position of the target; earlier blocks are clean",
            masks="the target and the further masks alone; a text whose last block is not complete "
            "is off-distribution, which masks behind it mend",
        ),
    )


def _first(row: Int[Tensor, " pos"], size: int) -> int:
    """Return the first position of a text's last block that may be masked; BOS may not."""
    return max((len(row) - 1) // size * size, 1)


def _doubled(most: int) -> list[int]:
    """Return 1, 2, 4, 8 and so on, up to ``most``."""
    return [2**i for i in range(most.bit_length())]


def _read_cells(
    words: list[Tensor], size: int, masks: Any, distances: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return numbers of further masks, 0 first, and distances; both ascending, without repeats.

    Raises:
        InputError: for none, for values outside the block, and texts that leave no room.
    """
    ends = [-len(row) % size for row in words]
    room, reach = min(ends), min(len(row) - _first(row, size) for row in words)
    if not room:
        raise InputError(
            f"text {ends.index(0)} of {len(words[ends.index(0)])} tokens completes its last block "
            f"(block size {size}): give a text that ends within a block, or a larger block_size"
        )
    if masks is None:
        masks = [*_doubled(room), room]
    if distances is None:
        distances = _doubled(reach)
    for name, values in (("masks", masks), ("distances", distances)):
        if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
            raise InputError(f"{name}={values!r}: give ints, as (1, 2, 4)")
    rule = f"give numbers of masks in 0..{room}, the room in each text's last block of {size}"
    numbers = {0, *(check_int("masks", each, 0, room, rule) for each in masks)}
    if len(numbers) == 1:
        raise InputError(f"masks={masks!r}: {rule}, and one above 0")
    rule = f"give distances in 1..{reach}, counted back from each text's end within its last block"
    away = {check_int("distances", each, 1, reach, rule) for each in distances}
    return tuple(sorted(numbers)), tuple(sorted(away))


def _masked(
    row: Int[Tensor, " pos"], at: int, place: str, number: int, size: int, mask_id: int
) -> Int[Tensor, " longer"]:
    """Return a text with its target masked, and a number of further masks in a place."""
    x_t = row.clone()
    x_t[at] = mask_id
    if place == "behind":
        return torch.cat([x_t, x_t.new_full((number,), mask_id)])
    others = [i for i in range(_first(row, size), len(row)) if i != at]
    others.sort(key=lambda i: abs(i - at), reverse=place == "hides far")
    x_t[others[:number]] = mask_id
    return x_t


def _predicted(
    texts: FinishedTexts,
    x_t: list[Tensor],
    at: Int[Tensor, " row"],
    token: Int[Tensor, " row"],
) -> Float[Tensor, " row"]:
    """Compute log p of each row's token at its target, nats."""
    ids = padded(texts.bridge, x_t)
    masked = (ids == texts.bridge.cfg.mask_token_id).cpu()
    batch = replace(texts, tokens=ids, counted=masked)
    values = []
    for part in batch.parts(len(x_t)):
        log_p = batch.log_probs(batch.tokens[part])
        row = torch.arange(len(log_p))
        values.append(log_p[row, at[part], token[part]].cpu().double())
    return torch.cat(values)


def _true(
    truth: Callable[..., Tensor],
    x_t: list[Tensor],
    at: Int[Tensor, " row"],
    token: Int[Tensor, " row"],
    size: int,
) -> Float[Tensor, " row"]:
    """Compute the true log p of each row's token at its target, nats; rows of a length together."""
    values = torch.empty(len(x_t), dtype=torch.float64)
    for length in {len(row) for row in x_t}:
        same = torch.tensor([i for i, row in enumerate(x_t) if len(row) == length])
        p = truth(torch.stack([x_t[i] for i in same]), block_size=size)
        values[same] = p[torch.arange(len(same)), at[same], token[same]].cpu().double().log()
    return values
