"""What each hook point means on the checkpoint's plain modules: where to read it, how to edit it.

A hook point is what a plain module takes or gives, an equal part of that, or a formula of such; and
an edit ``a + delta`` there is an edit of what modules take or give. With ``R`` the rotation of a
position and ``s`` a norm's scale::

    hook point         read                          a + delta
    hook_resid_mid     what norm2 takes              norm2 takes, and the layer gives, + delta
    hook_attn_out      gate_msa * attn_out's         as hook_resid_mid
    hook_mlp_out       gate_mlp * mlp's              the layer gives + delta
    attn.hook_rot_q    R q                           q + R^-1 delta
    attn.hook_pattern  softmax(scores)               attn_out takes + delta v
    ln1.hook_scale     s = sqrt(var(x) + eps)        norm1 gives s / (s + delta) times as much

Only torch hooks on the plain modules are used: nothing here knows how a bridge does it, and hook
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

VECTORS = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
OUTPUT = "backbone.output_layer"


@dataclass
class Seen:
    """What the plain modules took and gave in one pass, edited on the way.

    Attributes:
        model: the plain modules.
        view: how positions read each other.
        edits: what is done differently.
        values: by a module's path and ``"in"`` or ``"out"``.
    """

    model: Any
    view: View
    edits: "list[Edit]" = field(default_factory=list)
    values: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def __getitem__(self, place: tuple[str, str]) -> Tensor:
        """What is at a place; of the dual view's readout the noisy half, which is all that counts.

        The plain modules read out the clean half too, and then drop it.
        """
        x = self.values[place]
        return x[:, : self.view.length] if place[0].startswith(OUTPUT) and x.ndim == 3 else x

    def weight(self, path: str) -> Tensor:
        """A plain module's weight."""
        return self.model.get_submodule(path).weight

    def rotary(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the pass's positions."""
        inv_freq = self.model.backbone.rotary_emb.inv_freq
        return rotary_tables(self.view.positions(), inv_freq, self.model.dtype)

    def at(self, path: str, side: str, x: Tensor) -> Tensor:
        """Edit what a module takes or gives, and keep it."""
        for where, end, change in self.edits:
            if (where, end) == (path, side):
                x = change(x, self)
        self.values[path, side] = x
        return x

    def taken(self, path: str, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A torch hook on what a module takes."""
        return (self.at(path, "in", args[0]), *args[1:])

    def given(self, path: str, module: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """A torch hook on what a module gives."""
        return self.at(path, "out", out)


Read = Callable[[Seen], Tensor]
Edit = tuple[str, str, Callable[[Tensor, Seen], Tensor]]
Push = Callable[[Tensor], list[Edit]]


@dataclass(frozen=True)
class Point:
    """A hook point, by its name on the bridge.

    Attributes:
        name: the bridge's name.
        read: its value in a pass of the plain modules.
        edit: from a delta of the bridge's shape, what the plain modules do differently.
        through: what all of its effect goes through, a residual write or a weight: where that is
            zero, it has none.
    """

    name: str
    read: Read
    edit: Push
    through: Read | None = None


def passed(
    model: Any, ids: Tensor, edits: Iterable[Edit] = (), **how: Any
) -> tuple[Float[Tensor, "batch pos d_vocab"], Seen]:
    """One pass of the plain modules: raw logits, and everything that modules took and gave.

    Args:
        model: the plain modules.
        ids: as their forward takes them.
        edits: where to change what.
        **how: the keywords of their forward.
    """
    view = read_input(model.config, ids, clean=how.get("clean"), block_size=how.get("block_size"))
    seen = Seen(model, view, list(edits))
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path.startswith("backbone."):
                stack.enter_context(module.register_forward_pre_hook(partial(seen.taken, path)))
                stack.enter_context(module.register_forward_hook(partial(seen.given, path)))
        logits = model(ids, return_dict=False, **how)
    return logits, seen


def at(path: str, side: str, change: Callable[..., Tensor], **how: Any) -> Push:
    """An edit of one place, once there is a delta for it."""
    return lambda delta: [(path, side, partial(change, delta=delta, **how))]


def both(one: Push, two: Push) -> Push:
    """The same delta at two places."""
    return lambda delta: [*one(delta), *two(delta)]


def plus(x: Tensor, delta: Tensor) -> Tensor:
    """``x + delta``, where heads may be apart in delta and rows that nobody reads be missing."""
    if x.ndim < 3:
        return x + delta.reshape_as(x)
    delta = delta.reshape(len(x), -1, x.shape[-1])
    return x + F.pad(delta, (0, 0, 0, x.shape[1] - delta.shape[1]))


def add(x: Tensor, seen: Seen, delta: Tensor, part: int = 0, of: int = 1) -> Tensor:
    """Add delta to one of the equal parts of what a module takes or gives."""
    parts = list(x.chunk(of, dim=-1))
    parts[part] = plus(parts[part], delta)
    return torch.cat(parts, dim=-1)


def point(name: str, path: str, side: str, part: int = 0, of: int = 1) -> Point:
    """What a module takes or gives, or one of its equal parts."""
    push = at(path, side, add, part=part, of=of)
    return Point(name, lambda seen: seen[path, side].chunk(of, dim=-1)[part], push)


# Norms


def normalized(x: Tensor) -> Tensor:
    """``(x - mean) / s``."""
    return F.layer_norm(at_least_float32(x), x.shape[-1:], eps=NORM_EPS)


def scale(x: Tensor) -> Tensor:
    """``s = sqrt(var(x) + eps)``."""
    return (at_least_float32(x).var(-1, keepdim=True, unbiased=False) + NORM_EPS).sqrt()


def rescale(x: Tensor, seen: Seen, delta: Tensor, norm: str) -> Tensor:
    """``s / (s + delta)`` times as much."""
    s = scale(seen[norm, "in"])
    factor = F.pad(s / (s + delta), (0, 0, 0, x.shape[1] - s.shape[1]), value=1.0)
    return (x * factor).to(x.dtype)


def add_weighted(x: Tensor, seen: Seen, delta: Tensor, norm: str) -> Tensor:
    """Delta times the norm's weight more."""
    return plus(x, (delta * seen.weight(norm)).to(x.dtype))


def norm_points(name: str, path: str) -> Iterator[Point]:
    """A norm's four hook points."""
    yield point(f"{name}.hook_in", path, "in")
    yield Point(
        f"{name}.hook_scale",
        lambda seen: scale(seen[path, "in"]),
        at(path, "out", rescale, norm=path),
    )
    yield Point(
        f"{name}.hook_normalized",
        lambda seen: normalized(seen[path, "in"]),
        at(path, "out", add_weighted, norm=path),
    )
    yield point(f"{name}.hook_out", path, "out")


# Attention


def heads(seen: Seen, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[batch, head, pos, d_head]``, not rotated."""
    n_heads = seen.model.config.n_heads
    joint = seen[f"{layer}.attn_qkv", "out"].unflatten(-1, (3, n_heads, -1))
    q, k, v = joint.permute(2, 0, 3, 1, 4)
    return q, k, v


def rotated(seen: Seen, layer: str, part: int) -> Float[Tensor, "batch pos head d_head"]:
    """``R q`` or ``R k``, as the bridge shows it."""
    return rotate(heads(seen, layer)[part], *seen.rotary()).transpose(1, 2)


def scores(seen: Seen, layer: str) -> Float[Tensor, "batch head query key"]:
    """``R q (R k)^T / sqrt(d_head)``, -inf where a query must not read."""
    q, k = (rotated(seen, layer, part).transpose(1, 2) for part in (0, 1))
    found = q @ k.mT * q.shape[-1] ** -0.5
    mask = seen.view.mask()
    return found if mask is None else found.masked_fill(~mask, -torch.inf)


def pattern(found: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """Softmax of scores, in float32 or wider."""
    return at_least_float32(found).softmax(-1).to(found.dtype)


def add_unrotated(x: Tensor, seen: Seen, delta: Tensor, part: int) -> Tensor:
    """``R^-1 delta`` more queries or keys."""
    cos, sin = seen.rotary()
    return add(x, seen, rotate(delta.transpose(1, 2), cos, -sin).transpose(1, 2), part, 3)


def add_projected(x: Tensor, seen: Seen, delta: Tensor, layer: str, part: int) -> Tensor:
    """What one projection alone makes of delta more."""
    weight = seen.weight(f"{layer}.attn_qkv").chunk(3)[part]
    return add(x, seen, F.linear(delta, weight), part, 3)


def attend_by(x: Tensor, seen: Seen, delta: Tensor, layer: str) -> Tensor:
    """``z`` by scores that are delta more."""
    z = pattern(scores(seen, layer) + delta) @ heads(seen, layer)[2]
    return z.transpose(1, 2).flatten(2)


def add_attended(x: Tensor, seen: Seen, delta: Tensor, layer: str) -> Tensor:
    """``delta v`` more."""
    return plus(x, (delta @ heads(seen, layer)[2]).transpose(1, 2))


def attention_points(name: str, layer: str) -> Iterator[Point]:
    """A layer's attention, from what it takes to what it gives."""
    qkv, out = f"{layer}.attn_qkv", f"{layer}.attn_out"
    yield point(f"{name}.hook_in", qkv, "in")
    for part, letter in enumerate("qkv"):
        only = at(qkv, "out", add_projected, layer=layer, part=part)
        yield Point(f"{name}.{letter}.hook_in", lambda seen: seen[qkv, "in"], only)
        yield point(f"{name}.hook_{letter}", qkv, "out", part, 3)
    for part, letter in enumerate("qk"):
        read = partial(rotated, layer=layer, part=part)
        yield Point(f"{name}.hook_rot_{letter}", read, at(qkv, "out", add_unrotated, part=part))
    yield Point(
        f"{name}.hook_attn_scores",
        lambda seen: scores(seen, layer),
        at(out, "in", attend_by, layer=layer),
    )
    yield Point(
        f"{name}.hook_pattern",
        lambda seen: pattern(scores(seen, layer)),
        at(out, "in", add_attended, layer=layer),
    )
    yield point(f"{name}.hook_z", out, "in")
    yield point(f"{name}.hook_out", out, "out")


# Layers, and the whole


def adaln_points(name: str, path: str, vectors: tuple[str, ...]) -> Iterator[Point]:
    """The conditioning vector, and what adaLN makes of it."""
    c = point(f"{name}.hook_in", path, "in")
    yield replace(c, through=lambda seen: seen.weight(path))
    yield point(f"{name}.hook_out", path, "out")
    for part, vector in enumerate(vectors):
        yield point(f"{name}.hook_{vector}", path, "out", part, len(vectors))


def gated(seen: Seen, layer: str, gate: str, write: str) -> Tensor:
    """What is added to the stream: ``gate * write``."""
    x = seen[f"{layer}.{write}", "out"]
    if not seen.model.config.adaln:
        return x
    vectors = seen[f"{layer}.adaLN_modulation", "out"].chunk(len(VECTORS), dim=-1)
    return vectors[VECTORS.index(gate)][:, None] * x


def mlp_points(name: str, layer: str) -> Iterator[Point]:
    """A layer's MLP, from what it takes to what it gives."""
    yield point(f"{name}.hook_in", f"{layer}.mlp", "in")
    yield point(f"{name}.hook_pre", f"{layer}.mlp.0", "out")
    yield point(f"{name}.hook_post", f"{layer}.mlp.2", "in")
    yield point(f"{name}.hook_out", f"{layer}.mlp", "out")


def layer_points(i: int, adaln: bool) -> Iterator[Point]:
    """One layer's hook points, in the order in which they are computed."""
    name, layer = f"blocks.{i}", f"backbone.blocks.{i}"
    attn_write = partial(gated, layer=layer, gate="gate_msa", write="attn_out")
    mlp_write = partial(gated, layer=layer, gate="gate_mlp", write="mlp")
    after = at(layer, "out", add)
    skip_and_mlp = both(at(f"{layer}.norm2", "in", add), after)
    yield point(f"{name}.hook_resid_pre", layer, "in")
    ways = {"shift_msa": attn_write, "scale_msa": attn_write}
    ways |= {"shift_mlp": mlp_write, "scale_mlp": mlp_write}
    if adaln:
        for each in adaln_points(f"{name}.adaln", f"{layer}.adaLN_modulation", VECTORS):
            yield replace(each, through=ways.get(each.name.rpartition(".hook_")[2], each.through))
    for each in (
        *norm_points(f"{name}.ln1", f"{layer}.norm1"),
        point(f"{name}.hook_modulated_msa", f"{layer}.attn_qkv", "in"),
        *attention_points(f"{name}.attn", layer),
    ):
        yield replace(each, through=attn_write)
    yield Point(f"{name}.hook_attn_out", attn_write, skip_and_mlp)
    yield Point(f"{name}.hook_resid_mid", lambda seen: seen[f"{layer}.norm2", "in"], skip_and_mlp)
    for each in (
        *norm_points(f"{name}.ln2", f"{layer}.norm2"),
        point(f"{name}.hook_modulated_mlp", f"{layer}.mlp", "in"),
        *mlp_points(f"{name}.mlp", layer),
    ):
        yield replace(each, through=mlp_write)
    yield Point(f"{name}.hook_mlp_out", mlp_write, after)
    yield point(f"{name}.hook_resid_post", layer, "out")


def points(n_layers: int, adaln: bool) -> list[Point]:
    """Every hook point that always fires, in the order in which they are computed."""
    found = [point("hook_embed", "backbone.vocab_embed", "out")]
    if adaln:
        found.append(point("timestep_embed.hook_in", "backbone.sigma_map", "in"))
        found.append(point("timestep_embed.hook_out", "backbone.sigma_map", "out"))
    for i in range(n_layers):
        found += layer_points(i, adaln)
    found += norm_points("ln_final", f"{OUTPUT}.norm_final")
    if adaln:
        found += adaln_points("final_adaln", f"{OUTPUT}.adaLN_modulation", ("shift", "scale"))
    found.append(point("unembed.hook_in", f"{OUTPUT}.linear", "in"))
    found.append(point("unembed.hook_out", f"{OUTPUT}.linear", "out"))
    return found
