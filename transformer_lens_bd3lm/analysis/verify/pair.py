"""A bridge and the plain modules side by side: one pass through both, and what differs.

It decides nothing about which passes are run; see ``compare``.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformer_lens_bd3lm.analysis.verify.passes import Pass, RandomText
from transformer_lens_bd3lm.analysis.verify.reference import Counterpart, PlainPass, run_plain
from transformer_lens_bd3lm.analysis.verify.report import GRADIENT_FACTOR, Row
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.model.modules import at_least_float32
from transformer_lens_bd3lm.model.subs import masked_log_probs

_STRENGTHS = (1.0, 10.0, 100.0, 1e3, 1e4)  # of an edit, in root mean squares of what it edits
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Pair:
    """A bridge and the plain modules beside it.

    Attributes:
        bridge: the bridge that is verified.
        plain: the plain modules, which are the reference.
        counterparts: the hook points that are compared, in the order in which a pass computes.
        allowed: the largest difference that is allowed, as a share of the reference's largest
            value.
        seed: random seed of gradients' weights and of edits.
    """

    bridge: Bridge
    plain: Any
    counterparts: list[Counterpart]
    allowed: float
    seed: int

    @property
    def dtype(self) -> str:
        """The name of the dtype that both compute in, as ``"float32"``."""
        return str(self.plain.dtype).removeprefix("torch.")

    @property
    def differentiable(self) -> bool:
        """Whether gradients and edits stand out from rounding in this dtype."""
        return self.plain.dtype in _WIDE

    @property
    def editable(self) -> list[Counterpart]:
        """The hook points where an edit means the same on both sides."""
        if not self.bridge._weights_processed:
            return self.counterparts
        # With value biases folded, an edit of the pattern no longer adds or removes them.
        return [each for each in self.counterparts if lookup(each.name).kind != "pattern"]

    def count(self, passes: list[Pass]) -> int:
        """Count the comparisons of all passes, if none of them fails."""
        pushed = self.differentiable * len(self.editable)
        edited = sum(each.given is None for each in passes)
        return len(passes) * (len(self.counterparts) + 1 + pushed) + edited * pushed

    @torch.no_grad()
    def read(self, where: Pass, text: RandomText) -> list[Row]:
        """Compare every hook point's value, then the logits of a pass without hooks."""
        wanted, plain_pass = self._run_plain(where, text)
        values = self.activations(where, text)
        rows = [
            self._row(each.name, "read", where, values.get(each.name), each.read(plain_pass))
            for each in self.counterparts
        ]
        predictions = self._run_bridge(where, text, [])
        return [*rows, self._row("logits", "logits", where, predictions, wanted)]

    @torch.enable_grad()
    def differentiate(self, where: Pass, text: RandomText) -> list[Row]:
        """Compare the gradient of a random sum of the predictions at every hook point."""
        shapes = self.activations(where, text)
        generator = torch.Generator().manual_seed(self.seed)
        rows: dict[str, Row] = {}
        for group in _apart(self.editable):
            zeros = [torch.zeros_like(shapes[each.name], requires_grad=True) for each in group]
            changes = list(zip(group, zeros, strict=True))
            edits = (edit for each, zero in changes for edit in each.edit(zero))
            wanted, _ = self._run_plain(where, text, edits)
            predictions = self._run_bridge(
                where, text, [(each.name, _adding(zero)) for each, zero in changes]
            )
            weights = torch.randn(wanted.shape, generator=generator).to(wanted)
            of_plain, of_bridge = (
                torch.autograd.grad(x, zeros, weights, allow_unused=True, materialize_grads=True)
                for x in (wanted, predictions)
            )
            for each, one, two in zip(group, of_bridge, of_plain, strict=True):
                rows[each.name] = self._row(each.name, "gradient", where, one, two)
        return [rows[each.name] for each in self.editable]

    def edit(self, where: Pass, text: RandomText) -> Iterator[Row]:
        """Add the same random tensor on both sides, at one hook point after another."""
        with torch.no_grad():
            base, plain_pass = self._run_plain(where, text)
            shapes = self.activations(where, text)
        generator = torch.Generator().manual_seed(self.seed)
        for each in self.editable:
            x = shapes[each.name]
            # Positive, so that a norm's scale stays positive.
            noise = torch.rand(x.shape, generator=generator).to(x)
            with torch.no_grad():
                size = _root_mean_square(each.read(plain_pass)) or 1.0
            yield self._edit_one(each, where, text, base, size * noise)

    @torch.no_grad()
    def _edit_one(
        self, point: Counterpart, where: Pass, text: RandomText, base: Tensor, noise: Tensor
    ) -> Row:
        """Compare the predictions under one edit, as strong as it takes to stand out."""
        for strength in _STRENGTHS:
            delta = strength * noise
            wanted, plain_pass = self._run_plain(where, text, point.edit(delta))
            moved, size = _difference(wanted, base)[0], _largest(wanted)
            silent = point.through is not None and not bool(point.through(plain_pass).any())
            if silent or moved > self.allowed**0.5 * size:
                break
        outcome: dict[str, Any] = {"moved": moved}
        if silent:
            outcome["note"] = "moves nothing and cannot, since what it acts through is zero"
        elif not moved > 2 * self.allowed * size:
            outcome |= {"ok": False, "note": "moves nothing, so nothing is verified"}
        predictions = self._run_bridge(where, text, [(point.name, _adding(delta))])
        return self._row(point.name, "edit", where, predictions, wanted, **outcome)

    def _row(
        self, name: str, kind: str, where: Pass, value: Tensor | None, wanted: Tensor, **more: Any
    ) -> Row:
        """Compare one value of the bridge with the reference's."""
        size = _largest(wanted)
        difference, why = _difference(value, wanted)
        tolerance = self.allowed * size * (GRADIENT_FACTOR if kind == "gradient" else 1)
        ok = more.pop("ok", True) and difference <= tolerance
        more["note"] = "; ".join(filter(None, (why, more.get("note"))))
        return Row(
            name, kind, ok, where.view, where.block_size, difference, size, tolerance, **more
        )

    def _predictions(self, logits: Tensor, text: RandomText) -> Tensor:
        """Return what is compared of logits: all; of processed weights the log-probabilities."""
        if not self.bridge._weights_processed:
            return logits
        mask_id = self.bridge.cfg.mask_token_id
        log_probs = masked_log_probs(logits[text.x_t == mask_id], mask_id)
        return torch.cat([log_probs[:, :mask_id], log_probs[:, mask_id + 1 :]], dim=-1)

    def _run_bridge(self, where: Pass, text: RandomText, hooks: list[tuple[str, Any]]) -> Tensor:
        """Return the bridge's predictions under hooks."""
        with self.bridge.hooks(fwd_hooks=hooks):
            logits = self.bridge(text.x_t, **where.keywords(text))
        return self._predictions(logits, text)

    def _run_plain(
        self, where: Pass, text: RandomText, edits: Iterable[Any] = ()
    ) -> tuple[Tensor, PlainPass]:
        """Return the plain modules' predictions under edits, and all that they took and gave."""
        logits, plain_pass = run_plain(self.plain, text.x_t, edits, **where.keywords(text))
        return self._predictions(logits, text), plain_pass

    def activations(self, where: Pass, text: RandomText) -> dict[str, Tensor]:
        """Return the bridge's activations by name, of the hook points that fire."""
        activations: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(x: Tensor, hook: Any) -> None:
                activations[name] = x.detach().clone()

            return hook

        for group in _apart(self.counterparts):
            self._run_bridge(where, text, [(each.name, keep(each.name)) for each in group])
        return activations


def _apart(counterparts: list[Counterpart]) -> list[list[Counterpart]]:
    """Split hook points in two: those that leave kernels fused, and those that do not."""
    explicit = [each for each in counterparts if lookup(each.name).explicit]
    return [[each for each in counterparts if not lookup(each.name).explicit], explicit]


def _adding(delta: Tensor) -> Callable[..., Tensor]:
    """Return a hook that adds delta."""
    return lambda x, hook: x + delta


def _visible(x: Tensor) -> Tensor:
    """Return x in float32 or wider, with 0 in place of the -inf of a mask."""
    return at_least_float32(x).masked_fill(x == -torch.inf, 0.0)


def _largest(x: Tensor) -> float:
    """Return the largest magnitude."""
    return float(_visible(x).abs().max())


def _root_mean_square(x: Tensor) -> float:
    """Return the root mean square."""
    return float(_visible(x).square().mean().sqrt())


def _difference(value: Tensor | None, wanted: Tensor) -> tuple[float, str]:
    """Return the largest absolute difference, and the reason if it is infinite."""
    if value is None:
        return math.inf, "the hook point does not fire"
    if value.numel() != wanted.numel():
        return math.inf, f"its shape is {list(value.shape)}, the reference's {list(wanted.shape)}"
    wanted = wanted.reshape(value.shape)
    if not torch.equal(value == -torch.inf, wanted == -torch.inf):
        return math.inf, "other positions are masked"
    difference = float((_visible(value) - _visible(wanted)).abs().max())
    return (difference, "") if math.isfinite(difference) else (math.inf, "it is not finite")
