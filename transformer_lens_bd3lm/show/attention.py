"""Attention by query and key in both views, with streams, blocks and masked positions marked."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.texts import read_ids
from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.masks import dual_mask, sampling_mask
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.style import (
    INK,
    LIGHT_TO_DARK,
    ORANGE,
    QUIET,
    WIDTH,
    heat_map,
    label_tokens,
    write_caption,
    write_title,
)

_HIDDEN = "#d9d9d9"  # where the block size lets no query look
_BLOCKS = 64  # more borders than that would cover the map
_WHAT = "attention weight; gray: not read at this block size"


def attention_view(
    bridge: Bridge,
    cache: Any,
    x_t: Any,
    layer: int,
    head: int | None = None,
    *,
    clean: Any = None,
    block_size: int | str | None = None,
    row: int = 0,
) -> Figure:
    """Draw one head, or a panel a head; see :func:`.pictures.plot_attention`."""
    check_int("layer", layer, 0, bridge.cfg.n_layers - 1)
    ids = read_ids(bridge, x_t, "x_t")
    check_int("row", row, 0, len(ids) - 1)
    both = ids
    if clean is not None:
        beside = read_ids(bridge, clean, "clean")
        if len(beside) != len(ids):
            rows = count(len(beside), "row")
            raise InputError(f"clean has {rows}, x_t has {len(ids)}: give as many")
        both = torch.cat([ids, beside], 1)
    pattern = _pattern_of(cache, layer, row, len(ids))
    size = block_size_of(bridge, block_size)
    length = ids.shape[1]
    visible = _visible(bridge, pattern, both.shape[1], length, clean is not None, size)
    heads = range(len(pattern)) if head is None else [head]
    check_int("head", heads[-1], 0, len(pattern) - 1)
    words = [_word(bridge, i) for i in both[row].tolist()]
    masked = (ids[row] == bridge.cfg.mask_token_id).nonzero()[:, 0].tolist()
    first = len(words) - pattern.shape[1]  # the first query
    across = min(len(heads), 3)
    down = -(-len(heads) // across)
    side = min(max(0.17 * len(words) + 2.2, 4.6), WIDTH)
    high = side + 0.4 if len(heads) == 1 else 2.3 * down + 1.4
    high = high * (0.45 + 0.55 * pattern.shape[1] / len(words)) if len(heads) == 1 else high
    figure = Figure(figsize=(side if len(heads) == 1 else WIDTH, high), layout="constrained")
    grid = figure.add_gridspec(down + 1, across, height_ratios=(0.06, *[1.0] * down))
    scale, most = figure.add_subplot(grid[0, :]), float(pattern[list(heads)].max())
    for i, number in enumerate(heads):
        axes = figure.add_subplot(grid[1 + i // across, i % across])
        values = pattern[number].masked_fill(~visible, torch.nan)
        heat_map(axes, None if i else scale, values, first, (0.0, most), LIGHT_TO_DARK, _WHAT)
        axes.set_facecolor(_HIDDEN)
        label_tokens(axes.xaxis, words, 48 if len(heads) == 1 else 8)
        label_tokens(axes.yaxis, words, 48 if len(heads) == 1 else 8)
        _mark(axes, first, len(words), length, size if bridge.cfg.cross_attn else length, masked)
        axes.set(xlabel="key", ylabel="query" if i % across == 0 else "")
        if len(heads) > 1:
            axes.set_label(f"head {layer}.{number}")
            axes.set_title(f"{layer}.{number}", loc="left", fontsize=9, color=INK)
    view = "" if not bridge.cfg.cross_attn else ", dual view" if len(words) > length else ""
    which = f"head {layer}.{head}" if head is not None else f"heads of layer {layer}"
    write_title(figure, f"Attention, {which}, block size {size}{view}")
    caption = "triangles: masked positions" if masked else ""
    write_caption(figure, "; ".join(filter(None, [caption, "dotted: blocks" * (size > 1)])))
    return figure


def _pattern_of(cache: Any, layer: int, row: int, rows: int) -> Float[Tensor, "head query key"]:
    """Return a row's pattern of a layer, from a cache or as it is given.

    Raises:
        InputError: if there is none, or it has other axes.
    """
    name = f"blocks.{layer}.attn.hook_pattern"
    pattern = cache
    if not isinstance(cache, Tensor):
        try:
            pattern = cache[name]
        except (KeyError, TypeError) as error:
            raise InputError(f"cache: {name} is not in it: run with it in names_filter") from error
    shape = list(pattern.shape) if isinstance(pattern, Tensor) else type(pattern).__name__
    if isinstance(pattern, Tensor) and pattern.dim() == 3 and rows == 1:  # without the batch's axis
        pattern = pattern[None]
    fits = isinstance(pattern, Tensor) and pattern.dim() == 4 and len(pattern) == rows
    if not fits or not pattern.numel():
        raise InputError(
            f"pattern of {shape}: give [batch, head, query, key] with {rows} rows, as x_t has"
        )
    if pattern.is_complex() or not bool(((pattern >= 0) & (pattern < torch.inf)).all()):
        raise InputError(
            "the pattern has negative weights, NaN or infinity: attention weights are shares; "
            "plot_heat_map draws other values"
        )
    return pattern[row].detach().cpu().to(torch.float64)


def _visible(
    bridge: Bridge,
    pattern: Float[Tensor, "head query key"],
    keys: int,
    length: int,
    dual: bool,
    size: int,
) -> Bool[Tensor, "query key"]:
    """Return which keys each query reads.

    Raises:
        InputError: if the pattern has other keys than the text, or attention elsewhere.
    """
    queries = pattern.shape[1]
    if pattern.shape[2] != keys or queries > keys or (dual and queries != keys):
        wanted = f"{keys} queries and keys, noisy and clean" if dual else f"{keys} keys, as x_t has"
        raise InputError(
            f"pattern of {queries} queries and {pattern.shape[2]} keys: it must have {wanted}. "
            "Give clean= for a dual pass and its whole cache, and leave it out otherwise"
        )
    if dual:
        visible = dual_mask(length, size)
    elif bridge.cfg.cross_attn or bridge.cfg.causal:
        visible = sampling_mask(queries, keys, size)
    else:
        visible = torch.ones(queries, keys, dtype=torch.bool)
    if bool((pattern.masked_fill(visible, 0) != 0).any()):
        raise InputError(
            f"the pattern has attention between blocks that block size {size} keeps apart: give "
            "the block_size of the pass, and clean= if it was dual"
        )
    return visible


def _mark(axes: Axes, first: int, keys: int, length: int, size: int, masked: list[int]) -> None:
    """Mark blocks by dotted lines, streams by a line and brackets, and masks by triangles."""
    line = {"color": QUIET, "linewidth": 0.7, "linestyle": ":"}
    borders = [
        at for start in range(0, keys, length) for at in range(start + size, start + length, size)
    ]
    for border in borders if len(borders) <= _BLOCKS else []:
        axes.axvline(border - 0.5, **line)
        if border > first:
            axes.axhline(border - 0.5, **line)
    top, left = axes.get_xaxis_transform(), axes.get_yaxis_transform()
    marks = {"color": ORANGE, "markersize": 3.5, "clip_on": False, "linestyle": "none"}
    asked = [i for i in masked if i >= first]
    if masked:  # a line without points would stand at the figure's corner in the layout
        axes.plot(masked, [1.015] * len(masked), marker="v", transform=top, **marks)
    if asked:
        axes.plot([1.015] * len(asked), asked, marker="<", transform=left, **marks)
    if keys == length:
        return
    for draw in (axes.axvline, axes.axhline):
        draw(length - 0.5, color=INK, linewidth=1.0)
    bracket = {"color": INK, "linewidth": 1.2, "clip_on": False, "solid_capstyle": "butt"}
    for start, name in ((0, "noisy"), (length, "clean")):
        ends, middle = [start - 0.3, start + length - 0.7], start + length / 2 - 0.5
        axes.plot(ends, [1.045] * 2, transform=top, **bracket)
        axes.plot([1.045] * 2, ends, transform=left, **bracket)
        text = {"fontsize": 8, "color": INK}
        axes.text(middle, 1.06, name, transform=top, ha="center", va="bottom", **text)
        axes.text(1.06, middle, name, transform=left, ha="left", va="center", rotation=270, **text)


def _word(bridge: Bridge, token: Any) -> str:
    """Return a token as text; its id without a tokenizer."""
    if token == bridge.cfg.mask_token_id:
        return "[MASK]"
    return str(token) if bridge.tokenizer is None else bridge.tokenizer.decode([token])
