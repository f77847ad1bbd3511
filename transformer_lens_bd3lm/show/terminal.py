"""A run on a terminal: the canvas filling in, two runs side by side, a tree of hook points.

Each function takes what the public surface returns and draws it; nothing is computed here.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

# What models and users write is printed as it is: no markup in brackets, no :emoji: between colons.
# What is styled here is a Text.
console = Console(highlight=False, markup=False, emoji=False)
errors = Console(highlight=False, markup=False, emoji=False, stderr=True)


def hook_tree(bridge: Any, cache: Any) -> Tree:
    """The cached hook points of layer 0 and outside the layers, with their shapes."""
    tree = Tree("hook points, and what the cache holds")
    names = [
        name for name in cache if not name.startswith("blocks.") or name.startswith("blocks.0.")
    ]
    branches = {"": tree}
    seen: set[int] = set()
    points = bridge.hook_dict
    for name in sorted(names, key=lambda name: (name.count("."), -len(name), name)):
        if id(points[name]) in seen or (name.endswith(".hook_in") and name != "unembed.hook_in"):
            continue
        seen.add(id(points[name]))
        path, _, leaf = name.rpartition(".")
        if path not in branches:
            above, _, own = path.rpartition(".")
            label = f"blocks.{{0..{bridge.cfg.n_layers - 1}}}" if path == "blocks.0" else own
            branches[path] = branches.get(above, tree).add(Text(label, "bold"))
        branches[path].add(Text.assemble(leaf, (f" {list(cache[name].shape)}", "dim")))
    return tree


def canvas_text(bridge: Any, step: Any, row: int = 0) -> Text:
    """A row of the canvas after a step: masks as boxes, what the step revealed in colour.

    As much of its end as fits on the screen, up to the block that is being denoised.
    """
    text = Text()
    start, end = step.window
    shown = step.after[row, :end].tolist()
    for position, token in enumerate(shown):
        if token == step.mask_id:
            text.append("░░ ", style="dim")
            continue
        fresh = start <= position and bool(step.revealed[row, position - start])
        text.append(bridge.tokenizer.decode([token]), style="bold black on green" if fresh else "")
    text.append("░░ " * min(step.after.shape[1] - end, 8), style="dim")
    lines = text.wrap(console, max(console.width - 4, 20))
    room = max((console.height - 2) // len(step.after) - 2, 1)
    return Text("\n").join(lines[-room:])


def number(count: int, what: str) -> str:
    """``1 text``, ``2 texts``."""
    return f"{count:,} {what}" + ("" if count == 1 else "es" if what.endswith("ss") else "s")


class Canvases:
    """A run filling in, a panel a row: live on a terminal, a few frames elsewhere."""

    def __init__(self, bridge: Any, title: str, total: int):
        self.bridge, self.title = bridge, title
        self.live = Live(console=console, refresh_per_second=12) if console.is_terminal else None
        self.frames = {0, total // 3, 2 * total // 3, total - 1}

    def __enter__(self) -> "Canvases":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, step: Any) -> None:
        """Draw the canvas after a step."""
        if self.live is None and step.index not in self.frames:
            return
        name = f"{self.title}: step {step.index}, block {step.block}"
        rows = range(len(step.after))
        drawn = Group(*(Panel(canvas_text(self.bridge, step, row), title=name) for row in rows))
        if self.live is None:
            console.print(drawn)
        else:
            self.live.update(drawn)


def diff_tables(diff: Any, n: int = 10) -> Group:
    """Lay two checkpoints out side by side: what changed most, ``n`` rows a table at most."""
    return Group(*_diff_tables(diff, n))


def _diff_tables(diff: Any, n: int) -> Iterator[Table | Text]:
    """Two checkpoints side by side: what changed most in weights, predictions, activations."""
    yield Text.assemble(("a", "bold"), f"  {diff.a}\n", ("b", "bold"), f"  {diff.b}")
    whole = diff.weights.whole
    table = ranked(
        f"weights: {percent(whole.relative)} of a's norm, cosine {whole.cosine:.6f}",
        ("component", "change", "cosine", "largest", "parameters"),
        (
            (
                each.name,
                percent(each.change.relative),
                f"{each.change.cosine:.6f}",
                f"{each.change.largest:.3g}",
                f"{each.change.size:,}",
            )
            for each in diff.weights.joined()[:n]
            if not each.change.identical
        ),
    )
    table.caption = (
        f"{diff.weights.identical:,} of {number(diff.weights.tensors, 'tensor')} are identical. "
        "Change: |b - a| / |a|."
    )
    heads = [each for each in diff.weights.components if each.head is not None][:3]
    heads = [each for each in heads if not each.change.identical]
    if heads:
        told = (f"{each.name} {percent(each.change.relative)}" for each in heads)
        table.caption += f" By head: {', '.join(told)}."
    yield table
    if diff.predictions is not None:
        yield prediction_table(diff, n)
    if diff.activations is not None:
        yield activation_table(diff, n)
    for told in diff.left_out:
        yield Text(f"Not compared: {told}.")


def prediction_table(diff: Any, n: int) -> Table:
    """The positions at which two checkpoints' predictions differ most, and all in short."""
    found = diff.predictions
    size = "" if diff.block_size is None else f", block size {diff.block_size}"
    table = ranked(
        f"predictions at {number(len(found.token), 'masked position')}{size}",
        ("row", "position", "token", "KL(a||b)", "log p: a", "b", "most likely: a", "b"),
        (
            (
                str(each.row), str(each.position), repr(each.word), f"{each.kl:.3f}",
                *(f"{x:.2f}" for x in each.log_p), *map(repr, each.top),
            )
            for each in found.largest(n)
        ),
        left=("token", "most likely: a"),
    )  # fmt: skip
    there, back = found.mean_kl
    table.caption = (
        f"Mean KL(a||b) {there:.4f}, KL(b||a) {back:.4f} nats a token; most likely token the same "
        f"at {found.agreement:.1%}.\nlog p of the true token, b less a: "
        f"{found.mean_log_p_change:+.4f} nats a token{between(found.interval())}."
    )
    if diff.bound is not None:
        bound = diff.bound
        exact = bound.a.kind == "exact"
        error = "" if exact else f" ± {bound.standard_error:.4f}"
        table.caption += (
            f"\nNELBO, {bound.method.replace('_', ' ')}: "
            f"{bound.a.nats_per_token:.4f} and {bound.b.nats_per_token:.4f} nats a token, b less a "
            f"{bound.difference:+.4f}{error}{between(bound.interval())}."
        )
    return table


def activation_table(diff: Any, n: int) -> Table:
    """The hook points that differ most, and where the change comes in."""
    found = diff.activations
    table = ranked(
        f"activations on {number(found.positions, 'position')}",
        ("hook point", "stream", "change", "cosine", "CKA", "largest"),
        (
            (
                each.name, each.stream, percent(each.relative), f"{each.cosine:.4f}",
                "–" if math.isnan(each.cka) else f"{each.cka:.4f}", f"{each.largest:.3g}",
            )
            for each in found.points[:n]
            if not each.identical
        ),
        left=("stream",),
    )  # fmt: skip
    heads = ", ".join(f"{layer}.{head} {x:.3f}" for layer, head, x in found.heads(5) if x)
    table.caption = f"First to differ: {found.first or 'none, all are identical'}."
    if heads:
        table.caption += f"\nAttention of masked queries moved most in layer.head {heads} (0 to 1)."
    return table


def ranked(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], left: tuple[str, ...] = ()
) -> Table:
    """A table whose first column is a name, and others figures."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 or name in left else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def percent(x: float) -> str:
    """A relative change."""
    return "from zero" if math.isinf(x) else f"{x:.3%}"


def between(interval: tuple[float, float] | None) -> str:
    """An interval behind its figure; nothing if there is none."""
    return "" if interval is None else " [{:+.4f}, {:+.4f} at 95% over texts]".format(*interval)
