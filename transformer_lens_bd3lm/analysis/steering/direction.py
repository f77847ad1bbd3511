"""Directions of the residual stream: a difference of means between two sets of texts, or given.

A text is masked by seeded draws at several times t, from few masks to almost all, and run in the
dual view, where each block reads the clean blocks before it, as in training. The residuals at one
hook point are averaged over the masked positions of a text, then over texts::

    direction = mean over positive texts - mean over negative texts

At masked positions the residual holds what the model is about to write; at clean positions it holds
the token that is there, so that directions from clean positions are about words, not about what is
predicted (Mechanism Shift, arXiv 2601.14758; steering, arXiv 2605.10971).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from transformer_lens_bd3lm.analysis.noised_text import NoisedText
from transformer_lens_bd3lm.bridge.block_size import own_block_size
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice, check_finished, check_int, check_number
from transformer_lens_bd3lm.denoising.canvas import read_prompts
from transformer_lens_bd3lm.denoising.made_with import checksum
from transformer_lens_bd3lm.denoising.noise import Noise, sigma_of
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.denoising.step_selectors import Span, Which
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values

ROWS = 2048  # positions in a pass
STREAMS = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True, repr=False)
class Edit:
    """A step hook that moves the residuals of the active block along a direction.

    Attributes:
        vector: the direction ``[d_model]``.
        strength: multiple of it that is added; with ``"project_out"``, the share of the component
            along it that is removed.
        mode: ``"add"`` or ``"project_out"``.
        at: ``"masked"``, the positions still masked at the step, or ``"all"`` of the block.
    """

    vector: Float[Tensor, " d_model"]
    strength: float
    mode: str
    at: str

    def __call__(self, activation: Tensor, hook: HookPoint, step: Step) -> Tensor:
        """Return the edited residuals ``[batch, block, d_model]``."""
        vector = self.vector.to(activation.device, activation.dtype)
        if self.mode == "add":
            edited = activation + self.strength * vector
        else:
            unit = (self.vector / self.vector.norm()).to(activation.device, activation.dtype)
            edited = activation - self.strength * (activation @ unit)[..., None] * unit
        if self.at == "all":
            return edited
        return torch.where(step.masked.to(activation.device)[..., None], edited, activation)

    def __repr__(self) -> str:
        name = f"direction {checksum(self.vector)[2] % 16**6:06x}"
        verb = "add" if self.mode == "add" else "project out"
        return f"{verb} {self.strength:g} x {name} at {self.at} positions"


@dataclass(frozen=True, repr=False)
class Direction(Result):
    """A direction of the residual stream at one layer.

    Attributes:
        vector: the direction ``[d_model]``, float64, on the CPU.
        layer: number of its layer.
        name: ``"resid_pre"``, ``"resid_mid"`` or ``"resid_post"``.
        at: positions that it was measured at, ``"masked"`` or ``"clean"``; ``"given"`` for a vector
            of the caller's.
        positive: where each positive text lies along the direction, counted from the middle between
            the two means, in the residual's units ``[text]``. The text itself is left out of the
            direction and the middle; empty if the vector was given.
        negative: the same of the negative texts ``[text]``.
        contract: what was measured.
    """

    vector: Float[Tensor, " d_model"] = field(repr=False)
    layer: int
    name: str
    at: str
    positive: Float[Tensor, " positive"] = field(repr=False)
    negative: Float[Tensor, " negative"] = field(repr=False)
    contract: Contract

    @staticmethod
    def of(vector: Any, layer: int, name: str = "resid_post") -> "Direction":
        """Return a given vector as a direction.

        Args:
            vector: the direction ``[d_model]``.
            layer: number of the layer that it is added at.
            name: ``"resid_pre"``, ``"resid_mid"`` or ``"resid_post"``.

        Raises:
            InputError: for anything but a finite vector that is not 0.
        """
        vector = torch.as_tensor(vector).detach().cpu().double().clone()
        check_int("layer", layer, 0)
        check_choice("name", name, STREAMS)
        if vector.ndim != 1 or not bool(vector.isfinite().all()) or not bool(vector.any()):
            raise InputError(
                f"vector has shape {tuple(vector.shape)}: give a finite vector [d_model], not 0"
            )
        none = vector.new_empty(0)
        contract = Contract(
            target="a direction that was given", edited="nothing", fixed="nothing", masks="none"
        )
        return Direction(vector, layer, name, "given", none, none, contract)

    @property
    def norm(self) -> float:
        """Length of the vector."""
        return float(self.vector.norm())

    @property
    def hook(self) -> str:
        """Name of its hook point."""
        return f"blocks.{self.layer}.hook_{self.name}"

    @property
    def separation(self) -> float:
        """Distance of the two means along the direction, in standard deviations of a text.

        Each text is left out of the direction that it is measured along. NaN for fewer than two
        texts on a side, and for a given vector.
        """
        sides = self.positive, self.negative
        if min(map(len, sides)) < 2:
            return torch.nan
        spread = torch.cat([side - side.mean() for side in sides]).square().sum()
        return float(
            (sides[0].mean() - sides[1].mean()) / (spread / (sum(map(len, sides)) - 2)).sqrt()
        )

    def hooks(
        self,
        strength: int | float = 1.0,
        mode: str = "add",
        *,
        layers: Any = None,
        at: str = "masked",
        block: Which = None,
        step: Which = None,
        t: Span = None,
        masks_left: Which = None,
    ) -> StepHooks:
        """Return step hooks that move residuals along the direction, for ``denoise(hooks=...)``.

        Args:
            strength: multiple of the vector that is added. With ``mode="project_out"``, the share
                of the component along it that is removed: 1 leaves none.
            mode: ``"add"`` or ``"project_out"``.
            layers: number of the layer that is edited, or several; by default the direction's own.
            at: ``"masked"``: positions still masked at the step; ``"all"`` of the active block.
            block: which blocks, as in ``StepHooks.add``; all by default.
            step: which steps within a block.
            t: window of times ``(low, high)``, ends included: ``(0.5, 1.0)`` is while half of the
                block or more is masked, on average.
            masks_left: number of masks left in the block.

        Raises:
            InputError: for another mode or ``at``, a strength that is not finite, and selectors
                that do not fit.
        """
        check_choice("mode", mode, ("add", "project_out"))
        check_choice("at", at, ("masked", "all"))
        check_number("strength", strength, -1e9, 1e9, "give a finite number")
        numbers = [self.layer] if layers is None else layers
        numbers = [numbers] if isinstance(numbers, int) else list(numbers)
        names = [
            f"blocks.{check_int('layers', n, 0)}.hook_{self.name}" for n in dict.fromkeys(numbers)
        ]
        edit = Edit(self.vector, float(strength), mode, at)
        return StepHooks().add(names, edit, block=block, step=step, t=t, masks_left=masks_left)

    def random(self, seed: int = 0) -> "Direction":
        """Return a random direction of the same norm, orthogonal to this one: a control."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(len(self.vector), generator=generator, dtype=torch.float64)
        drawn = drawn - (drawn @ self.vector) / self.norm**2 * self.vector
        return replace(
            Direction.of(drawn / drawn.norm() * self.norm, self.layer, self.name),
            contract=replace(self.contract, target="a random direction of the same norm"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the direction as plain values for JSON."""
        values = {"norm": self.norm, "separation": self.separation}
        return plain_values(dict(vars(self)) | values | {"contract": vars(self.contract)})

    def _figures(self) -> str:
        texts = f", {len(self.positive)} against {count(len(self.negative), 'text')}"
        return (
            f"{self.hook}: norm {self.norm:.3f}, at {self.at} positions"
            f"{texts if len(self.positive) else ''}"
        )


@torch.no_grad()
def direction(
    bridge: Bridge,
    positive: Any,
    negative: Any,
    layer: int,
    *,
    at: str = "masked",
    name: str = "resid_post",
    block_size: int | str | None = None,
    draws: int = 4,
    seed: int = 0,
) -> Direction:
    """Compute the difference of mean residuals between two sets of texts, at masked positions.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        positive: finished texts that have a property: strings, or rows of ids that begin with BOS.
        negative: finished texts that do not have it.
        layer: number of the layer.
        at: ``"masked"``: the masked positions, where predictions are made; ``"clean"``: those that
            hold a token, in passes with at least one mask.
        name: ``"resid_pre"``, ``"resid_mid"`` or ``"resid_post"``.
        block_size: tokens per block; the bridge's by default.
        draws: number of passes over each text, at times (k + 1/2) / draws: a position is masked
            with probability t.
        seed: random seed of the masks; the k-th texts of both sides have the same masks.

    Raises:
        InputError: for texts, a layer or a name that do not fit, and where no position is masked.
        BlockSizeError: for a value that is not a block size of this checkpoint.
    """
    bridge = read_bridge(bridge)
    if bridge.cfg.causal:
        raise InputError("this checkpoint is the autoregressive baseline (causal=True): no masks")
    check_choice("at", at, ("masked", "clean"))
    check_choice("name", name, STREAMS)
    check_int("layer", layer, 0, bridge.cfg.n_layers - 1)
    check_int("draws", draws, 1)
    check_int("seed", seed, 0, 2**64 - 1)
    point = f"blocks.{layer}.hook_{name}"
    sides = []
    for argument, texts in (("positive", positive), ("negative", negative)):
        rows = _read_texts(bridge, texts, argument)
        means = _means(bridge, rows, point, at, block_size, draws, seed)
        means = means[means.isfinite().all(-1)]
        if not len(means):
            raise InputError(f"{argument} has no {at} position: give longer texts, or more draws")
        sides.append(means)
    size = own_block_size(bridge) if block_size is None else block_size
    contract = Contract(
        target=f"mean residual of the positive texts minus that of the negative ones, at {at} "
        f"positions of {point}",
        edited="nothing",
        fixed="the texts",
        masks=f"{draws} draws a text at times (k + 1/2) / {draws}, block size {size}, seed {seed}",
    )
    own, other = sides
    given = Direction.of(own.mean(0) - other.mean(0), layer, name)
    along = _left_out(own, other), -_left_out(other, own)
    return replace(given, at=at, positive=along[0], negative=along[1], contract=contract)


def _read_texts(bridge: Bridge, texts: Any, argument: str) -> list[Tensor]:
    """Return the ids of each text ``[pos]``.

    Raises:
        InputError: for texts with masks, of one token, or longer than the context.
    """
    if isinstance(texts, list) and not texts or texts is None:
        raise InputError(f"{argument}={texts!r}: give at least one text")
    rows, longest = read_prompts(bridge, texts), bridge.original_model.config.model_length
    for row in rows:
        check_finished(argument, row, bridge.cfg.mask_token_id)
        if not 2 <= len(row) <= longest:
            raise InputError(
                f"{argument} has a text of {len(row)} tokens: give 2 to {longest}, BOS included"
            )
    return rows


def _means(
    bridge: Bridge,
    rows: list[Tensor],
    point: str,
    at: str,
    block_size: Any,
    draws: int,
    seed: int,
) -> Float[Tensor, "text d_model"]:
    """Compute each text's mean residual over draws and positions; NaN where it has no position."""
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(number)
    means = torch.full((len(rows), bridge.cfg.d_model), torch.nan, dtype=torch.float64)
    for length, members in by_length.items():
        for part in torch.tensor(members).split(max(ROWS // length, 1)):
            ids = torch.stack([rows[i] for i in part]).to(bridge.embed.weight.device)
            times = Noise(seed, rows=part.tolist()).times(len(part), 0, length)
            total = torch.zeros(len(part), means.shape[1], dtype=torch.float64)
            count = torch.zeros(len(part), 1, dtype=torch.float64)
            for k in range(draws):
                t = (k + 0.5) / draws
                masked = times < t
                masked[:, 0] = False
                if not bool(masked.any()):
                    continue
                chosen = masked if at == "masked" else ~masked
                chosen[:, 0] = False
                chosen &= masked.any(1, keepdim=True)  # a text without masks is no denoising state
                text = NoisedText(bridge, ids, masked.to(ids.device))
                residual = _residual(text, point, block_size, t)
                total += (residual * chosen[..., None]).sum(1)
                count += chosen.sum(1, keepdim=True)
            means[part] = total / count
    return means


def _residual(
    text: NoisedText, point: str, block_size: Any, t: float
) -> Float[Tensor, "batch pos d_model"]:
    """Return the noisy stream's residuals of a pass, float64, on the CPU."""
    seen: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        if name == point:
            seen[name] = x[:, : text.tokens.shape[1]].detach().cpu().double()

    sigma = sigma_of(torch.full((len(text.tokens),), t, device=text.tokens.device))
    text.pass_at(block_size, sigma, None, see, [point])
    return seen[point]


def _left_out(
    own: Float[Tensor, "text d_model"], other: Float[Tensor, "other d_model"]
) -> Float[Tensor, " text"]:
    """Measure each text of a side along the direction from the other side, without that text."""
    if len(own) < 2:
        return own.new_full((len(own),), torch.nan)
    rest = (own.sum(0) - own) / (len(own) - 1)
    along = rest - other.mean(0)
    unit = along / along.norm(dim=-1, keepdim=True)
    return ((own - (rest + other.mean(0)) / 2) * unit).sum(-1)
