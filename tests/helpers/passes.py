"""How the tests drive a bridge: booted checkpoints, and passes over a cache."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from transformer_lens_bd3lm.bridge.forward import run
from transformer_lens_bd3lm.bridge.kv_cache import KVCache
from transformer_lens_bd3lm.bridge.routing import Routing

Hooks = list[tuple[str, Callable[..., Any]]]


def boot(
    path: Path | str, device: torch.device, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> TransformerBridge:
    """A bridge of the test's own, which does not warn of masks in earlier blocks.

    Most tests compare whole passes over random masks; ``tests/bridge/test_distribution.py``
    is about the warning.
    """
    bridge = TransformerBridge.boot_transformers(str(path), device=device, dtype=dtype, **kwargs)
    bridge.original_model.warned_off_distribution = True
    return bridge


@functools.cache
def shared(
    path: Path, device: torch.device, dtype: torch.dtype = torch.float32
) -> TransformerBridge:
    """A bridge for tests that leave it as they found it."""
    return boot(path, device, dtype)


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a part of the largest magnitude wanted."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    assert not bool(found.isnan().any() | wanted.isnan().any()), "NaN compares as equal to nothing"
    hidden = wanted == -torch.inf
    assert torch.equal(found == -torch.inf, hidden)
    found, wanted = found[~hidden], wanted[~hidden]
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))


def there(x: Tensor | None) -> Tensor:
    """What is there only sometimes, where it must be."""
    assert x is not None
    return x


class CachedPasses:
    """Passes over rows ``start:end`` of a stream, whose blocks before ``start`` are stored."""

    def __init__(self, bridge: TransformerBridge, batch: int, positions: int, block_size: int):
        self.bridge = bridge
        self.block_size = block_size
        embedding = bridge.embed.weight
        self.cache = KVCache(
            bridge.cfg.n_layers,
            batch,
            bridge.cfg.n_heads,
            positions,
            bridge.cfg.d_head,
            embedding.device,
            embedding.dtype,
        )

    @torch.no_grad()
    def __call__(self, ids: Tensor, end: int, sigma: Tensor | None = None) -> Tensor:
        """Logits of the rows ``ids``, which end at ``end``, beside everything that is stored."""
        model: Any = self.bridge.original_model
        start = end - ids.shape[1]
        assert start == self.cache.length
        x = model.backbone.vocab_embed(ids)
        inv_freq = model.backbone.rotary_emb.inv_freq
        routing = Routing.of_window(start, end, self.block_size, self.cache, inv_freq, x)
        sigma = torch.zeros(len(ids), device=ids.device) if sigma is None else sigma
        sigma = sigma.to(torch.promote_types(x.dtype, torch.float32))
        return run(model, x, sigma, routing, slice(0, ids.shape[1]))

    def store(self, ids: Tensor, end: int, sigma: Tensor | None = None) -> None:
        """Make these rows' keys and values final."""
        self(ids, end, sigma)
        self.cache.commit(end)


def cached_step(
    bridge: TransformerBridge,
    ids: Tensor,
    rows: range,
    block_size: int,
    hooks: Hooks | None = None,
    sigma: Tensor | None = None,
) -> Tensor:
    """Logits of ``rows`` over the stored rows before them, with hooks on that pass alone."""
    passes = CachedPasses(bridge, len(ids), rows.stop, block_size)
    if rows.start:
        passes.store(ids[:, : rows.start], rows.start, sigma)
    with bridge.hooks(fwd_hooks=hooks or []):
        return passes(ids[:, rows.start : rows.stop], rows.stop, sigma)


def spelled(x: object) -> str:
    """An argument as a test's name has it: the same in every process, so without addresses."""
    return re.sub(r" at 0x\w+", "", str(x))
