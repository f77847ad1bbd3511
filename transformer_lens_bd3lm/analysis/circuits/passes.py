"""Passes with gradients: from the corrupted embedding to the clean one, in equal steps.

Between the corrupted embedding e' and the clean one e, at the midpoints a of K equal parts::

    G_v        = mean over a of  d score / d (input of reader v)   at e' + a (e - e')
    edge(u, v) = sum over positions of  (w_u(clean) - w_u(corrupted)) . G_v

w_u is what node u writes (EAP-IG, Hanna et al. 2024; K = 1 at a = 0 is EAP, Syed et al. 2023). The
gradient at a reader's input is through that reader alone: queries, keys, values and MLPs read
copies. It goes through their norms and adaLN's modulation, which stand behind those inputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.circuits.components import Components
from transformer_lens_bd3lm.analysis.circuits.texts import MaskedPair
from transformer_lens_bd3lm.bridge.distribution import masks_anywhere
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.errors import NotExactError

_FLAGS = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")


@contextmanager
def split(bridge: Bridge) -> Iterator[None]:
    """Give every reader a copy of the residual stream, and every head a write of its own."""
    before = {flag: bool(getattr(bridge.cfg, flag)) for flag in (*_FLAGS, "use_attn_in")}
    try:
        bridge.set_use_attn_in(False)
        for flag in _FLAGS:
            getattr(bridge, f"set_{flag}")(True)
        yield
    finally:
        for flag in reversed(_FLAGS):
            getattr(bridge, f"set_{flag}")(before[flag])
        bridge.set_use_attn_in(before["use_attn_in"])


def edge_scores(
    bridge: Bridge, pair: MaskedPair, block_size: int | None, steps: int, timesteps: Any
) -> tuple[Float[Tensor, "node reader"], float, float]:
    """Compute the attribution of every pair of node and reader for one pair of texts.

    Returns:
        Scores ``[node, reader]`` in nats, 0 where there is no edge; and the score of the clean and
        of the corrupted run.

    Raises:
        NotExactError: if a score is NaN.
    """
    parts = Components.of(bridge)
    run = _Passes(bridge, pair, block_size, timesteps)
    with torch.no_grad():
        clean, kept = run(0, parts.node_hooks)
        corrupted, kept_of_corrupted = run(1, parts.node_hooks)
    if bool(torch.stack([clean, corrupted]).isnan().any()):
        dtype = kept["hook_embed"].dtype
        raise NotExactError(f"predictions are NaN in {dtype}: boot in a wider dtype")
    writes = _stack(kept, parts.node_hooks) - _stack(kept_of_corrupted, parts.node_hooks)
    e, e_corrupted = kept["hook_embed"], kept_of_corrupted["hook_embed"]
    scores = torch.zeros(len(parts.nodes), len(parts.readers), dtype=torch.float64)
    for step in range(steps):
        along = (step + 0.5) / steps if steps > 1 else 0.0
        embedding = torch.lerp(e_corrupted, e, along).requires_grad_()
        with torch.enable_grad():
            score, inputs = run(1, parts.reader_hooks, embedding)
            wanted = [inputs[name] for name in parts.reader_hooks]
            grads = torch.autograd.grad(score, wanted, allow_unused=True)
        column = 0
        for x, grad in zip(wanted, grads, strict=True):
            width = x.shape[2] if x.ndim == 4 else 1
            if grad is not None:
                grad = grad[0].double().view(x.shape[1], width, -1)
                rows = writes[:, : x.shape[1]].double()
                part = torch.einsum("npd,pwd->nw", rows, grad)
                scores[:, column : column + width] += part.cpu() / steps
            column += width
    return scores * parts.edges, float(clean), float(corrupted)


class _Passes:
    """Passes of one pair in its view; 0 is the clean text, 1 the corrupted one."""

    def __init__(self, bridge: Bridge, pair: MaskedPair, block_size: int | None, timesteps: Any):
        self.bridge, self.pair = bridge, pair
        self.options: dict[str, Any] = {"timesteps": timesteps}
        if block_size is not None:
            self.options["block_size"] = block_size
        if pair.finished is None:
            self.options["sample_mode"] = True

    def __call__(
        self, which: int, names: list[str], embedding: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Run one pass; return its score and the activations of ``names``."""
        kept: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any, name: str) -> None:
            kept[name] = x

        fns: list[tuple[str, Any]] = []
        if embedding is not None:
            fns.append(("hook_embed", lambda x, hook: embedding))
        fns += [(name, lambda x, hook, name=name: keep(x, hook, name)) for name in names]
        ids = (self.pair.clean, self.pair.corrupted)[which]
        clean = {} if self.pair.finished is None else {"clean": self.pair.finished[which]}
        with read_pass_hooks(self.bridge, fns).on(), masks_anywhere(self.bridge):
            logits = self.bridge(ids, **clean, **self.options)
        return self.pair.score(logits, self.bridge.cfg.mask_token_id), kept


def _stack(kept: dict[str, Tensor], names: list[str]) -> Float[Tensor, "node row d_model"]:
    """Return what each node writes, in order."""
    parts = []
    for name in names:
        x = kept[name][0]
        parts.append(x.transpose(0, 1) if x.ndim == 3 else x[None])
    return torch.cat(parts)
