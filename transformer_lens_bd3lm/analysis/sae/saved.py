"""Sparse autoencoders as SAELens 6 saves them: a folder of ``cfg.json`` and ``sae_weights``.

A sparse autoencoder (SAE) writes an activation x as a sum of few of many directions::

    z = norm(x) - b_dec                     the subtraction only with apply_b_dec_to_input
    a = z W_enc + b_enc
    f = relu(a)                             standard
        the k largest entries of relu(a)    topk; ranked and scaled by |W_dec| if rescaled
        relu(a) where a > threshold         jumprelu, as a trained batchtopk is saved too
        relu(z W_enc exp(r_mag) + b_mag) where z W_enc + b_gate > 0       gated
    x_hat = norm^-1(f W_dec + b_dec)

This is what SAELens computes, without its package: it needs an older TransformerLens. It does not
train, and reads no other file layout.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.errors import CheckpointError, InputError
from transformer_lens_bd3lm.plain_values import read_json

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ENCODER = ("W_enc", "b_enc", "W_dec", "b_dec")
TENSORS = {
    "standard": _ENCODER,
    "topk": _ENCODER,
    "jumprelu": (*_ENCODER, "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
}
"""Tensors of each architecture."""
_NORMS = ("none", "layer_norm", "constant_norm_rescale")
_UNFOLDED = ("expected_average_only_in", "covariance_whitening")
_DTYPES = {
    name: getattr(torch, name.removeprefix("torch."))
    for short in ("float32", "float64", "bfloat16", "float16")
    for name in (short, f"torch.{short}")
}
_IGNORED = ("device", "metadata", "architecture")
_Undo = Callable[[Tensor], Tensor]


@dataclass
class SavedSae:
    """Sparse autoencoder read from a SAELens folder; it computes what SAELens computes.

    It computes in the dtype of the activation, unless that is narrower than float32 or the saved
    dtype, and on the activation's device.

    Attributes:
        architecture: ``"standard"``, ``"topk"``, ``"jumprelu"`` or ``"gated"``.
        weights: its tensors by SAELens's names, in the saved dtype, on the CPU; ``W_enc`` is
            ``[d_in, d_sae]``, ``W_dec`` is ``[d_sae, d_in]``.
        k: number of features that are active at once; None unless topk.
        rescaled: whether topk ranks and scales features by the length of their decoder row.
        bias_first: whether ``b_dec`` is subtracted before encoding.
        norm: ``"none"``, ``"layer_norm"`` or ``"constant_norm_rescale"``. With the last two,
            ``decode`` undoes the norm of the activations that were encoded last.
        by_head: whether heads are joined before encoding (SAELens's ``hook_z``).
        metadata: what the folder says of its origin, as ``hook_name``.
    """

    architecture: str
    weights: dict[str, Tensor] = field(repr=False)
    k: int | None
    rescaled: bool
    bias_first: bool
    norm: str
    by_head: bool
    metadata: dict[str, Any] = field(repr=False)
    _copies: dict[Any, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _undo: tuple[torch.Size, _Undo] | None = field(default=None, init=False, repr=False)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return len(self.weights["W_enc"])

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.weights["W_dec"])

    def __repr__(self) -> str:
        k = "" if self.k is None else f", k={self.k}"
        return f"SavedSae({self.architecture}, {self.d_in} to {self.d_sae} features{k})"

    def encode(self, x: Float[Tensor, "..."]) -> Float[Tensor, "*dims d_sae"]:
        """Compute features of activations ``[..., d_in]``, or of heads that are joined first.

        Raises:
            InputError: for activations of another width.
        """
        if self.by_head and x.shape[-1] != self.d_in:
            x = x.flatten(-2)
        if x.shape[-1] != self.d_in:
            raise InputError(f"x is {tuple(x.shape)}: this SAE reads {self.d_in} values a position")
        w = self._like(x)
        z = self._normed(x.to(w["W_enc"].dtype))
        if self.bias_first:
            z = z - w["b_dec"]
        if self.architecture == "gated":
            gate = (z @ w["W_enc"] + w["b_gate"] > 0).to(z.dtype)
            return gate * (z @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
        a = z @ w["W_enc"] + w["b_enc"]
        if self.architecture == "jumprelu":
            return a.relu() * (a > w["threshold"]).to(a.dtype)
        if self.k is None:
            return a.relu()
        return top_k(a * w["W_dec"].norm(dim=-1) if self.rescaled else a, self.k)

    def decode(self, features: Float[Tensor, "*dims d_sae"]) -> Float[Tensor, "*dims d_in"]:
        """Compute the activations that features stand for; heads stay joined.

        Raises:
            InputError: for another number of features; and, with a norm, for features of other
                positions than were encoded last.
        """
        if features.shape[-1] != self.d_sae:
            raise InputError(
                f"features are {tuple(features.shape)}: this SAE has {self.d_sae} features"
            )
        w = self._like(features)
        if self.rescaled:
            features = features * (1 / w["W_dec"].norm(dim=-1))
        decoded = features.to(w["W_dec"].dtype) @ w["W_dec"] + w["b_dec"]
        if self.norm == "none":
            return decoded
        if self._undo is None or self._undo[0] != features.shape[:-1]:
            raise InputError(
                f"features of {tuple(features.shape[:-1])} positions: {self.norm} is undone with "
                "the activations that were encoded last, so encode those of these features first"
            )
        return self._undo[1](decoded)

    def _normed(self, x: Tensor) -> Tensor:
        """Return normalized activations, and keep how to undo it."""
        if self.norm == "none":
            return x
        if self.norm == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            std = (x - mean).std(-1, keepdim=True)  # SAELens's: over d - 1, and 1e-5 beside it
            self._undo = x.shape[:-1], lambda y: y * std + mean
            return (x - mean) / (std + 1e-5)
        scale = self.d_in**0.5 / x.norm(dim=-1, keepdim=True)
        self._undo = x.shape[:-1], lambda y: y / scale
        return x * scale

    def _like(self, x: Tensor) -> dict[str, Tensor]:
        """Return the weights in the dtype and on the device of a computation with ``x``."""
        dtype = torch.promote_types(x.dtype, self.weights["W_enc"].dtype)
        key = torch.promote_types(dtype, torch.float32), x.device
        if key not in self._copies:
            with torch.inference_mode(False):  # so that copies can take part in a gradient later
                self._copies[key] = {
                    name: tensor.to(dtype=key[0], device=key[1])
                    for name, tensor in self.weights.items()
                }
        return self._copies[key]


def top_k(a: Float[Tensor, "*dims d_sae"], k: int) -> Float[Tensor, "*dims d_sae"]:
    """Return the k largest entries of each row, and 0 elsewhere and where they are negative."""
    values, at = a.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(a).scatter(-1, at, values.relu())


def load_sae(path: str | Path) -> SavedSae:
    """Load a sparse autoencoder that SAELens 6 saved, without its package.

    Args:
        path: the folder, with ``cfg.json`` and ``sae_weights.safetensors``.

    Raises:
        CheckpointError: for a folder without these files, an architecture or a setting that is not
            known, or tensors that are missing, left over, of another shape, or not finite.
    """
    folder = Path(path)
    try:
        config = read_json((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"path={str(path)!r}: {error}; give a folder with {CONFIG} and {WEIGHTS}, as "
            "SAELens's save_model writes it"
        ) from error
    settings = _read_settings(str(path), config)
    architecture, d_in, d_sae = settings["architecture"], config["d_in"], config["d_sae"]
    _check_tensors(str(path), weights, _shapes(architecture, d_in, d_sae))
    dtype = _DTYPES[config.get("dtype", "float32")]
    return SavedSae(weights={name: w.to(dtype) for name, w in weights.items()}, **settings)


def _read_settings(path: str, config: Any) -> dict[str, Any]:
    """Check a config, and return the settings of :class:`SavedSae`.

    Raises:
        CheckpointError: naming the first setting that does not fit.
    """

    def refuse(key: str, rule: str) -> CheckpointError:
        return CheckpointError(f"{path}: {CONFIG} says {key}={config.get(key)!r}: {rule}")

    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: {CONFIG} holds {type(config).__name__}, no settings")
    architecture = config.get("architecture")
    if not isinstance(architecture, str) or architecture not in TENSORS:
        raise refuse("architecture", f"{', '.join(TENSORS)} are known; convert it with SAELens")
    known = {"d_in", "d_sae", "dtype", "apply_b_dec_to_input", "normalize_activations",
             "reshape_activations", *_IGNORED}  # fmt: skip
    if architecture == "topk":
        known |= {"k", "rescale_acts_by_decoder_norm"}
    if unknown := sorted(set(config) - known):
        raise refuse(
            unknown[0],
            f"{architecture} has no such setting in SAELens 6; load it there and save it again",
        )
    try:
        for key in ("d_in", "d_sae"):
            check_int(key, config.get(key), 1)
        if architecture == "topk":
            check_int("k", config.get("k"), 1, config["d_sae"])
    except InputError as error:
        raise CheckpointError(f"{path}: {CONFIG} says {error}") from error
    norm = config.get("normalize_activations", "none")
    if norm in _UNFOLDED:
        raise refuse(
            "normalize_activations",
            "its scale is not in the folder; fold it into the weights with SAELens, which trained "
            "SAEs are saved with",
        )
    choices = {
        "normalize_activations": _NORMS,
        "reshape_activations": ("none", "hook_z"),
        "dtype": tuple(_DTYPES),
        "apply_b_dec_to_input": (True, False),
        "rescale_acts_by_decoder_norm": (True, False),
    }
    for key, values in choices.items():
        if key in config and not _is_one_of(config[key], values):
            raise refuse(key, f"{', '.join(map(str, values))} are known")
    metadata = config.get("metadata")
    if not isinstance(metadata, dict | None):
        raise refuse("metadata", "it is an object, or left out")
    return {
        "architecture": architecture,
        "k": config["k"] if architecture == "topk" else None,
        "rescaled": config.get("rescale_acts_by_decoder_norm", False),
        "bias_first": config.get("apply_b_dec_to_input", True),
        "norm": norm,
        "by_head": config.get("reshape_activations") == "hook_z",
        "metadata": dict(metadata or {}),
    }


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Return whether a value is one of several, of the same type: 1 is not True."""
    return any(type(value) is type(each) and value == each for each in values)


def _shapes(architecture: str, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of an architecture."""
    own = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    return {name: own.get(name, (d_sae,)) for name in TENSORS[architecture]}


def _check_tensors(
    path: str, weights: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Check that the tensors are those of the architecture, and finite.

    Raises:
        CheckpointError: naming those that do not fit.
    """
    missing, extra = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
    if missing or extra:
        words = [f"lacks {', '.join(missing)}"] * bool(missing)
        words += [f"also has {', '.join(extra)}"] * bool(extra)
        raise CheckpointError(f"{path}: {WEIGHTS} {' and '.join(words)}: it is of another SAE")
    for name, shape in shapes.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{path}: {name} is {tuple(tensor.shape)}, {CONFIG} says {shape}")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{path}: {name} ({tensor.dtype}) holds values that are not finite floats"
            )
