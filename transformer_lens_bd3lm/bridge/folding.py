"""Constant modulation folded into the weights, so that the host's own weight processing is exact.

Without time conditioning c is one constant, so adaLN's vectors are too, and they are part of the
weights::

    (w * n) (1 + scale) + shift  =  (w (1 + scale)) n + shift       a norm with a bias
    gate * (z W_O)               =  z (W_O gate)                    a plain write

Gates are always folded, before anything is centred: a centred write times a gate is not centred.
Shifts and scales are folded when the host folds norms. What is folded is left neutral where it
stood (shift 0, scale 0, gate 1), and there it can be read, but an edit is refused: it would not
mean what it meant before. It stays so in training, and what is wholly folded is frozen.

The mask token never competes with the others (SUBS), so its column of the unembedding is set aside
before that is centred.

All of it, the host's part too, is computed in float64 and rounded once. With time conditioning
nothing here is constant, and it is refused.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from transformer_lens_bd3lm.bridge.conditioning import GATES, MODULATION
from transformer_lens_bd3lm.errors import NotExactError
from transformer_lens_bd3lm.model.modules import timestep_features

FINAL = "backbone.output_layer.adaLN_modulation"
SIGMA = "backbone.sigma_map.mlp"

State = dict[str, Tensor]


class Wide(Tensor):
    """A weight in float64 that stays so: the host would round it to float32 before it begins."""

    @classmethod
    def of(cls, x: Tensor) -> "Wide":
        """In float64; in float32 on "mps", which has none."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        return x.detach().to(wide).as_subclass(cls)

    def float(self, *args: Any, **kwargs: Any) -> "Wide":
        """Itself."""
        return self


@dataclass(frozen=True)
class Folded:
    """What is left to do once the host has put its weights into the components.

    Attributes:
        dtypes: of the model's parameters before, by name.
        frozen: which of them were.
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
    """Refuse a model that weight processing would change.

    Raises:
        NotExactError: with time conditioning, and where the host cannot tell the two axes of the
            unembedding apart.
    """
    if cfg.d_vocab == cfg.d_model:
        raise NotExactError(
            f"d_vocab == d_model == {cfg.d_model}: TransformerLens tells the axes of the "
            "unembedding by their lengths, and would centre the wrong one. Use the bridge as "
            "booted; nothing has been changed"
        )
    if cfg.adaln and cfg.time_conditioning:
        raise NotExactError(
            "time_conditioning=true: shift, scale and gate change with sigma, so no weights hold "
            "them, and weight processing would change the model. Use the bridge as booted: its "
            "hooks and logits are exact, and nothing has been changed"
        )


def refuse_refactoring(processing: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse the host's ``refactor_factored_attn_matrices``, which rotary embeddings rule out.

    Args:
        processing: the host's function.
        *args: what it is called with.
        **kwargs: likewise.

    Raises:
        NotExactError: if it was asked for.
    """
    asked = inspect.signature(processing).bind(*args, **kwargs).arguments
    if asked.get("refactor_factored_attn_matrices"):
        raise NotExactError(
            "refactor_factored_attn_matrices=True: with rotary embeddings W_Q W_K^T depends on "
            "positions, and is no one matrix to refactor. Leave it out; nothing has been changed"
        )


def fold_modulation(bridge: Any, state: State, norms: bool) -> Folded:
    """Put every gate, and with ``norms`` every shift and scale, into the weights.

    Args:
        bridge: whose weights they are; nothing of it is changed yet.
        state: its state dict; entries are replaced, no tensor is written into.
        norms: fold shifts and scales, into the norms' weights and new biases.

    Returns:
        What :func:`finish` has to put right after the host.

    Raises:
        NotExactError: as :func:`require_foldable`.
    """
    cfg = bridge.cfg
    require_foldable(cfg)
    state.update({name: Wide.of(x) for name, x in state.items() if x.is_floating_point()})
    neutral: State = {}
    if cfg.adaln:
        c = constant_c(state)
        for layer in range(cfg.n_layers):
            fold_layer(state, f"blocks.{layer}", c, norms)
            neutral |= left_neutral(state, f"blocks.{layer}.adaln", norms)
        if norms:
            fold_norm(state, "ln_final", *vectors(state, FINAL, c, 2))
            neutral |= left_neutral(state, FINAL, norms)
    mask = set_mask_aside(state, cfg.mask_token_id, norms)
    parameters = dict(bridge.original_model.named_parameters(remove_duplicate=False))
    dtypes = {name: p.dtype for name, p in parameters.items()}
    frozen = frozenset(name for name, p in parameters.items() if not p.requires_grad)
    return Folded(dtypes, frozen, norms, neutral, mask)


def constant_c(state: State) -> Float[Tensor, " cond"]:
    """``silu(sigma_map(0))``."""
    layers = [(state[f"{SIGMA}.{i}.weight"], state[f"{SIGMA}.{i}.bias"]) for i in (0, 2)]
    h = timestep_features(torch.zeros_like(layers[0][1][:1]))
    for weight, bias in layers:
        h = F.silu(F.linear(h, weight, bias))
    return h[0]


def vectors(state: State, name: str, c: Tensor, count: int) -> list[Float[Tensor, " d_model"]]:
    """One adaLN's vectors, in the checkpoint's order."""
    return list(F.linear(c, state[f"{name}.weight"], state[f"{name}.bias"]).chunk(count))


def fold_layer(state: State, name: str, c: Tensor, norms: bool) -> None:
    """One layer's gates into what writes, and its shifts and scales into its norms."""
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors(
        state, f"{name}.adaln", c, 6
    )
    for write, gate in ((f"{name}.attn.o", gate_msa), (f"{name}.mlp.out", gate_mlp)):
        state[f"{write}.weight"] = state[f"{write}.weight"] * gate[:, None]
        if f"{write}.bias" in state:
            state[f"{write}.bias"] = state[f"{write}.bias"] * gate
    if norms:
        fold_norm(state, f"{name}.ln1", shift_msa, scale_msa)
        fold_norm(state, f"{name}.ln2", shift_mlp, scale_mlp)


def fold_norm(state: State, name: str, shift: Tensor, scale: Tensor) -> None:
    """A norm's weight times ``1 + scale``, and ``shift`` as its bias."""
    state[f"{name}.weight"] = state[f"{name}.weight"] * (1 + scale)
    state[f"{name}.bias"] = shift


def left_neutral(state: State, name: str, norms: bool) -> State:
    """An adaLN with its gates 1, and with ``norms`` its shifts and scales 0, whatever c is."""
    weight, bias = (state[f"{name}.{part}"].clone() for part in ("weight", "bias"))
    names = MODULATION if name != FINAL else ("shift", "scale")
    for vector, rows, constants in zip(
        names, weight.chunk(len(names)), bias.chunk(len(names)), strict=True
    ):
        if norms or vector in GATES:
            rows.zero_()
            constants.fill_(float(vector in GATES))
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def set_mask_aside(state: State, mask_id: int, norms: bool) -> State:
    """Give the mask token the other tokens' mean, so that no centring over tokens sees it.

    Returns:
        What the mask's column had more than that mean, as it is once the host has folded the final
        norm into it (with ``norms``): its weight ``[d_model]`` and bias ``[]``.
    """
    gain = state["ln_final.weight"]
    shift = state.get("ln_final.bias", torch.zeros_like(gain))
    more: State = {}
    for part in ("weight", "bias"):
        table = state[f"unembed.{part}"].clone()
        mean = (table.sum(0) - table[mask_id]) / (len(table) - 1)
        more[part] = table[mask_id] - mean
        table[mask_id] = mean
        state[f"unembed.{part}"] = table
    if norms:
        more["bias"] = more["bias"] + more["weight"] @ shift
        more["weight"] = more["weight"] * gain
        more["weight"] = more["weight"] - more["weight"].mean()
    return more


@torch.no_grad()
def finish(bridge: Any, folded: Folded) -> None:
    """Put right what the host's hand-over of processed weights leaves out.

    Weights are wide still, and none is frozen; the token table is a bare parameter of another name,
    modulations are not among the host's components, and the mask's unembedding was set aside.
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
        home, part = name.removeprefix(f"{FINAL}.").rpartition(".")[::2]
        component = bridge.get_submodule(home) if home else bridge.final_adaln
        getattr(component.original_component, part).copy_(value.as_subclass(Tensor))
    mask = {part: x.as_subclass(Tensor) for part, x in folded.mask.items()}
    bridge.unembed.set_aside(bridge.cfg.mask_token_id, mask["weight"], mask["bias"])
    bridge.norms_folded = folded.norms
    if bridge.cfg.adaln:
        mark_folded(bridge, folded.norms)


def mark_folded(bridge: Any, norms: bool) -> None:
    """Make what is folded neutral for good, and freeze what is so as a whole."""
    for block in bridge.blocks:
        block.adaln.folded = MODULATION if norms else GATES
    bridge.timestep_embed.folded = True
    if not norms:
        return
    bridge.final_adaln.folded = ("shift", "scale")
    for idle in (bridge.timestep_embed, bridge.final_adaln, *(b.adaln for b in bridge.blocks)):
        idle.requires_grad_(False)
    del bridge.sigma_map  # by it the host's lenses know an unfolded read-out
