"""Run one state of a corrupted text with clean activations in it, many patches as rows of a pass.

A pass starts at the layer that is patched, from the corrupted run's own residual stream, so what
comes before is not run again. Where both runs have the same activation a patch changes nothing, and
no pass is run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.effect_grid.pairs import Pair, State
from transformer_lens_bd3lm.analysis.noised_text import residual_names
from transformer_lens_bd3lm.bridge.distribution import masks_anywhere
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.noise import sigma_of
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.model.subs import masked_log_probs


def site_names(bridge: Bridge, site: str) -> list[str]:
    """Return the hook names of a site, by depth (residual stream) or by layer."""
    if site == "residual":
        return residual_names(bridge)
    return [f"blocks.{layer}.hook_{site}" for layer in range(bridge.cfg.n_layers)]


@dataclass(frozen=True)
class Patches:
    """Passes of one pair.

    Attributes:
        bridge: a BD3LM bridge.
        pair: the two texts.
        names: hook names that are patched.
        rows: largest number of positions in one pass.
    """

    bridge: Bridge
    pair: Pair
    names: Sequence[str]
    rows: int

    def effects(
        self, state: State, groups: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "site group"], float, float]:
        """Compute what each patch adds to log p of the target in one state, in nats.

        Returns:
            Effects ``[site, group]``, and log p of the target in the clean and the corrupted run.
        """
        layers = range(self.bridge.cfg.n_layers)
        entries = [f"blocks.{layer}.hook_resid_pre" for layer in layers]
        clean, target = self._run(state.clean, state, 0, self.names)
        corrupted, base = self._run(state.corrupted, state, 0, [*self.names, *entries])
        effects = torch.zeros(len(self.names), len(groups), dtype=torch.float64)
        at_once = max(self.rows // self.pair.length, 1)
        for site, name in enumerate(self.names):
            layer = int(name.split(".")[1])
            differs = (clean[name] != corrupted[name])[0].any(-1).tolist()
            here = [i for i, group in enumerate(groups) if any(differs[p] for p in group)]
            for first in range(0, len(here), at_once):
                part = here[first : first + at_once]
                patched = corrupted[name].repeat(len(part), 1, 1)
                for row, group in enumerate(part):
                    patched[row, groups[group]] = clean[name][0, groups[group]]
                stream = corrupted[entries[layer]].expand(len(part), -1, -1)
                # a hook of the bridge at the entry has run there: it is not to act a second time
                puts = [(entries[layer], stream), (name, patched)]
                _, log_p = self._run(stream, state, layer, (), puts)
                effects[site, part] = log_p - base
        return effects, float(target), float(base)

    def _run(
        self,
        x: Tensor,
        state: State,
        layer: int,
        names: Sequence[str],
        puts: Sequence[tuple[str, Tensor]] = (),
    ) -> tuple[dict[str, Tensor], Float[Tensor, " row"]]:
        """Run one pass from a layer on; return the activations of ``names``, and log p [row].

        ``puts`` are hook names, and what stands there in place of what the pass computes.
        """
        kept: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any, name: str) -> None:
            kept[name] = x.clone()

        fns: list[tuple[str, Any]] = [
            (name, lambda x, hook, name=name: keep(x, hook, name)) for name in dict.fromkeys(names)
        ]
        fns += [(name, lambda x, hook, put=put: put) for name, put in puts]
        bridge, pair = self.bridge, self.pair
        size = {"block_size": pair.clean.block_size} if bridge.cfg.cross_attn else {}
        start = {} if x.ndim == 2 else {"start_at_layer": layer}
        sigma = sigma_of(state.t).to(x.device).expand(len(x))
        with read_pass_hooks(bridge, fns).on(), masks_anywhere(bridge):
            logits = bridge(x, timesteps=sigma, sample_mode=True, **size, **start)
        log_probs = masked_log_probs(logits[:, pair.at].double(), bridge.cfg.mask_token_id)
        index = pair.target.expand(len(x), -1)[..., None]
        return kept, log_probs.gather(-1, index)[..., 0].sum(-1).cpu()
