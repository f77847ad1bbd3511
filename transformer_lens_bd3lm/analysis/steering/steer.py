"""``steer``: what a direction does to a target, and what it costs, strength by strength.

The arms of one experiment, on shared noise: no edit; the direction at each strength; and a random
direction of the same norm at each strength. The target is always reported beside two measures of
damage: nats a token of the written text under the unsteered model, and the share of different pairs
of neighbors. An effect that a random direction has too is not the direction's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformer_lens_bd3lm.analysis.effects import Effects
from transformer_lens_bd3lm.analysis.experiment import Experiment, WordFrequency, experiment
from transformer_lens_bd3lm.analysis.steering.direction import Direction
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice, check_number
from transformer_lens_bd3lm.denoising.step_selectors import Span, Which
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import Contract, Result

UNSTEERED = "unsteered"


@dataclass(frozen=True, repr=False)
class Steering(Result):
    """Effects of a direction by strength: on a target, and the damage, beside a random direction.

    All are differences from the unsteered text on the same noise, with intervals over texts. The
    p-values are corrected for all strengths of both directions together.

    Attributes:
        direction: the direction.
        strengths: the strengths, from small to large.
        mode: ``"add"`` or ``"project_out"``.
        target_name: name of the target.
        control: whether a random direction of the same norm was run beside it.
        experiment: the experiment: all values, run by run.
        contract: what was measured, edited and held fixed.
    """

    direction: Direction = field(repr=False)
    strengths: list[float]
    mode: str
    target_name: str
    control: bool
    experiment: Experiment = field(repr=False)
    contract: Contract

    @property
    def target(self) -> Effects:
        """Change of the target ``[strength]``."""
        return self.curve(self.target_name)

    @property
    def damage(self) -> Effects:
        """Change of -log p of the text under the unsteered model ``[strength]``, nats a token."""
        return self.curve("nats")

    @property
    def distinct_2(self) -> Effects:
        """Change of the share of different pairs of neighbors ``[strength]``."""
        return self.curve("distinct_2")

    def curve(self, metric: str, control: bool = False) -> Effects:
        """Return the change of a metric by strength.

        Args:
            metric: the target's name, ``"nats"`` or ``"distinct_2"``.
            control: whether of the random direction, in place of the direction itself.

        Raises:
            InputError: for a metric that was not measured, and a control that was not run.
        """
        if control and not self.control:
            raise InputError("control=True: this steering was run with control=False")
        name = _random_arm if control else _arm
        rows = [self.experiment.compared.index(name(strength)) for strength in self.strengths]
        effects = self.experiment.effects_of(metric)
        parts = {key: getattr(effects, key)[rows] for key in ("mean", "low", "high", "p", "texts")}
        return replace(effects, **parts)

    def unsteered(self, metric: str) -> float:
        """Return the mean of a metric without steering."""
        number = self.experiment.arms.index(UNSTEERED)
        return float(self.experiment.means_of(metric).mean[number])

    def to_dict(self) -> dict[str, Any]:
        """Return curves and settings as plain values for JSON."""
        names = {"target": self.target_name, "nats": "nats", "distinct_2": "distinct_2"}
        curves = {}
        for key, metric in names.items():
            curves[key] = {"unsteered": self.unsteered(metric), **self.curve(metric).to_dict()}
            if self.control:
                curves[key]["random"] = self.curve(metric, control=True).to_dict()
        return {
            "hook": self.direction.hook,
            "norm": self.direction.norm,
            "mode": self.mode,
            "strengths": self.strengths,
            "target_name": self.target_name,
            "contract": dict(vars(self.contract)),
            **curves,
        }

    def _figures(self) -> str:
        return (
            f"{self.target_name} at strength {self.strengths[-1]:g}: {self.target.text(-1)}, "
            f"damage {self.damage.text(-1)} nats a token"
        )


def steer(
    bridge: Bridge,
    prompts: Any,
    direction: Direction,
    strengths: Sequence[int | float] = (1.0, 2.0, 4.0),
    *,
    target: Any,
    mode: str = "add",
    layers: Any = None,
    at: str = "masked",
    block: Which = None,
    step: Which = None,
    t: Span = None,
    masks_left: Which = None,
    control: bool = True,
    seeds: int = 16,
    seed: int = 0,
    **settings: Any,
) -> Steering:
    """Write texts with a direction added or projected out, and measure target and damage.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        prompts: prompts, as :func:`experiment` takes them: the texts over which intervals are
            computed.
        direction: the direction, from :func:`direction` or ``Direction.of``.
        strengths: multiples of its vector; with ``"project_out"``, shares of the component.
        target: a word or words, whose share of the written tokens is measured; or a function of a
            run (of one row).
        mode: ``"add"`` or ``"project_out"``.
        layers: numbers of the layers that are edited; the direction's own by default.
        at: ``"masked"`` positions, or ``"all"`` of the active block.
        block: which blocks; all by default.
        step: which steps within a block.
        t: window of times ``(low, high)``: ``t=(0.5, 1.0)`` steers early steps alone.
        masks_left: number of masks left in the block.
        control: whether to run a random direction of the same norm beside it.
        seeds: number of runs of each prompt and arm.
        seed: seed of all the noise, and of the random direction.
        settings: further arguments of :func:`experiment`, as ``max_new_tokens``, ``block_size``,
            ``sampler``, ``out``.

    Raises:
        InputError: as :func:`experiment` and ``Direction.hooks``; for a direction of another width
            than the model's, and strengths that are 0, not finite, or repeated.
        BD3LMError: as :func:`experiment`.
    """
    bridge = read_bridge(bridge)
    check_choice("mode", mode, ("add", "project_out"))
    if not isinstance(direction, Direction):
        raise InputError(
            f"direction is {type(direction).__name__}: give that of bd3lm.direction, or "
            "Direction.of(vector, layer)"
        )
    if len(direction.vector) != bridge.cfg.d_model:
        raise InputError(
            f"direction has {len(direction.vector)} dimensions, and the model {bridge.cfg.d_model}"
        )
    numbers = sorted(_check_strengths(strengths))
    window: dict[str, Any] = {
        "layers": layers, "at": at, "block": block, "step": step, "t": t, "masks_left": masks_left,
    }  # fmt: skip
    arms: dict[str, Any] = {UNSTEERED: None}
    arms |= {_arm(number): direction.hooks(number, mode, **window) for number in numbers}
    if control:
        other = direction.random(seed)
        arms |= {_random_arm(number): other.hooks(number, mode, **window) for number in numbers}
    if "base" in settings or "metric" in settings:
        raise InputError("steer compares with the unsteered text: leave out base and metric")
    words = isinstance(target, str | int | list | tuple | WordFrequency)
    if words and not isinstance(target, WordFrequency):
        target = WordFrequency(target)
    name = str(target) if words else "target"
    metrics = {name: target, "nats": "nats", "distinct_2": "distinct_2"}
    result = experiment(bridge, prompts, arms, metric=metrics, seeds=seeds, seed=seed, **settings)
    chosen = {k: value for k, value in window.items() if value is not None and k != "layers"}
    edited = dict.fromkeys(hook.name for hook in direction.hooks(1, mode, **window).hooks)
    verb = "added to" if mode == "add" else "projected out of"
    contract = replace(
        result.contract,
        target=f"{name}; and the damage: -log p of the written tokens under the unsteered model, "
        "nats a token, and the share of different pairs; each minus the unsteered text's",
        edited=f"a direction of norm {direction.norm:.3f} {verb} {', '.join(edited)}, {chosen}"
        + ("; beside it a random direction of the same norm" if control else ""),
    )
    return Steering(direction, numbers, mode, name, control, result, contract)


def _check_strengths(strengths: Any) -> list[float]:
    """Return the strengths.

    Raises:
        InputError: for none, for one that is 0 or not finite, and for two of one name.
    """
    if hasattr(strengths, "tolist"):  # a tensor or an array
        strengths = strengths.tolist()
    given = list(strengths) if isinstance(strengths, Sequence) else [strengths]
    if not given or any(strength == 0 for strength in given):
        raise InputError(f"strengths={strengths!r}: give some that are not 0, which is unsteered")
    for strength in given:
        check_number("strengths", strength, -1e9, 1e9, "give finite numbers")
    if len({_arm(strength) for strength in given}) < len(given):
        raise InputError(
            f"strengths={strengths!r}: give each once, and let them differ in their first 6 digits"
        )
    return [float(strength) for strength in given]


def _arm(strength: float) -> str:
    return f"{strength:g}"


def _random_arm(strength: float) -> str:
    return f"random {strength:g}"
