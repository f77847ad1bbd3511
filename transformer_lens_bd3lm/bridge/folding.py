"""Fold constant modulation into the weights, so that TransformerLens's processing is exact.

Without time conditioning c is one constant, so adaLN's vectors are too, and they are part of the
weights::

    (w * n) (1 + scale) + shift  =  (w (1 + scale)) n + shift       a norm with a bias
    gate * (z W_O)               =  z (W_O gate)                    a plain write

Gates are always folded, before anything is centered: a centered write times a gate is not centered.
Shifts and scales are folded when TransformerLens folds norms. A folded modulation is left neutral
(shift 0, scale 0, gate 1): it can be read, but an edit is refused, because it would not mean what
it meant before. It stays neutral in training, and what is wholly folded is frozen.

The mask token never competes with the others (SUBS), so its column of the unembedding is set aside
before that is centered.

All of it, TransformerLens's part too, is computed in float64 and rounded once. With time
conditioning the modulation is not constant, and processing is refused.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from transformer_lens_bd3lm.bridge.conditioning import GATES, MODULATION
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.errors import NotExactError
from transformer_lens_bd3lm.model.modules import timestep_features

_FINAL = "backbone.output_layer.adaLN_modulation"
_SIGMA = "backbone.sigma_map.mlp"

State = dict[str, Tensor]


class Wide(Tensor):
    """Weight in float64 that stays so; TransformerLens would round it to float32 first."""

    @classmethod
    def of(cls, x: Tensor) -> "Wide":
        """Return a tensor in float64; in float32 on "mps", which has no float64."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        return x.detach().to(wide).as_subclass(cls)

    def float(self, *args: Any, **kwargs: Any) -> "Wide":
        """Return itself."""
        return self


@dataclass(frozen=True)
class Folded:
    """State that :func:`finish` needs once TransformerLens has handed its weights over.

    Attributes:
        dtypes: dtypes of the model's parameters before processing, by name.
        frozen: names of the parameters that were frozen.
        norms: whether shifts and scales were folded too.
        neutral: the modulations' new weights and biases, by state-dict name.
        mask: the mask token's unembedding, set aside: ``{"weight": [d_model], "bias": []}``.
    """

    dtypes: dict[str, torch.dtype]
    frozen: frozenset[str]
    norms: bool
    neutral: State
    mask: State


def require_foldable(cfg: Any) -> None:
    """Refuse a model whose function weight processing would change.

    Raises:
        NotExactError: with time conditioning, and where TransformerLens cannot tell the two axes
            of the unembedding apart.
    """
    if cfg.d_vocab == cfg.d_model:
        raise NotExactError(
            f"d_vocab == d_model == {cfg.d_model}: TransformerLens tells the axes of the "
            "unembedding by their lengths, and would center the wrong one. Use the bridge as "
            "booted; nothing has been changed"
        )
    if cfg.adaln and cfg.time_conditioning:
        raise NotExactError(
            "time_conditioning=true: shift, scale and gate change with sigma, so no weights hold "
            "them, and weight processing would change the model. Use the bridge as booted: its "
            "hooks and logits are exact, and nothing has been changed"
        )


def refuse_refactoring(processing: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse ``refactor_factored_attn_matrices``, which rotary embeddings rule out.

    Args:
        processing: TransformerLens's function.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Raises:
        NotExactError: if it is True.
    """
    asked = inspect.signature(processing).bind(*args, **kwargs).arguments
    if asked.get("refactor_factored_attn_matrices"):
        raise NotExactError(
            "refactor_factored_attn_matrices=True: with rotary embeddings W_Q W_K^T depends on "
            "positions, so there is no single matrix to refactor. Leave it out; nothing has been "
            "changed"
        )


def fold_modulation(bridge: Bridge, state: State, norms: bool) -> Folded:
    """Put every gate, and with ``norms`` every shift and scale, into the weights.

    Args:
        bridge: the bridge of these weights; it is not changed yet.
        state: its state dict; entries are replaced, and tensors stay as they are.
        norms: fold shifts and scales, into the norms' weights and new biases.

    Returns:
        What :func:`finish` needs to put the rest right.

    Raises:
        NotExactError: as :func:`require_foldable`.
    """
    cfg = bridge.cfg
    require_foldable(cfg)
    state.update({name: Wide.of(x) for name, x in state.items() if x.is_floating_point()})
    neutral: State = {}
    if cfg.adaln:
        c = _constant_c(state)
        for layer in range(cfg.n_layers):
            _fold_layer(state, f"blocks.{layer}", c, norms)
            neutral |= _neutral(state, f"blocks.{layer}.adaln", norms)
        if norms:
            _fold_norm(state, "ln_final", *_vectors(state, _FINAL, c, 2))
            neutral |= _neutral(state, _FINAL, norms)
    mask = _set_mask_aside(state, cfg.mask_token_id, norms)
    parameters = dict(bridge.original_model.named_parameters(remove_duplicate=False))
    dtypes = {name: p.dtype for name, p in parameters.items()}
    frozen = frozenset(name for name, p in parameters.items() if not p.requires_grad)
    return Folded(dtypes, frozen, norms, neutral, mask)


def _constant_c(state: State) -> Float[Tensor, " cond"]:
    """Compute ``silu(sigma_map(0))``."""
    layers = [(state[f"{_SIGMA}.{i}.weight"], state[f"{_SIGMA}.{i}.bias"]) for i in (0, 2)]
    h = timestep_features(torch.zeros_like(layers[0][1][:1]))
    for weight, bias in layers:
        h = F.silu(F.linear(h, weight, bias))
    return h[0]


def _vectors(state: State, name: str, c: Tensor, count: int) -> list[Float[Tensor, " d_model"]]:
    """Compute the vectors of one adaLN, in the checkpoint's order."""
    return list(F.linear(c, state[f"{name}.weight"], state[f"{name}.bias"]).chunk(count))


def _fold_layer(state: State, name: str, c: Tensor, norms: bool) -> None:
    """Fold a layer's gates into its writes, and its shifts and scales into its norms."""
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = _vectors(
        state, f"{name}.adaln", c, 6
    )
    for write, gate in ((f"{name}.attn.o", gate_msa), (f"{name}.mlp.out", gate_mlp)):
        state[f"{write}.weight"] = state[f"{write}.weight"] * gate[:, None]
        if f"{write}.bias" in state:
            state[f"{write}.bias"] = state[f"{write}.bias"] * gate
    if norms:
        _fold_norm(state, f"{name}.ln1", shift_msa, scale_msa)
        _fold_norm(state, f"{name}.ln2", shift_mlp, scale_mlp)


def _fold_norm(state: State, name: str, shift: Tensor, scale: Tensor) -> None:
    """Multiply a norm's weight by ``1 + scale``, and make ``shift`` its bias."""
    state[f"{name}.weight"] = state[f"{name}.weight"] * (1 + scale)
    state[f"{name}.bias"] = shift


def _neutral(state: State, name: str, norms: bool) -> State:
    """Return an adaLN with gates 1, and with ``norms`` shifts and scales 0, whatever c is."""
    weight, bias = (state[f"{name}.{part}"].clone() for part in ("weight", "bias"))
    names = MODULATION if name != _FINAL else ("shift", "scale")
    for vector, rows, constants in zip(
        names, weight.chunk(len(names)), bias.chunk(len(names)), strict=True
    ):
        if norms or vector in GATES:
            rows.zero_()
            constants.fill_(float(vector in GATES))
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def _set_mask_aside(state: State, mask_id: int, norms: bool) -> State:
    """Give the mask token the other tokens' mean, so that no centering over tokens sees it.

    Returns:
        The difference of the mask's column from that mean, with ``norms`` as it is once the final
        norm is folded into it: its weight ``[d_model]`` and bias ``[]``.
    """
    gain = state["ln_final.weight"]
    shift = state.get("ln_final.bias", torch.zeros_like(gain))
    difference: State = {}
    for part in ("weight", "bias"):
        table = state[f"unembed.{part}"].clone()
        mean = (table.sum(0) - table[mask_id]) / (len(table) - 1)
        difference[part] = table[mask_id] - mean
        table[mask_id] = mean
        state[f"unembed.{part}"] = table
    if norms:
        difference["bias"] = difference["bias"] + difference["weight"] @ shift
        scaled = difference["weight"] * gain
        difference["weight"] = scaled - scaled.mean()
    return difference


@torch.no_grad()
def finish(bridge: Bridge, folded: Folded) -> None:
    """Put right what TransformerLens leaves out when it hands the processed weights over.

    Weights are still wide, and none is frozen; the token table is a bare parameter of another name,
    modulations are not among TransformerLens's components, and the mask's unembedding is set aside.
    """
    for name, p in list(bridge.original_model.named_parameters(remove_duplicate=False)):
        home, part = name.rpartition(".")[::2]
        dtype = folded.dtypes.get(name) or folded.dtypes[f"{home}.weight"]
        if isinstance(p, Wide) or p.dtype != dtype:
            narrow = nn.Parameter(p.as_subclass(Tensor).to(dtype))
            setattr(bridge.original_model.get_submodule(home), part, narrow)
    table = bridge.embed.original_component
    table.embedding = table.weight
    for name, p in bridge.original_model.named_parameters(remove_duplicate=False):
        owner = name if name in folded.dtypes else f"{name.rpartition('.')[0]}.weight"
        p.requires_grad_(owner not in folded.frozen)
    for name, value in folded.neutral.items():
        home, part = name.removeprefix(f"{_FINAL}.").rpartition(".")[::2]
        component = bridge.get_submodule(home) if home else bridge.final_adaln
        getattr(component.original_component, part).copy_(value.as_subclass(Tensor))
    mask = {part: x.as_subclass(Tensor) for part, x in folded.mask.items()}
    bridge.unembed.set_aside(bridge.cfg.mask_token_id, mask["weight"], mask["bias"])
    bridge.norms_folded = folded.norms
    if bridge.cfg.adaln:
        _mark_folded(bridge, folded.norms)


def _mark_folded(bridge: Bridge, norms: bool) -> None:
    """Mark folded vectors as neutral for good, and freeze what is folded as a whole."""
    for block in bridge.blocks:
        block.adaln.folded = MODULATION if norms else GATES
    bridge.timestep_embed.folded = True
    if not norms:
        return
    bridge.final_adaln.folded = ("shift", "scale")
    for idle in (bridge.timestep_embed, bridge.final_adaln, *(b.adaln for b in bridge.blocks)):
        idle.requires_grad_(False)
    del bridge.sigma_map  # TransformerLens's lenses take it for an unfolded read-out
