"""What each hook point means on the checkpoint's plain modules: where to read it, how to edit it.

The value at a hook point is an input or output of a plain module, an equal part of one, or a
formula of several; an edit ``a + delta`` there is an edit of inputs or outputs. With ``R`` the
rotation of a position and ``s`` a norm's scale::

    hook point         read                          a + delta
    hook_resid_mid     input of norm2                delta more into norm2 and out of the layer
    hook_attn_out      gate_msa * output of attn_out as hook_resid_mid
    hook_mlp_out       gate_mlp * output of mlp      delta more out of the layer
    attn.hook_rot_q    R q                           q + R^-1 delta
    attn.hook_pattern  softmax(scores)               delta v more into attn_out
    ln1.hook_scale     s = sqrt(var(x) + eps)        the output of norm1 times s / (s + delta)

Only torch hooks on the plain modules are used: nothing here knows how a bridge computes. Hook
points behind a flag are not here.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.model.inputs import View, read_input
from transformer_lens_bd3lm.model.modules import (
    NORM_EPS,
    at_least_float32,
    rotary_tables,
    rotate,
)

_VECTORS = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
_OUTPUT = "backbone.output_layer"


@dataclass
class PlainPass:
    """Inputs and outputs of the plain modules in one pass, after edits.

    Attributes:
        model: the plain modules.
        view: which positions read which.
        edits: changes of inputs and outputs.
        values: tensors by a module's path and ``"in"`` or ``"out"``.
    """

    model: Any
    view: View
    edits: "list[Edit]" = field(default_factory=list)
    values: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def __getitem__(self, place: tuple[str, str]) -> Tensor:
        """Return an input or output; of the dual view's readout, only the noisy stream's.

        The plain modules read out the clean stream too, and then drop it.
        """
        x = self.values[place]
        return x[:, : self.view.length] if place[0].startswith(_OUTPUT) and x.ndim == 3 else x

    def weight(self, path: str) -> Tensor:
        """Return a plain module's weight."""
        return self.model.get_submodule(path).weight

    def rotary(self) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the pass's positions."""
        inv_freq = self.model.backbone.rotary_emb.inv_freq
        return rotary_tables(self.view.positions(), inv_freq, self.model.dtype)

    def edit_and_keep(self, path: str, side: str, x: Tensor) -> Tensor:
        """Edit and keep a module's input or output."""
        for where, end, change in self.edits:
            if (where, end) == (path, side):
                x = change(x, self)
        self.values[path, side] = x
        return x

    def on_input(self, path: str, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Edit and keep a module's first argument: a torch hook."""
        return (self.edit_and_keep(path, "in", args[0]), *args[1:])

    def on_output(self, path: str, module: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Edit and keep a module's output: a torch hook."""
        return self.edit_and_keep(path, "out", out)


_Read = Callable[[PlainPass], Tensor]
Edit = tuple[str, str, Callable[[Tensor, PlainPass], Tensor]]
_Push = Callable[[Tensor], list[Edit]]


@dataclass(frozen=True)
class Counterpart:
    """A hook point of the bridge, as the plain modules have it.

    Attributes:
        name: the hook point's name on the bridge.
        read: from a pass of the plain modules, the value at the hook point.
        edit: from a delta of the bridge's shape, the edits of the plain modules.
        through: the residual write or weight through which all of its effect goes: an edit has no
            effect where that is zero.
    """

    name: str
    read: _Read
    edit: _Push
    through: _Read | None = None


def run_plain(
    model: Any, ids: Tensor, edits: Iterable[Edit] = (), **keywords: Any
) -> tuple[Float[Tensor, "batch pos d_vocab"], PlainPass]:
    """Run one pass of the plain modules: raw logits, and all inputs and outputs of modules.

    Args:
        model: the plain modules.
        ids: token ids, as their forward takes them.
        edits: changes of modules' inputs and outputs.
        **keywords: keywords of their forward.
    """
    clean, block_size = keywords.get("clean"), keywords.get("block_size")
    view = read_input(model.config, ids, clean=clean, block_size=block_size)
    plain = PlainPass(model, view, list(edits))
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path.startswith("backbone."):
                stack.enter_context(module.register_forward_pre_hook(partial(plain.on_input, path)))
                stack.enter_context(module.register_forward_hook(partial(plain.on_output, path)))
        logits = model(ids, return_dict=False, **keywords)
    return logits, plain


def _edit_at(path: str, side: str, change: Callable[..., Tensor], **options: Any) -> _Push:
    """Return a function from a delta to an edit of one input or output."""
    return lambda delta: [(path, side, partial(change, delta=delta, **options))]


def _both(one: _Push, two: _Push) -> _Push:
    """Return a function from a delta to the edits of both."""
    return lambda delta: [*one(delta), *two(delta)]


def _plus(x: Tensor, delta: Tensor) -> Tensor:
    """Compute ``x + delta``; delta may have a head axis, and lack rows that are not read out."""
    if x.ndim < 3:
        return x + delta.reshape_as(x)
    delta = delta.reshape(len(x), -1, x.shape[-1])
    return x + F.pad(delta, (0, 0, 0, x.shape[1] - delta.shape[1]))


def _add(x: Tensor, plain: PlainPass, delta: Tensor, part: int = 0, of: int = 1) -> Tensor:
    """Add delta to one of the equal parts of an input or output."""
    parts = list(x.chunk(of, dim=-1))
    parts[part] = _plus(parts[part], delta)
    return torch.cat(parts, dim=-1)


def _point(name: str, path: str, side: str, part: int = 0, of: int = 1) -> Counterpart:
    """Return a hook point that is a module's input or output, or an equal part of it."""
    push = _edit_at(path, side, _add, part=part, of=of)
    return Counterpart(name, lambda plain: plain[path, side].chunk(of, dim=-1)[part], push)


# Norms


def _normalized(x: Tensor) -> Tensor:
    """Compute ``(x - mean) / s``."""
    return F.layer_norm(at_least_float32(x), x.shape[-1:], eps=NORM_EPS)


def _scale(x: Tensor) -> Tensor:
    """Compute ``s = sqrt(var(x) + eps)``."""
    return (at_least_float32(x).var(-1, keepdim=True, unbiased=False) + NORM_EPS).sqrt()


def _rescale(x: Tensor, plain: PlainPass, delta: Tensor, norm: str) -> Tensor:
    """Multiply by ``s / (s + delta)``."""
    s = _scale(plain[norm, "in"])
    factor = F.pad(s / (s + delta), (0, 0, 0, x.shape[1] - s.shape[1]), value=1.0)
    return (x * factor).to(x.dtype)


def _add_weighted(x: Tensor, plain: PlainPass, delta: Tensor, norm: str) -> Tensor:
    """Add delta times the norm's weight."""
    return _plus(x, (delta * plain.weight(norm)).to(x.dtype))


def _norm(name: str, path: str) -> Iterator[Counterpart]:
    """Yield a norm's four hook points."""
    yield _point(f"{name}.hook_in", path, "in")
    yield Counterpart(
        f"{name}.hook_scale",
        lambda plain: _scale(plain[path, "in"]),
        _edit_at(path, "out", _rescale, norm=path),
    )
    yield Counterpart(
        f"{name}.hook_normalized",
        lambda plain: _normalized(plain[path, "in"]),
        _edit_at(path, "out", _add_weighted, norm=path),
    )
    yield _point(f"{name}.hook_out", path, "out")


# Attention


def _heads(plain: PlainPass, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v ``[batch, head, pos, d_head]``, not rotated."""
    n_heads = plain.model.config.n_heads
    joint = plain[f"{layer}.attn_qkv", "out"].unflatten(-1, (3, n_heads, -1))
    q, k, v = joint.permute(2, 0, 3, 1, 4)
    return q, k, v


def _rotated(plain: PlainPass, layer: str, part: int) -> Float[Tensor, "batch pos head d_head"]:
    """Compute ``R q`` (part 0) or ``R k`` (part 1)."""
    return rotate(_heads(plain, layer)[part], *plain.rotary()).transpose(1, 2)


def _scores(plain: PlainPass, layer: str) -> Float[Tensor, "batch head query key"]:
    """Compute ``R q (R k)^T / sqrt(d_head)``, -inf where a query must not read."""
    q, k = (_rotated(plain, layer, part).transpose(1, 2) for part in (0, 1))
    x = q @ k.mT * q.shape[-1] ** -0.5
    mask = plain.view.mask()
    return x if mask is None else x.masked_fill(~mask, -torch.inf)


def _pattern(x: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """Compute the softmax of scores, in float32 or wider."""
    return at_least_float32(x).softmax(-1).to(x.dtype)


def _add_unrotated(x: Tensor, plain: PlainPass, delta: Tensor, part: int) -> Tensor:
    """Add ``R^-1 delta`` to queries or keys."""
    cos, sin = plain.rotary()
    return _add(x, plain, rotate(delta.transpose(1, 2), cos, -sin).transpose(1, 2), part, 3)


def _add_projected(x: Tensor, plain: PlainPass, delta: Tensor, layer: str, part: int) -> Tensor:
    """Add the projection of delta to the queries, keys or values alone."""
    weight = plain.weight(f"{layer}.attn_qkv").chunk(3)[part]
    return _add(x, plain, F.linear(delta, weight), part, 3)


def _attend_by(x: Tensor, plain: PlainPass, delta: Tensor, layer: str) -> Tensor:
    """Compute ``z`` from scores plus delta."""
    z = _pattern(_scores(plain, layer) + delta) @ _heads(plain, layer)[2]
    return z.transpose(1, 2).flatten(2)


def _add_attended(x: Tensor, plain: PlainPass, delta: Tensor, layer: str) -> Tensor:
    """Add ``delta v``."""
    return _plus(x, (delta @ _heads(plain, layer)[2]).transpose(1, 2))


def _attention(name: str, layer: str) -> Iterator[Counterpart]:
    """Yield the hook points of a layer's attention, from input to output."""
    qkv, out = f"{layer}.attn_qkv", f"{layer}.attn_out"
    yield _point(f"{name}.hook_in", qkv, "in")
    for part, letter in enumerate("qkv"):
        only = _edit_at(qkv, "out", _add_projected, layer=layer, part=part)
        yield Counterpart(f"{name}.{letter}.hook_in", lambda plain: plain[qkv, "in"], only)
        yield _point(f"{name}.hook_{letter}", qkv, "out", part, 3)
    for part, letter in enumerate("qk"):
        read = partial(_rotated, layer=layer, part=part)
        yield Counterpart(
            f"{name}.hook_rot_{letter}", read, _edit_at(qkv, "out", _add_unrotated, part=part)
        )
    yield Counterpart(
        f"{name}.hook_attn_scores",
        lambda plain: _scores(plain, layer),
        _edit_at(out, "in", _attend_by, layer=layer),
    )
    yield Counterpart(
        f"{name}.hook_pattern",
        lambda plain: _pattern(_scores(plain, layer)),
        _edit_at(out, "in", _add_attended, layer=layer),
    )
    yield _point(f"{name}.hook_z", out, "in")
    yield _point(f"{name}.hook_out", out, "out")


# Layers, and the whole model


def _adaln(name: str, path: str, vectors: tuple[str, ...]) -> Iterator[Counterpart]:
    """Yield the hook points of an adaLN: the conditioning vector, and its modulation vectors."""
    c = _point(f"{name}.hook_in", path, "in")
    yield replace(c, through=lambda plain: plain.weight(path))
    yield _point(f"{name}.hook_out", path, "out")
    for part, vector in enumerate(vectors):
        yield _point(f"{name}.hook_{vector}", path, "out", part, len(vectors))


def _gated(plain: PlainPass, layer: str, gate: str, write: str) -> Tensor:
    """Compute the residual write, ``gate * write``."""
    x = plain[f"{layer}.{write}", "out"]
    if not plain.model.config.adaln:
        return x
    vectors = plain[f"{layer}.adaLN_modulation", "out"].chunk(len(_VECTORS), dim=-1)
    return vectors[_VECTORS.index(gate)][:, None] * x


def _mlp(name: str, layer: str) -> Iterator[Counterpart]:
    """Yield the hook points of a layer's MLP, from input to output."""
    yield _point(f"{name}.hook_in", f"{layer}.mlp", "in")
    yield _point(f"{name}.hook_pre", f"{layer}.mlp.0", "out")
    yield _point(f"{name}.hook_post", f"{layer}.mlp.2", "in")
    yield _point(f"{name}.hook_out", f"{layer}.mlp", "out")


def _layer(i: int, adaln: bool) -> Iterator[Counterpart]:
    """Yield a layer's hook points, in the order in which they are computed."""
    name, layer = f"blocks.{i}", f"backbone.blocks.{i}"
    attn_write = partial(_gated, layer=layer, gate="gate_msa", write="attn_out")
    mlp_write = partial(_gated, layer=layer, gate="gate_mlp", write="mlp")
    after = _edit_at(layer, "out", _add)
    skip_and_mlp = _both(_edit_at(f"{layer}.norm2", "in", _add), after)
    yield _point(f"{name}.hook_resid_pre", layer, "in")
    through = {"shift_msa": attn_write, "scale_msa": attn_write}
    through |= {"shift_mlp": mlp_write, "scale_mlp": mlp_write}
    if adaln:
        for each in _adaln(f"{name}.adaln", f"{layer}.adaLN_modulation", _VECTORS):
            yield replace(
                each, through=through.get(each.name.rpartition(".hook_")[2], each.through)
            )
    for each in (
        *_norm(f"{name}.ln1", f"{layer}.norm1"),
        _point(f"{name}.hook_modulated_msa", f"{layer}.attn_qkv", "in"),
        *_attention(f"{name}.attn", layer),
    ):
        yield replace(each, through=attn_write)
    yield Counterpart(f"{name}.hook_attn_out", attn_write, skip_and_mlp)
    yield Counterpart(
        f"{name}.hook_resid_mid", lambda plain: plain[f"{layer}.norm2", "in"], skip_and_mlp
    )
    for each in (
        *_norm(f"{name}.ln2", f"{layer}.norm2"),
        _point(f"{name}.hook_modulated_mlp", f"{layer}.mlp", "in"),
        *_mlp(f"{name}.mlp", layer),
    ):
        yield replace(each, through=mlp_write)
    yield Counterpart(f"{name}.hook_mlp_out", mlp_write, after)
    yield _point(f"{name}.hook_resid_post", layer, "out")


def counterparts(n_layers: int, adaln: bool) -> list[Counterpart]:
    """List every hook point that always fires, in the order in which they are computed."""
    points = [_point("hook_embed", "backbone.vocab_embed", "out")]
    if adaln:
        points.append(_point("timestep_embed.hook_in", "backbone.sigma_map", "in"))
        points.append(_point("timestep_embed.hook_out", "backbone.sigma_map", "out"))
    for i in range(n_layers):
        points += _layer(i, adaln)
    points += _norm("ln_final", f"{_OUTPUT}.norm_final")
    if adaln:
        points += _adaln("final_adaln", f"{_OUTPUT}.adaLN_modulation", ("shift", "scale"))
    points.append(_point("unembed.hook_in", f"{_OUTPUT}.linear", "in"))
    points.append(_point("unembed.hook_out", f"{_OUTPUT}.linear", "out"))
    return points
