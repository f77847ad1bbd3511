"""Hook points of a cached pass, as a tree."""

from typing import Any

from rich.text import Text
from rich.tree import Tree

from transformer_lens_bd3lm.bridge.host import Bridge


def hook_tree(bridge: Bridge, cache: Any) -> Tree:
    """Lay out the cached hook points of layer 0 and outside the layers, with their shapes."""
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
