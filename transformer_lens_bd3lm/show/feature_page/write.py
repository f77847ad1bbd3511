"""The HTML of a feature's page, and of the index of several.

What a model wrote is escaped wherever it stands. Numbers are those of the result.
"""

import html
import math
import os
import re
from pathlib import Path
from typing import Any

from transformer_lens_bd3lm.analysis.features import Feature, Features
from transformer_lens_bd3lm.analysis.features.result import ARMS
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show import feature_page, page
from transformer_lens_bd3lm.show.feature_page.charts import Line, bar_chart, line_chart
from transformer_lens_bd3lm.show.feature_page.contexts import contexts_section, text
from transformer_lens_bd3lm.show.page.document import (
    asset,
    document,
    in_line,
    read_path,
    write_whole,
)

WORDS = 8  # words in each list


def write_feature(feature: Feature, path: str | Path) -> Path:
    """Write the page of a feature; see ``Feature.to_html``."""
    return write_whole(read_path(path), feature_document(feature))


def write_features(features: Features, folder: str | Path) -> Path:
    """Write a page of each feature and their index; see ``Features.to_html``."""
    if not isinstance(folder, str | os.PathLike):
        raise InputError(f"folder={folder!r}: give the name of a folder")
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in place.iterdir()}
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"folder={str(folder)!r} could not be made: {why}") from error
    own = {name for name in names if re.fullmatch(r"feature-\d+\.html", name)}
    if others := names - own - ({"index.html"} if own else set()):
        raise InputError(
            f"folder={str(folder)!r} holds {min(others)}: give a folder that is new, empty, or of "
            "such pages"
        )
    for number, feature in enumerate(features):
        near = [features[i] if 0 <= i < len(features) else None for i in (number - 1, number + 1)]
        write_whole(read_path(place / file_of(feature)), feature_document(feature, near))
    return write_whole(read_path(place / "index.html"), index_document(features))


def file_of(feature: Feature) -> str:
    """Return the file name of a feature's page in a folder of several."""
    return f"feature-{feature.number}.html"


def feature_document(feature: Feature, near: list[Feature | None] | None = None) -> str:
    """Return the page of a feature as text, with links to the index and its neighbors there."""
    links = ""
    if near is not None:
        links = '<a href="index.html">All features</a>'
        for mark, other in zip(("‹", "›"), near, strict=True):
            links += f'<a href="{file_of(other)}">{mark} {other.number}</a>' if other else ""
    body = [
        _facts(feature),
        contexts_section(feature, "masked"),
        contexts_section(feature, "written"),
        _words(feature),
        _charts(feature),
        _measured(feature),
    ]
    return _document(f"Feature {feature.number}", _subtitle(feature), links, "\n".join(body))


def _document(title: str, subtitle: str, choices: str, body: str) -> str:
    """Return a page in this module's frame."""
    style = asset(page, "base.css") + asset(feature_page, "feature.css")
    script = "'use strict';\n" + asset(feature_page, "feature.js")
    template = asset(feature_page, "feature.html")
    return document(
        template, style, script, title=title, subtitle=subtitle, choices=choices, body=body
    )


def _subtitle(feature: Feature) -> str:
    sae = f"{feature.sae} of {feature.d_sae} features at {feature.name} of {feature.model}"
    return html.escape(f"{sae}, block size {feature.block_size}")


def _facts(feature: Feature) -> str:
    """Return the figures at the top."""
    effect, own = feature.effect(), feature.effect_where_active()
    masked, written = feature.mean_density.tolist()
    texts = count(len(feature.tokens), "text")
    control = "as large a change at random: "
    facts = [
        ("Active at masks", share(masked), f"of {texts}, all t alike"),
        ("Active at written tokens", share(written), "of blocks with a mask left"),
        ("Highest activation", f"{feature.largest:.3g}", ""),
        ("Ablation costs", cell(effect, 0), f"nats a token, {feature.kind}; {control}"
         f"{cell(effect, 1)}"),
        ("Where it is active", cell(own, 0), f"nats a mask; {control}{cell(own, 1)}"),
    ]  # fmt: skip
    each = (
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>"
        for name, value, note in facts
    )
    return f'<dl class="facts">{"".join(each)}</dl>'


def _words(feature: Feature) -> str:
    """Return the words that the feature raises and lowers."""
    lists = [
        word_list("Raised", "probability", feature, "measured", False),
        word_list("Lowered", "probability", feature, "measured", True),
    ]
    if feature.direct is not None:
        lists += [
            word_list("Raised, direct", "logit", feature, "direct", False),
            word_list("Lowered, direct", "logit", feature, "direct", True),
        ]
    direct = (
        ""
        if feature.direct is None
        else " Direct: what the feature's own write alone adds to the logits, through the row's "
        "final norm, adaLN's final modulation and the unembedding, less the mean over words."
    )
    return (
        '<section><h2>Words</h2><p class="quiet">Mean over masks where the feature is active. '
        "Probability: with the feature minus without it, in percentage points, as measured through "
        f'all later layers.{direct}</p><div class="columns">{"".join(lists)}</div></section>'
    )


def word_list(head: str, unit: str, feature: Feature, which: str, lowered: bool) -> str:
    """Return a list of words with their changes."""
    rows = []
    for token, value in feature.top_words(which, WORDS, lowered):
        shown = f"{100 * value:+.2f}" if which == "measured" else f"{value:+.2f}"
        rows.append(
            f'<tr><td><span class="word">{html.escape(in_line(feature.word(token)))}</span></td>'
            f'<td class="figure">{shown.replace("-", "−")}</td></tr>'
        )
    none = '<tr><td class="quiet">none</td></tr>'
    return f'<div><h4>{head}, {unit}</h4><table class="words">{"".join(rows) or none}</table></div>'


def _charts(feature: Feature) -> str:
    """Return the histogram, the activity by masks left, and the effect of ablation."""
    histogram, edges = 100 * feature.histogram, feature.edges.tolist()
    bars = [("at masks", histogram[0].tolist()), ("at written tokens", histogram[1].tolist())]
    activity, runs = feature.activity(), feature.run_activity()
    lines = [
        Line.of("texts, masks", activity, 0, 100),
        Line.of("texts, written", activity, 1, 100),
        Line.of("runs, masks", runs, 0, 100),
        Line.of("runs, written", runs, 1, 100),
    ]
    effect, own = feature.effect("masks"), feature.effect_where_active("masks")
    kl = feature.divergence("masks")
    names = ("without the feature", "random change")
    texts, rows = count(len(feature.tokens), "text"), count(len(feature.run_rate), "run")
    figures = [
        ("How active it is", "Share of rows with an activation in each bin; at 0 otherwise.",
         bar_chart("Histogram of activations", "% of rows", edges, bars)),
        ("When it is active", f"Share of rows by masks left, over {texts} and the steps of {rows}; "
         "95% intervals.", line_chart("Activity by masks left", "% of rows", lines)),
        ("What ablation costs", "Change of the NELBO by masks left; they sum to the whole.",
         line_chart("Change of the NELBO by masks left", "mnats a token",
                    [Line.of(name, effect, i, 1000) for i, name in enumerate(names)])),
        ("What it costs where it is active", "Mean change of −log p of the true token.",
         line_chart("Change at masks where it is active", "nats a mask",
                    [Line.of(name, own, i) for i, name in enumerate(names)])),
        ("How far predictions move", "KL(as it is ‖ edited), with the NELBO's weights.",
         line_chart("Divergence of the predictions", "mnats a token",
                    [Line.of(name, kl, i, 1000) for i, name in enumerate(names)])),
    ]  # fmt: skip
    each = (
        f"<figure><figcaption><b>{head}</b>{what}</figcaption>{chart}</figure>"
        for head, what, chart in figures
    )
    return f'<section><h2>By masks left</h2><div class="charts">{"".join(each)}</div></section>'


def _measured(feature: Feature) -> str:
    """Return what was measured, word for word."""
    contract = feature.contract
    rows = [(name, getattr(contract, name)) for name in ("target", "edited", "fixed", "masks")]
    rows.append(("arms", "; ".join(ARMS)))
    rows.append(
        ("colors", "activations above 0, as a share of the highest; before the block, those of "
                   "the text as it is, without masks")
    )  # fmt: skip
    if feature.trained_at:
        sizes = ", ".join(map(str, feature.trained_at))
        rows.append(("block size", f"not trained at {feature.block_size} but at {sizes}"))
    each = "".join(f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" for name, value in rows)
    return (
        '<section><details class="measured"><summary>What was measured</summary>'
        f"<dl>{each}</dl></details></section>"
    )


def index_document(features: Features) -> str:
    """Return the index of several features as text."""
    heads = (
        ("Feature", True), ("At masks", True), ("At tokens", True), ("Highest", True),
        ("Ablation, mnats a token", True), ("Where active, nats", True), ("Raises", False),
        ("Highest at a mask", False),
    )  # fmt: skip
    row = "".join(
        f'<th scope="col"><button type="button">{name}</button></th>'
        if sorts
        else f'<th scope="col">{name}</th>'
        for name, sorts in heads
    )
    first = features[0]
    texts = count(len(first.tokens), "text")
    body = (
        f'<section><p class="quiet">Measured on {texts}. Ablation: {first.kind} change of the '
        "NELBO with the feature set to 0; 95% intervals over texts. Press a heading to sort.</p>"
        '<p><label>Search <input id="search" type="search" placeholder="a word, a number"></label> '
        f'<span class="quiet" id="shown">{len(features)} of {len(features)}</span></p>'
        f'<div class="scroll"><table id="index"><thead><tr>{row}</tr></thead>'
        f"<tbody>{''.join(map(_index_row, features))}</tbody></table></div></section>"
    )
    title = f"{len(features)} features"
    return _document(title, _subtitle(first), "", body)


def _index_row(feature: Feature) -> str:
    masked, written = feature.mean_density.tolist()
    effect, own = feature.effect(), feature.effect_where_active()
    values = [
        (feature.number, f'<a href="{file_of(feature)}">{feature.number}</a>'),
        (masked, share(masked)),
        (written, share(written)),
        (feature.largest, f"{feature.largest:.3g}"),
        (float(effect.mean[0]), cell(effect, 0, 1000)),
        (float(own.mean[0]), cell(own, 0)),
    ]
    cells = "".join(
        f'<td class="figure" data-value="{value:.9g}">{shown}</td>' for value, shown in values
    )
    raised = [feature.word(token) for token, _ in feature.top_words("measured", 4)]
    words = " ".join(f'<span class="word">{html.escape(in_line(word))}</span>' for word in raised)
    best = max(
        (x for x in feature.contexts if x.kind == "masked"),
        key=lambda x: x.activation,
        default=None,
    )
    context = "" if best is None else text(feature, best)
    return f"<tr>{cells}<td>{words}</td><td>{context}</td></tr>"


def share(x: float) -> str:
    """Return a share in percent, with as many digits as a rare feature needs."""
    if math.isnan(x):
        return "–"
    return f"{x:.1%}" if x >= 0.01 or x == 0 else f"{x:.2%}" if x >= 0.0001 else "&lt; 0.01%"


def cell(effects: Any, number: int, scale: float = 1.0) -> str:
    """Return one cell of effects with its interval, in another unit."""
    mean, low, high = (float(x[number]) * scale for x in (effects.mean, effects.low, effects.high))
    if math.isnan(mean):
        return "–"
    known = not math.isnan(low + high)
    size = max(high - low if known else abs(mean), 1e-9)
    digits = min(max(1 - math.floor(math.log10(size)), 0), 6)
    shown = f"{mean:+.{digits}f}"
    if known:
        shown += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return shown.replace("-", "−")
