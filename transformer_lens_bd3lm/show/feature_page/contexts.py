"""Contexts of a feature as HTML: the text that the network read, colored by activation."""

import html
import math

from transformer_lens_bd3lm.analysis.features import Context, Feature
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.page.canvas import spaced
from transformer_lens_bd3lm.show.page.document import escaped, in_line

_LEVELS = 10
HEADS = {
    "masked": ("At masks", "the place of the peak is masked: what it will become is unknown there"),
    "written": ("At written tokens", "the place of the peak holds its token already, beside masks"),
}


def contexts_section(feature: Feature, kind: str) -> str:
    """Return the contexts at one kind of place, a column for each range of masks left."""
    head, what = HEADS[kind]
    columns = []
    for masks in feature.ranges:
        several = feature.of(kind, masks)
        if kind == "written" and masks[0] >= feature.rate.shape[-1]:
            continue  # a block that is all masks has no written token
        cards = "".join(map(lambda x: card(feature, x), several))
        empty = '<p class="quiet">active nowhere</p>'
        columns.append(f"<div><h4>{masks_words(masks)}</h4>{cards or empty}</div>")
    if not columns:
        return ""
    return (
        f'<section><h2>{head}</h2><p class="quiet">Highest activations of different tokens, by '
        f"masks left in the block; {what}.</p>"
        f'<div class="columns">{"".join(columns)}</div></section>'
    )


def masks_words(masks: tuple[int, int]) -> str:
    """Return a range of masks left in words."""
    low, high = masks
    return f"{count(low, 'mask')} left" if low == high else f"{low} to {high} masks left"


def card(feature: Feature, context: Context) -> str:
    """Return one context: its text, its activation, and its final token."""
    peak = context.position - context.start
    final = f'<span class="word">{html.escape(in_line(feature.word(context.tokens[peak])))}</span>'
    if context.kind == "masked":
        p = _probability(context.log_p)
        without = _probability(context.log_p_without)
        about = f"becomes {final} p {p}, without the feature {without}"
    else:
        about = f"at {final}"
    left = count(context.masks_left, "mask")
    place = f"text {context.text}, position {context.position}, {left} left"
    return (
        f'<div class="context" title="{place}">{text(feature, context)}'
        f'<p class="about"><b>{context.activation:.3g}</b> {about}</p></div>'
    )


def text(feature: Feature, context: Context) -> str:
    """Return the text of a context; the block of the peak has a bar before it."""
    peak, size = context.position - context.start, feature.block_size
    block = (context.position // size) * size - context.start
    shown = []
    for i, token in enumerate(context.tokens):
        value = context.activations[i]
        level = level_of(value, feature.largest)
        kinds = ["token", *(["mask"] if context.masked[i] else [])]
        kinds += [f"a{level}"] if level else []
        kinds += ["peak"] if i == peak else []
        word = escaped(feature.word(token))
        at = "not read" if math.isnan(value) else f"{value:.3g}"
        state = "mask, becomes " if context.masked[i] else ""
        title, inside = f"{state}{word}: {at}", "" if context.masked[i] else word
        bar = '<i class="block"></i>' if i == block else ""
        shown.append(f'{bar}<span class="{" ".join(kinds)}" title="{title}">{inside}</span>')
    apart = " spaced" if spaced(feature.tokenizer, context.tokens) else ""
    return f'<div class="text{apart}">{"".join(shown)}</div>'


def level_of(value: float, largest: float) -> int:
    """Return the level of color of an activation, from 0 for none to 10 for the largest."""
    if math.isnan(value) or value <= 0 or largest <= 0:
        return 0
    return max(min(math.ceil(_LEVELS * value / largest), _LEVELS), 1)


def _probability(log_p: float) -> str:
    """Return a probability in percent; a dash where it is not known."""
    if math.isnan(log_p):
        return "–"
    p = math.exp(log_p)
    return f"{p:.1%}" if p >= 0.001 else "&lt; 0.1%"
