"""BD3LM once more, slow and plain: what the package is compared with.

For every position i of a stream, with ``c = silu(sigma_map(sigma))``::

    h_i = ln1(x_i) * (1 + scale_msa) + shift_msa
    z_i = sum over the keys j that i may read of softmax_j(q_i . k_j / sqrt(d_head)) v_j
    x_i = x_i + gate_msa * W_o z_i
    x_i = x_i + gate_mlp * mlp(ln2(x_i) * (1 + scale_mlp) + shift_mlp)

Weights come from the file by their names there, who may read whom is asked for each pair of
positions, and every position has conditioning of its own. An edit is a tensor added to an
activation at the point that its hook name means, on the rows asked for.

It shares no code with the package, and knows neither caches nor tiles nor half precision.
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

VECTORS = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")


def block_of(position: int, block_size: int) -> int:
    return position // block_size


def may_read(
    query: int, key: int, view: str, length: int, block_size: int, reach: int | None = None
) -> bool:
    """Whether the token in row ``query`` sees the token in row ``key``.

    Views: ``"sampling"`` (one stream in blocks), ``"dual"`` (``[noisy | clean]``), ``"causal"`` and
    ``"open"``. With ``reach`` a block of the sampling view reads so many blocks, its own included.
    """
    if view == "open":
        return True
    if view == "causal":
        return key <= query
    query_block = block_of(query % length, block_size)
    key_block = block_of(key % length, block_size)
    if view == "sampling" and reach is not None:
        return query_block - reach < key_block <= query_block
    if view == "sampling":
        return key_block <= query_block
    query_is_noisy, key_is_noisy = query < length, key < length
    if query_is_noisy and key_is_noisy:
        return key_block == query_block
    if query_is_noisy:
        return key_block < query_block
    if key_is_noisy:
        return False
    return key_block <= query_block


def visible(
    queries: int, keys: int, view: str, length: int, block_size: int, reach: int | None = None
) -> list[list[bool]]:
    return [
        [may_read(query, key, view, length, block_size, reach) for key in range(keys)]
        for query in range(queries)
    ]


class Points:
    """The named places of one pass: what was seen there, and what is added there."""

    def __init__(self, edits: dict[str, Tensor], rows: range | None):
        self.edits = edits
        self.rows = rows
        self.seen: dict[str, Tensor] = {}
        self.used: set[str] = set()

    def delta(self, name: str, like: Tensor, axis: int) -> Tensor | None:
        """The edit at a name as wide as the pass: zero on all rows but the edited ones."""
        edit = self.edits.get(name)
        if edit is None:
            return None
        self.used.add(name)
        rows = self.rows or range(like.shape[axis])
        if edit.ndim == like.ndim - 1:
            edit = edit.unsqueeze(1)
        shape = list(like.shape)
        shape[axis] = len(rows)
        before, after = list(shape), list(shape)
        before[axis] = rows.start
        after[axis] = like.shape[axis] - rows.stop
        parts = [like.new_zeros(before), edit.to(like).expand(shape), like.new_zeros(after)]
        return torch.cat(parts, dim=axis)

    def __call__(self, value: Tensor, *names: str, axis: int = 1) -> Tensor:
        """The value after the edits at these names, which are one place."""
        for name in names:
            delta = self.delta(name, value, axis)
            if delta is not None:
                value = value + delta
        rows = self.rows or range(value.shape[axis])
        seen = value.narrow(axis, rows.start, len(rows))
        self.seen |= dict.fromkeys(names, seen)
        return value


def rotate_by_position(x: Tensor, positions: list[int], inv_freq: Tensor) -> Tensor:
    """``[batch, row, head, d_head]``, every pair (e, e + half) turned by position * frequency."""
    half = x.shape[-1] // 2
    rotated = []
    for row, position in enumerate(positions):
        cos, sin = (position * inv_freq).cos(), (position * inv_freq).sin()
        first, second = x[:, row, :, :half], x[:, row, :, half:]
        rotated.append(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))
    return torch.stack(rotated, dim=1)


def sinusoids(sigma: Tensor, width: int = 256) -> Tensor:
    frequencies = [10_000 ** (-k / (width // 2)) for k in range(width // 2)]
    cosines = [(sigma * frequency).cos() for frequency in frequencies]
    sines = [(sigma * frequency).sin() for frequency in frequencies]
    return torch.stack(cosines + sines, dim=-1)


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


class Reference:
    """A checkpoint's numbers, and the passes over them.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
        dtype: what everything is computed in.
        device: where.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ):
        self.config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.weights = {name: x.to(device, dtype) for name, x in tensors.items()}
        self.heads = self.config["n_heads"]
        self.d_head = self.config["hidden_dim"] // self.heads
        self.has_adaln = self.config["adaln"]

    def __call__(
        self,
        ids: Tensor,
        clean: Tensor | None = None,
        *,
        block_size: int | None = None,
        sigma: Tensor | None = None,
        rows: range | None = None,
        edits: dict[str, Tensor] | None = None,
        reach: int | None = None,
    ) -> dict[str, Tensor]:
        """Every activation by hook name, and ``"logits"``.

        Args:
            ids: the only stream, or the noisy one ``[batch, pos]``.
            clean: the clean stream of the dual view.
            block_size: the checkpoint's own by default.
            sigma: one number a row of the batch; 0 by default, and without time conditioning.
            rows: edit only these positions, and report only them (sampling view).
            edits: what to add, by hook name, shaped as the activation there (of ``rows``).
            reach: blocks that a block reads, its own included (sampling view); all by default.
        """
        if self.config["cross_attn"]:
            view = "sampling" if clean is None else "dual"
        else:
            view = "causal" if self.config["causal"] else "open"
        length = ids.shape[1]
        streams = ids if clean is None else torch.cat([ids, clean], dim=1)
        positions = [row % length for row in range(streams.shape[1])]
        total = len(positions)
        size = block_size or self.config["block_size"]
        sees = visible(total, total, view, length, size, reach)
        mask = torch.tensor(sees, device=ids.device)
        points = Points(edits or {}, rows)

        embedding = self.weights["backbone.vocab_embed.embedding"]
        x = points(embedding[streams], "hook_embed", "embed.hook_out")
        c = self.conditioning(sigma, streams.shape, x, points) if self.has_adaln else None
        for layer in range(self.config["n_blocks"]):
            x = self.layer(layer, x, c, mask, positions, points)
        logits = self.output(x[:, :length], None if c is None else c[:, :length], points)
        if points.used != set(points.edits):
            raise KeyError(f"no such place: {sorted(set(points.edits) - points.used)}")
        return points.seen | {
            "logits": logits if rows is None else logits[:, rows.start : rows.stop]
        }

    def conditioning(
        self, sigma: Tensor | None, shape: tuple[int, ...], like: Tensor, points: Points
    ) -> Tensor:
        """``silu(sigma_map(sigma))`` for every row of every position."""
        if sigma is None or not self.config["time_conditioning"]:
            sigma = like.new_zeros(shape[0])
        s = points(sigma.to(like)[:, None].expand(shape[:2]), "timestep_embed.hook_in")
        h = silu(self.linear("backbone.sigma_map.mlp.0", sinusoids(s)))
        h = self.linear("backbone.sigma_map.mlp.2", h)
        return silu(points(h, "timestep_embed.hook_out"))

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def norm(self, x: Tensor, weight: str, place: str, points: Callable[..., Tensor]) -> Tensor:
        x = points(x, f"{place}.hook_in")
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        scale = points((variance + 1e-5).sqrt(), f"{place}.hook_scale")
        normalized = points(centred / scale, f"{place}.hook_normalized")
        return points(normalized * self.weights[f"{weight}.weight"], f"{place}.hook_out")

    def vectors(
        self, c: Tensor | None, weight: str, place: str, names: tuple[str, ...], points: Points
    ) -> list[Tensor | float]:
        """The adaLN vectors of every row; shifts and scales of 0 and gates of 1 without adaLN."""
        if c is None:
            return [1.0 if name.startswith("gate") else 0.0 for name in names]
        joint = self.linear(weight, points(c, f"{place}.hook_in"))
        parts = points(joint, f"{place}.hook_out").chunk(len(names), dim=-1)
        return [
            points(part, f"{place}.hook_{name}") for name, part in zip(names, parts, strict=True)
        ]

    def layer(
        self,
        layer: int,
        x: Tensor,
        c: Tensor | None,
        mask: Tensor,
        positions: list[int],
        points: Points,
    ) -> Tensor:
        name, at = f"backbone.blocks.{layer}", f"blocks.{layer}"
        x = points(x, f"{at}.hook_resid_pre", f"{at}.hook_in")
        modulation = self.vectors(c, f"{name}.adaLN_modulation", f"{at}.adaln", VECTORS, points)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation

        normed = self.norm(x, f"{name}.norm1", f"{at}.ln1", points)
        h = normed * (1 + scale_msa) + shift_msa
        h = points(h, f"{at}.hook_modulated_msa", f"{at}.attn.hook_in")

        def modulated_copy(copy: Tensor) -> Tensor:
            """The same of one head's own copy of the residual."""
            plain = self.norm(copy, f"{name}.norm1", "", lambda value, *names: value)
            return plain * (1 + scale_msa) + shift_msa

        reads = self.head_copies(x, h, at, modulated_copy, points)
        write = self.attention(layer, reads, mask, positions, gate_msa, points)
        x = points(x + points(write, f"{at}.hook_attn_out"), f"{at}.hook_resid_mid")

        read = points(x, f"{at}.hook_mlp_in")
        h = self.norm(read, f"{name}.norm2", f"{at}.ln2", points) * (1 + scale_mlp) + shift_mlp
        h = points(h, f"{at}.hook_modulated_mlp", f"{at}.mlp.hook_in", f"{at}.mlp.in.hook_in")
        h = points(self.linear(f"{name}.mlp.0", h), f"{at}.mlp.hook_pre", f"{at}.mlp.in.hook_out")
        h = points(gelu(h), f"{at}.mlp.hook_post", f"{at}.mlp.out.hook_in")
        h = points(self.linear(f"{name}.mlp.2", h), f"{at}.mlp.hook_out", f"{at}.mlp.out.hook_out")
        x = x + points(gate_mlp * h, f"{at}.hook_mlp_out")
        return points(x, f"{at}.hook_resid_post", f"{at}.hook_out")

    def head_copies(
        self, x: Tensor, h: Tensor, at: str, modulated: Callable[[Tensor], Tensor], points: Points
    ) -> dict[str, list[Tensor]]:
        """What each head's q, k and v read: ``h`` for all, but for edits of a head's own copy."""
        reads = {}
        for part in ("q", "k", "v"):
            names = (f"{at}.attn.hook_attn_in", f"{at}.attn.hook_{part}_input")
            copies = x[:, :, None].expand(-1, -1, self.heads, -1)
            deltas = [points.delta(name, copies, 1) for name in names]
            edited = sum((delta for delta in deltas if delta is not None), start=copies)
            forked = any(delta is not None for delta in deltas)
            reads[part] = [
                points(modulated(edited[:, :, head]) if forked else h, f"{at}.attn.{part}.hook_in")
                for head in range(self.heads)
            ]
        return reads

    def attention(
        self,
        layer: int,
        reads: dict[str, list[Tensor]],
        mask: Tensor,
        positions: list[int],
        gate: Tensor | float,
        points: Points,
    ) -> Tensor:
        """The residual write, after its gate."""
        name, at = f"backbone.blocks.{layer}", f"blocks.{layer}.attn"
        joint = self.weights[f"{name}.attn_qkv.weight"].unflatten(0, (3, self.heads, self.d_head))
        projected = {}
        for index, part in enumerate(("q", "k", "v")):
            heads = [reads[part][head] @ joint[index, head].T for head in range(self.heads)]
            x = torch.stack(heads, dim=2)
            projected[part] = points(x, f"{at}.hook_{part}", f"{at}.{part}.hook_out")
        inv_freq = self.weights["backbone.rotary_emb.inv_freq"]
        q = points(rotate_by_position(projected["q"], positions, inv_freq), f"{at}.hook_rot_q")
        k = points(rotate_by_position(projected["k"], positions, inv_freq), f"{at}.hook_rot_k")
        v = projected["v"]

        scores = []
        for batch in range(q.shape[0]):
            for head in range(self.heads):
                for query in range(q.shape[1]):
                    dots = k[batch, :, head] @ q[batch, query, head] / math.sqrt(self.d_head)
                    scores.append(torch.where(mask[query], dots, -math.inf))
        shape = (q.shape[0], self.heads, q.shape[1], k.shape[1])
        scores = points(torch.stack(scores).reshape(shape), f"{at}.hook_attn_scores", axis=2)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        pattern = points(weights / weights.sum(-1, keepdim=True), f"{at}.hook_pattern", axis=2)
        rows = []
        for query in range(q.shape[1]):
            heads = [
                (pattern[:, head, query, :, None] * v[:, :, head]).sum(1)
                for head in range(self.heads)
            ]
            rows.append(torch.stack(heads, dim=1))
        z = points(torch.stack(rows, dim=1), f"{at}.hook_z", f"{at}.o.hook_in")

        w_o = self.weights[f"{name}.attn_out.weight"].unflatten(1, (self.heads, self.d_head))
        by_head = torch.stack([z[:, :, head] @ w_o[:, head].T for head in range(self.heads)], dim=2)
        gated = by_head if isinstance(gate, float) else by_head * gate[:, :, None]
        edited = points(gated, f"{at}.hook_result")
        write = gate * points(by_head.sum(2), f"{at}.hook_out", f"{at}.o.hook_out")
        return write + (edited - gated).sum(2)

    def output(self, x: Tensor, c: Tensor | None, points: Points) -> Tensor:
        name = "backbone.output_layer"
        h = self.norm(x, f"{name}.norm_final", "ln_final", points)
        vectors = self.vectors(
            c, f"{name}.adaLN_modulation", "final_adaln", ("shift", "scale"), points
        )
        h = points(h * (1 + vectors[1]) + vectors[0], "unembed.hook_in")
        return points(self.linear(f"{name}.linear", h), "unembed.hook_out", "hook_unembed")


@functools.cache
def reference(
    folder: Path, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Reference:
    return Reference(folder, dtype, device)
