"""Choose how many states to run in a pass, from the measured time of the model's own layers.

A few rows cost little more than one, as long as reading weights or calls take most of the time.
Where arithmetic takes most of it, twice as many rows cost twice as much. Where that changes depends
on the machine, the dtype and the model. So it is measured, once per process, which takes
milliseconds.
"""

import time
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from transformer_lens_bd3lm.bridge.casts import frequencies
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.routing import Routing
from transformer_lens_bd3lm.model.inputs import View

WIDTHS = (2, 4, 6, 8, 12, 16, 24, 32)  # numbers of states that are tried
MOST_ROWS = 512  # more rows are not tried: there arithmetic takes most of the time on any device
PATIENCE = 2  # widths in turn that cannot help, before no wider one is measured
LAYERS = 3  # one after another, so that their weights come from memory
REPEATS = 3
WORTH = 1.2  # least gain in steps per second that is worth a wider pass: drafts take time too

_measured: dict[tuple[Any, ...], float] = {}


def best_width(bridge: Bridge, rows: int, share: float, most: int) -> int:
    """Return the number of states in a pass that gives the most steps per second.

    Args:
        bridge: a BD3LM bridge.
        rows: rows that each state adds to the pass.
        share: share of drafts that are right: w states are expected to give
            ``1 + share + ... + share^(w-1)`` steps.
        most: largest number of states.
    """
    weight = bridge.embed.weight
    most = min(most, MOST_ROWS // rows)
    if most < 2 or weight.is_meta or isinstance(weight, FakeTensor):
        return 1
    best, width, useless = WORTH / seconds(bridge, rows), 1, 0
    for states in WIDTHS:
        if states > most or useless == PATIENCE:
            break
        took = seconds(bridge, states * rows)
        speed = sum(share**i for i in range(states)) / took
        if speed > best:
            best, width = speed, states
        # Even if all were right; another kernel may make still more rows cheaper again.
        useless = useless + 1 if states / took <= best else 0
    return width


@torch.no_grad()
def seconds(bridge: Bridge, rows: int) -> float:
    """Return the time of a few layers over this many rows, in seconds; measured once."""
    model: Any = bridge.original_model
    weight, layers = bridge.embed.weight, model.backbone.blocks[:LAYERS]
    cfg = bridge.cfg
    sizes = (cfg.d_model, cfg.n_heads, cfg.d_mlp, model.config.cond_dim, len(layers), rows)
    key = (weight.device, weight.dtype, torch.get_num_threads(), *sizes)
    if key in _measured:
        return _measured[key]
    x = torch.zeros(1, rows, bridge.cfg.d_model, device=weight.device, dtype=weight.dtype)
    ids = torch.zeros(1, rows, device=weight.device, dtype=torch.long)
    view = View(ids, rows, rows, "open", dual=False)
    routing, c = Routing.of_view(view, frequencies(model, x.device), x.dtype), None
    if model.config.adaln:
        c, routing.constants = x.new_zeros(1, model.config.cond_dim), {}
    times = []
    for _ in range(REPEATS + 1):
        start = _now(weight.device)
        for layer in layers:
            layer(x, c, routing)
        times.append(_now(weight.device) - start)
    _measured[key] = min(times[1:])
    return _measured[key]


def _now(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished its queued work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()
