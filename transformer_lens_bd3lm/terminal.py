"""A run on a terminal: the canvas filling in, two runs side by side, a tree of hook points.

Each function takes what the public surface returns and draws it; nothing is computed here.
"""

from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

console = Console(highlight=False)
errors = Console(highlight=False, stderr=True)


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
            branches[path] = branches.get(above, tree).add(f"[bold]{label}[/]")
        branches[path].add(f"{leaf} [dim]{list(cache[name].shape)}[/]")
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


def compare(other: Any) -> None:
    """A coupled replay beside its base: both texts, differences in colour, and where they part."""
    bridge, base = other.bridge, other.base
    table = Table(
        title="what the hook changed, under the same noise", title_justify="left", show_lines=True
    )
    table.add_column("run")
    table.add_column("text")
    for name, run, style in (("base", base, "green"), ("edited", other, "red")):
        text = Text()
        same = other.agreement[0].tolist()
        for token, agrees in zip(run.final[0, : int(run.ends[0])].tolist(), same, strict=False):
            text.append(bridge.tokenizer.decode([token]), style="" if agrees else f"bold {style}")
        table.add_row(name, text)
    console.print(table)
    differ, written = int((~other.agreement).sum()), int((base.commit_step >= 0).sum())
    first = int(other.first_divergence[0])
    told = "no token changed" if first < 0 else f"they part at step {first}"
    console.print(f"{differ} of {written} written tokens differ; {told}")
