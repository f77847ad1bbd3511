"""Whether a bridge is its checkpoint: every hook point, read and edited, beside the plain modules.

The plain modules, as ``AutoModelForMaskedLM`` loads them, decide. With a the bridge's value at a
hook point and a' theirs (see ``meaning``), over random tokens half of which are masked, in both
views and at several block sizes::

    read       max |a - a'|                                  every hook point, on one forward
    logits     max |f(x) - f'(x)|                            nobody looks
    gradient   max |df/da - df'/da'|                         of one random sum of the logits
    edit       max |f(x; a + d) - f'(x; a' + d)|             the same random d at both

each at most so much of the largest value on their side as rounding makes. An edit must also move
their logits by more than that: one that moves nothing verifies nothing, and fails, unless all it
acts through is zero whatever it does.

With processed weights most activations are others; what is left the same is compared: queries,
keys, scores, patterns (as they are read: with value biases folded, an edit means something else),
neurons and norms' scales, and the log-probabilities of real tokens at masked positions in place of
the logits. In half precision rounding drowns gradients and edits, and they are left out.

It does not say whether the plain modules are right: they are what a checkpoint is compared with.
Hook points behind a flag and the denoising loop's cache are not compared.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text as RichText
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from transformer_lens_bd3lm.analysis.comparable import (
    check_asked,
    check_bridge,
    check_same_shape,
    plain_modules,
    read_allowed,
    read_length,
)
from transformer_lens_bd3lm.analysis.verify.reference import Point, Seen, passed, points
from transformer_lens_bd3lm.bridge.boot import loading, path_of
from transformer_lens_bd3lm.bridge.distribution import masks_anywhere
from transformer_lens_bd3lm.bridge.folding import require_foldable
from transformer_lens_bd3lm.bridge.hook_points import lookup, split_layer
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.model.inputs import read_block_size
from transformer_lens_bd3lm.model.modules import at_least_float32
from transformer_lens_bd3lm.model.subs import masked_log_probs
from transformer_lens_bd3lm.progress import progress_bar

KINDS = ("config", "read", "logits", "gradient", "edit", "host")
BACKWARD = 10  # as much again of a gradient, whose sums cancel
SETTINGS = ("block_size", "causal", "time_conditioning")
PARTS = ("attention", "MLP", "modulation")
ROWS, EDITED = 2, 24  # texts, and how many tokens of them are edited
STRENGTHS = (1.0, 10.0, 100.0, 1e3, 1e4)  # of an edit, in root mean squares of what it edits
SHOWN = 12  # failing rows in a table
FINE = (torch.float32, torch.float64)
# What the host's suite asks of every model and this one cannot do: test, sign of it, and why.
NOT_ASKED = (
    ("hook_functionality", "loss", "needs a causal loss, so fails as it must"),
    ("weight_modification", "loss", "needs a causal loss, so fails as it must"),
    ("multiple_generation_calls", "[UNK]", "asks in English, which this vocabulary lacks"),
)


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: the hook point, a key of the config, or a test of the host's.
        kind: ``"config"``, ``"read"``, ``"logits"``, ``"gradient"``, ``"edit"`` or ``"host"``.
        ok: whether it agrees.
        view: ``"sampling"``, ``"dual"``, ``"single"`` (a checkpoint without blocks), or the host's
            phase.
        block_size: tokens a block in that pass.
        difference: the largest absolute one; infinite where there is nothing of the right shape.
        scale: the largest absolute value of the reference.
        tolerance: the largest difference that is allowed.
        moved: how far an edit moved the reference's logits.
        note: what else there is to say.
    """

    name: str
    kind: str
    ok: bool
    view: str = ""
    block_size: int | None = None
    difference: float = 0.0
    scale: float = 0.0
    tolerance: float = 0.0
    moved: float | None = None
    note: str = ""

    @property
    def share(self) -> float:
        """The difference, as a part of what is allowed."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.tolerance if self.tolerance else math.inf

    @property
    def measured(self) -> bool:
        """Whether it is about figures, not about a setting or one of the host's tests."""
        return self.kind not in ("config", "host")

    @property
    def place(self) -> str:
        """Where in the model that is: a layer, before all or after all."""
        if not self.measured:
            return self.kind
        layer = split_layer(self.name)[0]
        if layer is not None:
            return f"layer {layer}"
        return "embed" if lookup(self.name).part == "embedding" else "readout"

    @property
    def part(self) -> str:
        """Which part of a layer that is; nothing for the residual stream."""
        part = lookup(self.name).part
        return part if self.measured and part in PARTS else ""

    @property
    def told(self) -> str:
        """What is off, where, and by how much."""
        name = f"{self.name} ({', '.join(filter(None, (self.place, self.part)))})"
        if not self.measured:
            return f"{name}: {self.note}"
        told = f"{name}, {self.kind} {in_view(self.view, self.block_size)}: off by "
        told += f"{self.difference:.2g} of {self.scale:.2g}, {self.tolerance:.1g} is allowed"
        return f"{told}; {self.note}" if self.note else told


@dataclass(frozen=True)
class Verification:
    """A bridge beside the plain modules of a checkpoint.

    Attributes:
        model: the bridge's checkpoint.
        against: the checkpoint whose plain modules decide.
        dtype: what both computed in.
        device: where.
        processed: whether the bridge's weights are processed.
        allowed: the largest difference that is allowed, as a part of the reference's largest value.
        rows: every comparison, in the order in which a pass computes.
        left_out: what was not compared, and why.
    """

    model: str
    against: str
    dtype: str
    device: str
    processed: bool
    allowed: float
    rows: tuple[Row, ...] = field(repr=False)
    left_out: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return all(row.ok for row in self.rows)

    @property
    def failed(self) -> list[Row]:
        """What does not, reads before what follows from them, and early places before late."""
        return by_kind(row for row in self.rows if not row.ok)

    @property
    def first(self) -> Row | None:
        """Where to look first: the earliest place that differs; None if nothing does."""
        return next(iter(self.failed), None)

    @property
    def message(self) -> str:
        """The outcome in a sentence."""
        failed = self.failed
        if not failed:
            return f"{len(self.rows):,} comparisons agree"
        told = f"{len(failed):,} of {len(self.rows):,} comparisons fail, first {failed[0].told}"
        inside = next((row for row in failed if row.kind != "config"), failed[0])
        return told if inside is failed[0] else f"{told}; then {inside.told}"

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values for JSON; a figure that is not finite is None."""
        told = asdict(self)
        for row in told["rows"]:
            bad = [key for key, x in row.items() if isinstance(x, float) and not math.isfinite(x)]
            row |= dict.fromkeys(bad)
        return {"ok": self.ok, "message": self.message} | told

    def table(self) -> Group:
        """A row a place and view; then what fails, in full."""
        return Group(self.overview()) if self.ok else Group(self.overview(), self.failures())

    def overview(self) -> Table:
        """A row a place and view: what is furthest from agreeing, or the first that does not."""
        whose = "its plain modules"
        if self.against != self.model:
            whose = f"the plain modules of {self.against}"
        table = plain_table(f"{self.model} beside {whose}")
        for name in ("", "view", "compared", "worst, or first to fail", "", "of allowed", ""):
            right = name in ("compared", "of allowed")
            table.add_column(name, justify="right" if right else "left")
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.place, row.view), []).append(row)
        for (place, view), rows in groups.items():
            bad = by_kind(row for row in rows if not row.ok)
            worst = bad[0] if bad else max(rows, key=lambda row: row.share)
            figures = (split_layer(worst.name)[1], worst.kind, f"{worst.share:.2g}")
            table.add_row(
                place,
                view,
                str(len(rows)),
                *(figures if worst.measured else (worst.name if bad else "", "", "")),
                RichText(f"✗ {len(bad)}", "bold red") if bad else RichText("✓", "green"),
            )
        table.caption = RichText("\n".join(self.remarks()), "table.caption")
        return table

    def remarks(self) -> Iterator[str]:
        """What one should know to read the overview."""
        told = f"In {self.dtype} on {self.device}. Allowed: {self.allowed:.2g} of the reference's "
        more = any(row.kind == "gradient" for row in self.rows)
        told += "largest value"
        yield f"{told}, {BACKWARD} times that of a gradient's." if more else f"{told}."
        if self.processed:
            yield "Weights are processed: what that leaves the same is compared."
        if self.left_out:
            others = len(self.left_out) - 1
            more = f"; likewise in {others} other passes" if others else ""
            yield f"Not compared: {self.left_out[0]}{more}."
        for note in sorted({row.note for row in self.rows if row.ok and row.note}):
            rows = [row for row in self.rows if row.ok and row.note == note]
            names = ", ".join(sorted({row.name for row in rows}))
            yield f"{len(rows)} edits: {note}." if rows[0].measured else f"{names}: {note}."

    def failures(self) -> Table:
        """The failing rows, as many as one would read."""
        failed = self.failed
        table = plain_table("what fails")
        if len(failed) > SHOWN:
            table.caption = f"... and {len(failed) - SHOWN:,} more"
        for name in ("hook point", "kind", "view", "block", "off by", "of", "allowed"):
            table.add_column(name, justify="left" if name in ("hook point", "kind") else "right")
        for row in failed[:SHOWN]:
            name = RichText(row.name)
            if row.note:
                name.append(f"\n{row.note}", "dim")
            size = "" if row.block_size is None else str(row.block_size)
            figures = [f"{x:.2g}" for x in (row.difference, row.scale, row.tolerance)]
            table.add_row(name, row.kind, row.view, size, *(figures if row.measured else []))
        return table


def by_kind(rows: Iterable[Row]) -> list[Row]:
    """Causes before what follows from them."""
    return sorted(rows, key=lambda row: KINDS.index(row.kind))


def in_view(view: str, block_size: int | None) -> str:
    """Which pass that is."""
    told = f"in the {view} view"
    return told if block_size is None else f"{told} at block size {block_size}"


def plain_table(title: str) -> Table:
    """A table that fits into 80 columns."""
    return Table(
        title=RichText(title, "table.title"), title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip


# What is run


@dataclass(frozen=True)
class Text:
    """Random tokens of both streams, and a sigma a row, on the bridge's device."""

    x_t: Int[Tensor, "batch pos"]
    x_0: Int[Tensor, "batch pos"]
    sigma: Float[Tensor, " batch"]

    def start(self, length: int) -> "Text":
        """The first tokens alone."""
        return Text(self.x_t[:, :length], self.x_0[:, :length], self.sigma)


@dataclass(frozen=True)
class Pass:
    """One way of calling: a view, and a setting of the dial.

    Attributes:
        view: ``"sampling"``, ``"dual"`` or ``"single"``.
        block_size: tokens a block.
        given: what is passed as ``block_size``; None leaves each side its own.
    """

    view: str
    block_size: int | None
    given: int | None

    def __str__(self) -> str:
        return in_view(self.view, self.block_size)

    def keywords(self, text: Text) -> dict[str, Any]:
        """Of either side's forward."""
        how: dict[str, Any] = {"timesteps": text.sigma}
        if self.view == "dual":
            how["clean"] = text.x_0
        return how if self.given is None else how | {"block_size": self.given}


def passes(config: Any, block_sizes: Sequence[int | str]) -> list[Pass]:
    """Each side's own block size, then the others, in every view that there is."""
    if not config.cross_attn:
        return [Pass("single", None, None)]
    own, n = config.block_size, config.model_length
    given = [read_block_size(size, n) for size in block_sizes]
    sizes = [None, *dict.fromkeys(size for size in given if size != own)]
    return [Pass(view, size or own, size) for size in sizes for view in ("sampling", "dual")]


@dataclass(frozen=True)
class Pair:
    """A bridge and the plain modules beside it.

    Attributes:
        bridge: what is judged.
        plain: what decides.
        points: the hook points that are compared, in order.
        allowed: as a part of the reference's largest value.
        seed: of every perturbation.
    """

    bridge: Any
    plain: Any
    points: list[Point]
    allowed: float
    seed: int

    @property
    def dtype(self) -> str:
        """What both compute in, without torch's own name before it."""
        return str(self.plain.dtype).removeprefix("torch.")

    @property
    def fine(self) -> bool:
        """Whether rounding leaves gradients and edits to compare."""
        return self.plain.dtype in FINE

    @property
    def editable(self) -> list[Point]:
        """The hook points where an edit means the same on both sides."""
        if not self.bridge._weights_processed:
            return self.points
        return [each for each in self.points if lookup(each.name).kind != "pattern"]

    def comparisons(self, where: list[Pass]) -> int:
        """How many there are to make."""
        small = self.fine * len(self.editable)
        edits = sum(each.given is None for each in where)
        return len(where) * (len(self.points) + 1 + small) + edits * small

    def judged(
        self, name: str, kind: str, where: Pass, found: Tensor | None, wanted: Tensor, **more: Any
    ) -> Row:
        """One comparison."""
        size = largest(wanted)
        off, why = furthest(found, wanted)
        tolerance = self.allowed * size * (BACKWARD if kind == "gradient" else 1)
        ok = more.pop("ok", True) and off <= tolerance
        more["note"] = "; ".join(filter(None, (why, more.get("note"))))
        return Row(name, kind, ok, where.view, where.block_size, off, size, tolerance, **more)

    def predictions(self, logits: Tensor, text: Text) -> Tensor:
        """What is compared of logits: all, or with processed weights log-probabilities."""
        if not self.bridge._weights_processed:
            return logits
        mask_id = self.bridge.cfg.mask_token_id
        found = masked_log_probs(logits[text.x_t == mask_id], mask_id)
        return torch.cat([found[:, :mask_id], found[:, mask_id + 1 :]], dim=-1)

    def run(self, where: Pass, text: Text, hooks: list[tuple[str, Any]]) -> Tensor:
        """The bridge's predictions under hooks."""
        with self.bridge.hooks(fwd_hooks=hooks):
            logits = self.bridge(text.x_t, **where.keywords(text))
        return self.predictions(logits, text)

    def reference(self, where: Pass, text: Text, edits: Iterable[Any] = ()) -> tuple[Tensor, Seen]:
        """The plain modules' predictions under edits, and what was seen on the way."""
        logits, seen = passed(self.plain, text.x_t, edits, **where.keywords(text))
        return self.predictions(logits, text), seen

    def seen_by_bridge(self, where: Pass, text: Text) -> dict[str, Tensor]:
        """The bridge's activations by name, of those hook points that fire."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def look(x: Tensor, hook: Any) -> None:
                seen[name] = x.detach().clone()

            return look

        for group in apart(self.points):
            self.run(where, text, [(each.name, keep(each.name)) for each in group])
        return seen

    @torch.no_grad()
    def reads(self, where: Pass, text: Text) -> list[Row]:
        """Every hook point as it is, then the logits while nobody looks."""
        wanted, seen = self.reference(where, text)
        found = self.seen_by_bridge(where, text)
        rows = [
            self.judged(each.name, "read", where, found.get(each.name), each.read(seen))
            for each in self.points
        ]
        return [*rows, self.judged("logits", "logits", where, self.run(where, text, []), wanted)]

    @torch.enable_grad()
    def gradients(self, where: Pass, text: Text) -> list[Row]:
        """The gradient of a random sum of the predictions, at every hook point at once."""
        shapes = self.seen_by_bridge(where, text)
        generator = torch.Generator().manual_seed(self.seed)
        rows: dict[str, Row] = {}
        for group in apart(self.editable):
            zeros = [torch.zeros_like(shapes[each.name], requires_grad=True) for each in group]
            changes = list(zip(group, zeros, strict=True))
            edits = (edit for each, zero in changes for edit in each.edit(zero))
            wanted, _ = self.reference(where, text, edits)
            hooks = [(each.name, adding(zero)) for each, zero in changes]
            found = self.run(where, text, hooks)
            weights = torch.randn(wanted.shape, generator=generator).to(wanted)
            of_plain, of_bridge = (
                torch.autograd.grad(x, zeros, weights, allow_unused=True, materialize_grads=True)
                for x in (wanted, found)
            )
            for each, one, two in zip(group, of_bridge, of_plain, strict=True):
                rows[each.name] = self.judged(each.name, "gradient", where, one, two)
        return [rows[each.name] for each in self.editable]

    def edits(self, where: Pass, text: Text) -> Iterator[Row]:
        """One hook point after another pushed aside, alike on both sides."""
        with torch.no_grad():
            base, seen = self.reference(where, text)
            shapes = self.seen_by_bridge(where, text)
        generator = torch.Generator().manual_seed(self.seed)
        for each in self.editable:
            x = shapes[each.name]
            # Positive, so that a norm's scale stays so.
            noise = torch.rand(x.shape, generator=generator).to(x)
            with torch.no_grad():
                size = spread(each.read(seen)) or 1.0
            yield self.edit(each, where, text, base, size * noise)

    @torch.no_grad()
    def edit(self, each: Point, where: Pass, text: Text, base: Tensor, noise: Tensor) -> Row:
        """One edit, as strong as it takes to stand out from rounding."""
        for strength in STRENGTHS:
            delta = strength * noise
            wanted, seen = self.reference(where, text, each.edit(delta))
            moved, size = furthest(wanted, base)[0], largest(wanted)
            silent = each.through is not None and not bool(each.through(seen).any())
            if silent or moved > self.allowed**0.5 * size:
                break
        told: dict[str, Any] = {"moved": moved}
        if silent:
            told["note"] = "moves nothing and cannot, since what it acts through is zero"
        elif not moved > 2 * self.allowed * size:
            told |= {"ok": False, "note": "moves nothing, so nothing is verified"}
        found = self.run(where, text, [(each.name, adding(delta))])
        return self.judged(each.name, "edit", where, found, wanted, **told)


def apart(found: list[Point]) -> list[list[Point]]:
    """Hook points, those by themselves whose readers change how the rest is computed."""
    explicit = [each for each in found if lookup(each.name).explicit]
    return [[each for each in found if not lookup(each.name).explicit], explicit]


def draw(pair: Pair, length: int) -> Text:
    """Random texts without masks, about half of each hidden, and sigmas that are not zero."""
    mask_id, device = pair.bridge.cfg.mask_token_id, pair.plain.device
    generator = torch.Generator().manual_seed(pair.seed)
    x_0 = torch.randint(pair.plain.config.vocab_size - 1, (ROWS, length), generator=generator)
    x_0 = x_0 + (x_0 >= mask_id)
    masked = torch.rand(ROWS, length, generator=generator) < 0.5
    masked[:, 0], masked[:, 1] = False, True
    sigma = 0.1 + 2 * torch.rand(ROWS, generator=generator)
    x_t = x_0.masked_fill(masked, mask_id)
    return Text(x_t.to(device), x_0.to(device), sigma.to(device))


def adding(delta: Tensor) -> Callable[..., Tensor]:
    """A hook that adds delta."""
    return lambda x, hook: x + delta


def visible(x: Tensor) -> Tensor:
    """In float32 or wider, with 0 in place of what a mask hides."""
    return at_least_float32(x).masked_fill(x == -torch.inf, 0.0)


def largest(x: Tensor) -> float:
    """The largest magnitude."""
    return float(visible(x).abs().max())


def spread(x: Tensor) -> float:
    """The root mean square."""
    return float(visible(x).square().mean().sqrt())


def furthest(found: Tensor | None, wanted: Tensor) -> tuple[float, str]:
    """The largest absolute difference, and why it is infinite, if it is."""
    if found is None:
        return math.inf, "the hook point does not fire"
    if found.numel() != wanted.numel():
        return math.inf, f"its shape is {list(found.shape)}, the reference's {list(wanted.shape)}"
    wanted = wanted.reshape(found.shape)
    if not torch.equal(found == -torch.inf, wanted == -torch.inf):
        return math.inf, "other positions are masked"
    off = float((visible(found) - visible(wanted)).abs().max())
    return (off, "") if math.isfinite(off) else (math.inf, "it is not finite")


# At the door


def name_of(path: str) -> str:
    """A Hub id, or the last part of a folder's path."""
    return Path(path).name if Path(path).is_dir() else path


def beside(
    bridge: Any, path: str, names: tuple[str, str], allowed: Any, seed: int, revision: str | None
) -> Pair:
    """A bridge, and the plain modules of a checkpoint where it is and in its dtype.

    Raises:
        InputError: if they cannot be compared.
    """
    weight = bridge.embed.weight
    part = read_allowed(allowed, weight.dtype)
    plain = plain_modules(path, weight.dtype, weight.device, revision)
    check_same_shape(bridge.original_model.config, plain.config, names)
    found = points(plain.config.n_blocks, plain.config.adaln)
    if bridge._weights_processed:
        found = [each for each in found if lookup(each.name).survives_processing]
    return Pair(bridge, plain, found, part, seed)


def settings(bridge: Any, plain: Any) -> Iterator[Row]:
    """What decides the mask and the conditioning, beside the reference's."""
    config = bridge.original_model.config
    for key in SETTINGS:
        if key == "block_size" and not config.cross_attn:
            continue
        own = bridge.cfg.block_size if key == "block_size" else getattr(config, key)
        wanted = getattr(plain.config, key)
        note = f"{own}, of the reference {wanted}"
        if key == "block_size" and own != config.block_size:
            note += f"; the dial was turned, bd3lm.set_block_size(bridge, {wanted}) turns it back"
        yield Row(key, "config", own == wanted, note="" if own == wanted else note)


def verify(
    model: Any,
    against: Any = None,
    *,
    host: bool = False,
    block_sizes: Any = (1, "full"),
    length: Any = None,
    seed: Any = 0,
    allowed: Any = None,
    dtype: Any = None,
    device: Any = None,
    trust_remote_code: bool = False,
    progress: bool | None = None,
) -> Verification:
    """Compare a bridge with the plain modules of a checkpoint, hook point by hook point.

    Args:
        model: a folder or Hub id to boot, or a bridge as it is now.
        against: the folder or Hub id whose plain modules decide; the model's own by default.
        host: also run TransformerLens's own benchmark on the model's checkpoint.
        block_sizes: settings of the dial beside the checkpoint's own.
        length: tokens of the texts that are read; up to 160 by default. Edits see the first 24.
        seed: of tokens, masks and perturbations.
        allowed: the largest difference, as a part of the reference's largest value; by default what
            rounding may make in this dtype.
        dtype: to boot in, float32 by default; float64 tells rounding from error.
        device: to boot on.
        trust_remote_code: boot the model with its repository's own modules, which runs its code.
            The reference never does.
        progress: show a bar; by default on a terminal.

    Raises:
        InputError: if what came cannot be compared; nothing has been changed then.
        CheckpointError: if a checkpoint cannot be loaded as it is.
    """
    if isinstance(model, str | Path):
        how = {"trust_remote_code": trust_remote_code, "dtype": dtype or torch.float32}
        check_asked(against, block_sizes, seed, dtype, device)
        with loading(str(model)):
            path = path_of(str(model))
            bridge: Any = TransformerBridge.boot_transformers(path, device=device, **how)
    elif dtype is not None or device is not None or trust_remote_code or host:
        raise InputError(
            "dtype, device, trust_remote_code and host are for a checkpoint that is booted here: "
            "give its folder or Hub id, or the bridge alone"
        )
    else:
        check_asked(against, block_sizes, seed)
        bridge = model
    check_bridge(bridge)
    path = str(bridge.cfg.model_name)
    other = path if against is None else path_of(str(against))
    names = name_of(path), name_of(other)
    revision = getattr(bridge.cfg, "revision", None) if against is None else None
    pair = beside(bridge, other, names, allowed, seed, revision)
    text = draw(pair, read_length(length, pair.plain.config.model_length))
    where = passes(pair.plain.config, block_sizes)
    rows = list(settings(bridge, pair.plain))
    left_out: list[str] = []
    bar = progress_bar("comparing", pair.comparisons(where), progress)
    with bar as update, masks_anywhere(bridge):
        for row in compared(pair, where, text, left_out):
            rows.append(row)
            update(advance=1)
    order = {each.name: i for i, each in enumerate(pair.points)} | {"logits": len(pair.points)}
    rows.sort(key=lambda row: order.get(row.name, -1))
    if host:
        rows += judged_by_host(bridge, path, trust_remote_code)
    return Verification(
        *names, pair.dtype, str(pair.plain.device), bridge._weights_processed, pair.allowed,
        tuple(rows), tuple(left_out),
    )  # fmt: skip


def compared(pair: Pair, where: list[Pass], text: Text, left_out: list[str]) -> Iterator[Row]:
    """Reads of every pass; if they agree gradients, and edits at each side's own block size."""
    if not pair.fine:
        left_out.append(f"gradients and edits, which in {pair.dtype} rounding would drown")
    few = text.start(min(EDITED, text.x_t.shape[1]))
    for each in where:
        reads = pair.reads(each, text)
        yield from reads
        if pair.fine and not all(row.ok for row in reads):
            left_out.append(f"gradients and edits {each}, where reads differ already")
        elif pair.fine:
            yield from pair.gradients(each, few)
            if each.given is None:
                yield from pair.edits(each, few)


# The host's own judgement


def judged_by_host(bridge: Any, path: str, trust_remote_code: bool) -> Iterator[Row]:
    """TransformerLens's benchmark, a row a test that was run."""
    from transformer_lens.benchmarks.main_benchmark import run_benchmark_suite
    from transformer_lens.benchmarks.utils import BenchmarkSeverity

    refusal = ""
    try:
        require_foldable(bridge.cfg)
    except NotExactError as error:
        refusal = str(error).split(":")[0]
    phases = [1, 2] if refusal else [1, 2, 3]
    ids = [i for i in range(1, bridge.cfg.d_vocab) if i != bridge.cfg.mask_token_id]
    few = bridge.tokenizer.decode(ids[: min(max(bridge.cfg.n_ctx // 4, 2), 8)])
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        results = run_benchmark_suite(
            path, str(bridge.cfg.device), phases=phases, test_text=few,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    for result in results:
        if result.severity == BenchmarkSeverity.SKIPPED:
            continue
        excuse = ""
        for name, sign, why in NOT_ASKED:
            if result.name == name and sign in result.message and not result.passed:
                excuse = why
        note = excuse if result.passed or excuse else result.message.splitlines()[0]
        ok = bool(result.passed or excuse)
        yield Row(result.name, "host", ok, f"phase {result.phase}", note=note)
    if refusal:
        note = f"refused, as it must be: {refusal}"
        yield Row("weight processing", "host", True, "phase 3", note=note)
