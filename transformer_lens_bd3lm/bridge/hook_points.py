"""The one table of hook points: their names, shapes, and what they hold.

What a step hook sees, what a record costs, how a cache is cut into streams, which names never fire:
all of it depends on what a hook point holds, and is read here, by name::

    lookup("blocks.3.attn.hook_q").axes        "batch pos head d_head"
    lookup("blocks.3.attn.q.hook_out").kind    "head", the same point by its other name

In a pattern ``{i}`` is the layer, and other braces hold alternatives: ``hook_{q,k,v}`` is three
hook points. Axes are those of a pass without edits; an edit of single rows may give a
modulation's axis of 1 the length of the pass.

To add a hook point, add its row; ``tests/bridge/test_hook_points.py`` compares the table with
booted bridges, and ``docs/hook-points.md`` and the README with the table.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "ids", "residual stream", "residual copy", "residual write", "ungated write", "norm",
    "modulated", "head", "scores", "pattern", "neuron", "conditioning", "modulation", "read-out",
    "unknown",
]  # fmt: skip
Part = Literal["embedding", "stream", "attention", "MLP", "modulation", "read-out", ""]


@dataclass(frozen=True)
class HookPointSpec:
    """A row of the table: what a hook point, or several alike, hold.

    Attributes:
        pattern: the names to use, with ``{i}`` for the layer and alternatives in braces.
        axes: axes of the activation.
        kind: what the values are.
        part: which part of the model it belongs to.
        meaning: one line for the reader.
        aliases: patterns of other names of the same points, alternatives in the same order.
        rows: which rows of a pass it has: ``"all"``, those that are read out (``"read-out"``), or
            ``"none"``, where it is one vector a row of the batch.
        streams: which streams of a dual pass it holds or changes.
        flag: the flag of TransformerLens that must be on, or it never fires.
        bypassed_by: flags that take it off the path; it never fires while one of them is on.
        instead: what to hook while it is bypassed.
        dtype: the weights' dtype, or float32 where that is narrower, or int64.
        explicit: computed only while something is hooked there; otherwise inside a kernel.
        survives_processing: weight processing leaves its values as they are, in every option.
    """

    pattern: str
    axes: str
    kind: Kind
    part: Part
    meaning: str
    aliases: tuple[str, ...] = ()
    rows: Literal["all", "read-out", "none"] = "all"
    streams: tuple[str, ...] = ("noisy", "clean")
    flag: str | None = None
    bypassed_by: tuple[str, ...] = ()
    instead: str = ""
    dtype: Literal["weights", "float32 or wider", "int64"] = "weights"
    explicit: bool = False
    survives_processing: bool = False

    @property
    def has_keys(self) -> bool:
        """Whether the last axis counts keys."""
        return self.axes.endswith(" key")

    @property
    def row_axis(self) -> int:
        """Axis of positions or queries; of a modulation, where an edit by row puts the rows."""
        return 2 if self.has_keys else 1

    def names(self) -> list[str]:
        """Return every name of its hook points, with ``{i}`` for the layer; main names first."""
        return [name for pattern in (self.pattern, *self.aliases) for name in expand(pattern)]

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Return the shape of the activation, from the sizes of the named axes."""
        return tuple(
            math.prod(int(x) if x.isdigit() else sizes[x] for x in axis.split("*"))
            for axis in self.axes.split()
        )


def expand(pattern: str) -> list[str]:
    """Return one name for each alternative in a pattern's braces; ``{i}`` stays."""
    braces = re.search(r"\{(\w+(?:,\w+)+)\}", pattern)
    if braces is None:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [name for each in braces[1].split(",") for name in expand(before + each + after)]


_STREAM, _HEAD, _PATTERN = "batch pos d_model", "batch pos head d_head", "batch head query key"
_BY_HEAD, _WIDE = "batch pos head d_model", "float32 or wider"
_NOISY = ("noisy",)
_FORKED = ("use_split_qkv_input", "use_attn_in")

# fmt: off
HOOK_POINTS: tuple[HookPointSpec, ...] = (
    HookPointSpec(
        "embed.hook_in", "batch pos", "ids", "embedding", "token ids", dtype="int64"),
    HookPointSpec(
        "hook_embed", _STREAM, "residual stream", "embedding",
        "the embedded tokens, before the first layer", aliases=("embed.hook_out",)),
    HookPointSpec(
        "timestep_embed.hook_in", "batch", "conditioning", "embedding",
        "sigma; zero without time conditioning", rows="none", dtype=_WIDE),
    HookPointSpec(
        "timestep_embed.hook_out", "batch cond", "conditioning", "embedding",
        "sigma_map(sigma), before its SiLU", rows="none"),

    HookPointSpec(
        "blocks.{i}.hook_resid_{pre,post}", _STREAM, "residual stream", "stream",
        "the residual stream before and after the layer; editing it edits the skip path",
        aliases=("blocks.{i}.hook_{in,out}",)),
    HookPointSpec(
        "blocks.{i}.hook_resid_mid", _STREAM, "residual stream", "stream",
        "the residual stream between attention and the MLP; editing it edits the skip path"),

    HookPointSpec(
        "blocks.{i}.adaln.hook_in", "batch cond", "modulation", "modulation",
        "c = silu(sigma_map(sigma)), which all layers share", rows="none"),
    HookPointSpec(
        "blocks.{i}.adaln.hook_out", "batch 1 6*d_model", "modulation", "modulation",
        "all six vectors, in the checkpoint's order", rows="none"),
    HookPointSpec(
        "blocks.{i}.adaln.hook_{shift,scale,gate}_{msa,mlp}", "batch 1 d_model", "modulation",
        "modulation", "adaLN's shift, scale and gate of attention (msa) and of the MLP (mlp)",
        rows="none"),

    HookPointSpec(
        "blocks.{i}.ln1.hook_in", _STREAM, "norm", "attention", "what ln1 reads"),
    HookPointSpec(
        "blocks.{i}.ln1.hook_scale", "batch pos 1", "norm", "attention",
        "standard deviation that ln1 divides by", dtype=_WIDE, explicit=True,
        survives_processing=True),
    HookPointSpec(
        "blocks.{i}.ln1.hook_normalized", _STREAM, "norm", "attention",
        "output of ln1 before its weight", dtype=_WIDE, explicit=True),
    HookPointSpec(
        "blocks.{i}.ln1.hook_out", _STREAM, "norm", "attention",
        "output of ln1 after its weight, before adaLN"),
    HookPointSpec(
        "blocks.{i}.hook_modulated_msa", _STREAM, "modulated", "attention",
        "ln1.hook_out * (1 + scale_msa) + shift_msa, the input of attention"),
    HookPointSpec(
        "blocks.{i}.attn.hook_in", _STREAM, "modulated", "attention",
        "the input of attention, once for q, k and v"),
    HookPointSpec(
        "blocks.{i}.attn.{q,k,v}.hook_in", _STREAM, "modulated", "attention",
        "the input of one projection", bypassed_by=_FORKED,
        instead="attn.hook_{q,k,v}_input or attn.hook_attn_in, the residual copied for every head"),
    HookPointSpec(
        "blocks.{i}.attn.hook_{q,k,v}_input", _BY_HEAD, "residual copy", "attention",
        "the residual stream copied for every head, before ln1", flag="use_split_qkv_input",
        aliases=("blocks.{i}.hook_{q,k,v}_input",)),
    HookPointSpec(
        "blocks.{i}.attn.hook_attn_in", _BY_HEAD, "residual copy", "attention",
        "the residual stream copied for every head, shared by q, k and v", flag="use_attn_in",
        aliases=("blocks.{i}.hook_attn_in",)),
    HookPointSpec(
        "blocks.{i}.attn.hook_{q,k}", _HEAD, "head", "attention",
        "queries and keys, before rotation", aliases=("blocks.{i}.attn.{q,k}.hook_out",),
        survives_processing=True),
    HookPointSpec(
        "blocks.{i}.attn.hook_v", _HEAD, "head", "attention", "values",
        aliases=("blocks.{i}.attn.v.hook_out",)),
    HookPointSpec(
        "blocks.{i}.attn.hook_rot_{q,k}", _HEAD, "head", "attention",
        "queries and keys, after rotation", survives_processing=True),
    HookPointSpec(
        "blocks.{i}.attn.hook_attn_scores", _PATTERN, "scores", "attention",
        "attention scores; -inf where a query must not read", explicit=True,
        survives_processing=True),
    HookPointSpec(
        "blocks.{i}.attn.hook_pattern", _PATTERN, "pattern", "attention",
        "attention pattern, the softmax of the scores", explicit=True, survives_processing=True),
    HookPointSpec(
        "blocks.{i}.attn.hook_z", _HEAD, "head", "attention",
        "values averaged by the pattern", aliases=("blocks.{i}.attn.o.hook_in",)),
    HookPointSpec(
        "blocks.{i}.attn.hook_result", _BY_HEAD, "head", "attention",
        "residual write of each head, after the gate", flag="use_attn_result"),
    HookPointSpec(
        "blocks.{i}.attn.o.hook_out", _STREAM, "ungated write", "attention",
        "output of W_O, before the gate", bypassed_by=("use_attn_result",),
        instead="attn.hook_out"),
    HookPointSpec(
        "blocks.{i}.attn.hook_out", _STREAM, "ungated write", "attention",
        "output of attention, before the gate"),
    HookPointSpec(
        "blocks.{i}.hook_attn_out", _STREAM, "residual write", "attention",
        "what attention adds to the residual stream, after the gate", explicit=True),

    HookPointSpec(
        "blocks.{i}.hook_mlp_in", _STREAM, "residual copy", "MLP",
        "the residual stream as ln2 reads it; an edit does not reach the skip path",
        flag="use_hook_mlp_in"),
    HookPointSpec(
        "blocks.{i}.ln2.hook_in", _STREAM, "norm", "MLP", "what ln2 reads"),
    HookPointSpec(
        "blocks.{i}.ln2.hook_scale", "batch pos 1", "norm", "MLP",
        "standard deviation that ln2 divides by", dtype=_WIDE, explicit=True,
        survives_processing=True),
    HookPointSpec(
        "blocks.{i}.ln2.hook_normalized", _STREAM, "norm", "MLP",
        "output of ln2 before its weight", dtype=_WIDE, explicit=True),
    HookPointSpec(
        "blocks.{i}.ln2.hook_out", _STREAM, "norm", "MLP",
        "output of ln2 after its weight, before adaLN"),
    HookPointSpec(
        "blocks.{i}.hook_modulated_mlp", _STREAM, "modulated", "MLP",
        "ln2.hook_out * (1 + scale_mlp) + shift_mlp, the input of the MLP"),
    HookPointSpec(
        "blocks.{i}.mlp.hook_in", _STREAM, "modulated", "MLP", "the input of the MLP",),
    HookPointSpec(
        "blocks.{i}.mlp.in.hook_in", _STREAM, "modulated", "MLP", "the input of W_in"),
    HookPointSpec(
        "blocks.{i}.mlp.hook_pre", "batch pos d_mlp", "neuron", "MLP",
        "neurons before GELU", aliases=("blocks.{i}.mlp.in.hook_out",), survives_processing=True),
    HookPointSpec(
        "blocks.{i}.mlp.hook_post", "batch pos d_mlp", "neuron", "MLP",
        "neurons after GELU", aliases=("blocks.{i}.mlp.out.hook_in",), survives_processing=True),
    HookPointSpec(
        "blocks.{i}.mlp.out.hook_out", _STREAM, "ungated write", "MLP",
        "output of W_out, before the gate"),
    HookPointSpec(
        "blocks.{i}.mlp.hook_out", _STREAM, "ungated write", "MLP",
        "output of the MLP, before the gate"),
    HookPointSpec(
        "blocks.{i}.hook_mlp_out", _STREAM, "residual write", "MLP",
        "what the MLP adds to the residual stream, after the gate", explicit=True),

    HookPointSpec(
        "ln_final.hook_in", _STREAM, "norm", "read-out", "what the final norm reads",
        rows="read-out", streams=_NOISY),
    HookPointSpec(
        "ln_final.hook_scale", "batch pos 1", "norm", "read-out",
        "standard deviation that the final norm divides by", rows="read-out", streams=_NOISY,
        dtype=_WIDE, explicit=True, survives_processing=True),
    HookPointSpec(
        "ln_final.hook_normalized", _STREAM, "norm", "read-out",
        "output of the final norm before its weight", rows="read-out", streams=_NOISY,
        dtype=_WIDE, explicit=True),
    HookPointSpec(
        "ln_final.hook_out", _STREAM, "norm", "read-out",
        "output of the final norm after its weight, before adaLN", rows="read-out",
        streams=_NOISY),
    HookPointSpec(
        "final_adaln.hook_in", "batch cond", "modulation", "modulation",
        "c = silu(sigma_map(sigma)) at the read-out", rows="none", streams=_NOISY),
    HookPointSpec(
        "final_adaln.hook_out", "batch 1 2*d_model", "modulation", "modulation",
        "both vectors, in the checkpoint's order", rows="none", streams=_NOISY),
    HookPointSpec(
        "final_adaln.hook_{shift,scale}", "batch 1 d_model", "modulation", "modulation",
        "adaLN's shift and scale of the read-out", rows="none", streams=_NOISY),
    HookPointSpec(
        "unembed.hook_in", _STREAM, "read-out", "read-out",
        "normalized and modulated, the input of the unembedding", rows="read-out",
        streams=_NOISY),
    HookPointSpec(
        "unembed.hook_out", "batch pos d_vocab", "read-out", "read-out",
        "raw logits, before SUBS", aliases=("hook_unembed",), rows="read-out", streams=_NOISY),
)
# fmt: on

UNKNOWN = HookPointSpec(
    "", _STREAM, "unknown", "", "a hook point of the user's own, taken to have positions on axis 1"
)
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")
"""Flags of TransformerLens that a hook point of the table needs."""

_BY_NAME = {name: spec for spec in HOOK_POINTS for name in spec.names()}


def split_layer(name: str) -> tuple[int | None, str]:
    """Return the layer of a hook name and its name within the layer.

    ``"blocks.3.attn.hook_q"`` is ``(3, "attn.hook_q")``; outside the layers it is ``(None, name)``.
    """
    layer = re.match(r"blocks\.(\d+)\.", name)
    return (int(layer[1]), name[layer.end() :]) if layer else (None, name)


def lookup(name: str) -> HookPointSpec:
    """Return the row of a hook name, canonical or alias; ``UNKNOWN`` if the table has none."""
    layer, point = split_layer(name)
    return _BY_NAME.get(point if layer is None else f"blocks.{{i}}.{point}", UNKNOWN)
