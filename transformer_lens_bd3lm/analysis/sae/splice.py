"""Sparse autoencoders spliced into the network: what a hook point holds becomes features and back.

With x the activation, f = encode(x), and f' the features after edits::

    error="dropped"   x' = decode(f')                        only what the SAE explains stays
    error="kept"      x' = x + (decode(f') - decode(f))      only the edit acts

With the error kept and features that no edit changes, x' is x to the bit, because equal features
decode to equal values. A :class:`Splice` is a hook like any other. It sees the rows that the pass
or the scope of a step hook shows it, in either view.

It trains nothing, and takes the SAE as it is, whatever it was trained on.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from transformer_lens_bd3lm.analysis.sae.saved import SavedSae
from transformer_lens_bd3lm.bridge.hook_names import resolve
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice, check_int, is_real
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks
from transformer_lens_bd3lm.errors import InputError


class SparseAutoencoder(Protocol):
    """Anything with ``encode`` and ``decode``, over the last axis; a module of yours, for example.

    Its width is checked beforehand where it has ``d_in``, ``cfg.d_in`` or ``W_dec``.
    """

    def encode(self, x: Any, /) -> Any:
        """Compute features ``[..., d_sae]`` of activations ``[..., d_in]``."""
        ...

    def decode(self, features: Any, /) -> Any:
        """Compute activations ``[..., d_in]`` of features ``[..., d_sae]``."""
        ...


Edit = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, eq=False)
class Splice:
    """Hook that writes an activation as the features of a sparse autoencoder, edits them, and back.

    Edits act in the order ``scale_by``, ``set_to``, ``edit``.

    Attributes:
        sae: anything with ``encode(x)`` and ``decode(features)``; see :func:`load_sae`.
        name: the hook point. Where the SAE is as wide as all heads together, heads are joined.
        error: ``"dropped"`` replaces the activation by its reconstruction; ``"kept"`` adds what
            the SAE does not explain, so that only edits change it.
        set_to: value to set a feature to, by its number; 0 ablates it.
        scale_by: factor to multiply a feature by, by its number.
        edit: function of the features ``[..., d_sae]`` that returns edited ones, or edits its copy
            in place and returns None.

    Raises:
        InputError: for an object without both methods, another error, a feature that the SAE does
            not have, or an edit that is no function.
    """

    sae: Any
    name: str
    error: Literal["dropped", "kept"] = "dropped"
    set_to: Mapping[int, float] = field(default_factory=dict)
    scale_by: Mapping[int, float] = field(default_factory=dict)
    edit: Edit | None = None

    def __post_init__(self) -> None:
        check_choice("error", self.error, ("dropped", "kept"))
        check_sae(self.sae)
        if not isinstance(self.name, str):
            raise InputError(f"name={self.name!r}: give the name of one hook point")
        if self.edit is not None and not callable(self.edit):
            raise InputError(f"edit={self.edit!r}: give a function of the features")
        for argument in ("set_to", "scale_by"):
            _check_values(argument, getattr(self, argument))

    @property
    def hooks(self) -> list[Any]:
        """TransformerLens's ``[(name, fn)]``, for a forward, ``exact``, ``nelbo`` and others."""
        return [(self.name, self)]

    def at(self, **selectors: Any) -> StepHooks:
        """Return the splice at chosen steps of the denoising loop.

        Args:
            selectors: those of :meth:`StepHooks.add`: ``block``, ``step``, ``index``, ``t``,
                ``masks_left``, ``when``, ``scope``.

        Raises:
            InputError: for selectors that do not fit.
        """
        return StepHooks().add(self.name, self, **selectors)

    def __call__(self, activation: Tensor, hook: HookPoint) -> Tensor:
        """Return the spliced activation, in its own shape, dtype and device.

        Raises:
            InputError: for an activation of another width, a feature that the SAE does not have,
                or edited features of another shape.
        """
        x = joined(self.sae, self.name, activation)
        features = self.sae.encode(x)
        edited = self._edited(features)
        decoded = self.sae.decode(edited)
        if self.error == "kept":
            change = decoded - self.sae.decode(features)
            decoded = x.to(torch.promote_types(x.dtype, change.dtype)) + change
        if decoded.numel() != activation.numel():
            raise InputError(
                f"the SAE decodes {tuple(decoded.shape)} at {self.name}, whose activation is "
                f"{tuple(activation.shape)}: give an SAE of this hook point"
            )
        return decoded.reshape(activation.shape).to(activation.dtype).to(activation.device)

    def _edited(self, features: Tensor) -> Tensor:
        """Return the features after all edits; the given ones stay as they are."""
        edited, count = features.clone(), features.shape[-1]
        for values, scaled in ((self.scale_by, True), (self.set_to, False)):
            for feature, value in values.items():
                if feature >= count:
                    raise InputError(f"feature {feature}: this SAE has features 0..{count - 1}")
                edited[..., feature] = edited[..., feature] * value if scaled else value
        if self.edit is None:
            return edited
        returned = self.edit(edited)
        if returned is None:
            return edited
        if not isinstance(returned, Tensor) or returned.shape != features.shape:
            came = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned)
            raise InputError(
                f"edit returned {came}: return None, or features of shape {tuple(features.shape)}"
            )
        return returned


def joined(sae: Any, name: str, activation: Tensor) -> Tensor:
    """Return an activation as the SAE reads it: in its dtype and on its device, heads joined.

    Raises:
        InputError: for another width than the SAE's.
    """
    width, axes = width_of(sae), lookup(name).axes.split()
    if axes[-2:-1] == ["head"] and width != activation.shape[-1]:
        activation = activation.flatten(-2)
    if width is not None and activation.shape[-1] != width:
        raise InputError(_no_fit(name, activation.shape[-1], width))
    if isinstance(sae, torch.nn.Module):
        weight = next((p for p in sae.parameters() if p.is_floating_point()), None)
        return activation if weight is None else activation.to(weight)
    return activation


def check_fits(bridge: Bridge, sae: Any, name: str) -> None:
    """Check before anything runs that a hook point exists, has positions, and fits an SAE.

    Raises:
        InputError: for an object that is no SAE, a hook point without positions, or another width.
        HookNameError: for a hook name that the bridge does not have.
    """
    check_sae(sae)
    resolve(bridge, [name])
    spec, config = lookup(name), bridge.original_model.config
    if spec.rows == "none" or spec.has_keys or spec.kind == "ids":
        raise InputError(
            f"{name} holds {spec.meaning} [{spec.axes}]: give a hook point with one vector a "
            "position"
        )
    width, d = width_of(sae), config.hidden_dim
    heads = config.n_heads
    sizes = {"d_model": d, "d_mlp": 4 * d, "d_head": d // heads, "d_vocab": config.vocab_size,
             "head": heads, "1": 1}  # fmt: skip
    axes = spec.axes.split()[2:]
    possible = {sizes.get(axes[-1]), math.prod(sizes.get(axis, 0) for axis in axes)} - {None}
    if width is not None and spec.kind != "unknown" and width not in possible:
        raise InputError(_no_fit(name, sizes.get(axes[-1]) or 0, width))


def check_sae(sae: Any) -> None:
    """Check that an object has ``encode`` and ``decode``.

    Raises:
        InputError: if it lacks one.
    """
    lacking = [
        method for method in ("encode", "decode") if not callable(getattr(sae, method, None))
    ]
    if lacking:
        raise InputError(
            f"sae={type(sae).__name__} has no {' and no '.join(lacking)}: give an object with "
            "encode(x) and decode(features), as load_sae returns"
        )


def width_of(sae: Any) -> int | None:
    """Return the width of the activations that an SAE reads; None where it does not say."""
    for owner in (sae, getattr(sae, "cfg", None)):
        if isinstance(width := getattr(owner, "d_in", None), int):
            return width
    decoder = getattr(sae, "W_dec", None)
    return decoder.shape[-1] if isinstance(decoder, Tensor) else None


def sae_words(sae: Any) -> str:
    """Return what an SAE is in words: its kind and where it comes from."""
    if isinstance(sae, SavedSae):
        return f"{sae.architecture} SAE" + (f", k={sae.k}" if sae.k else "")
    return type(sae).__name__


def _no_fit(name: str, came: int, width: int) -> str:
    """Return the message for an SAE of another width."""
    return (
        f"{name} holds {came} values a position and the SAE reads {width}: give the hook point "
        "that it was trained on"
    )


def _check_values(argument: str, values: Any) -> None:
    """Check numbers by feature.

    Raises:
        InputError: for anything but a mapping of features to finite numbers.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{argument}={values!r}: give {{feature: number}}")
    for feature, value in values.items():
        check_int(f"a feature of {argument}", feature, 0)
        if not is_real(value) or not math.isfinite(value):
            raise InputError(f"{argument}={{{feature}: {value!r}}}: give a finite number")
