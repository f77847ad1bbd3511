"""State of the training of a top-k sparse autoencoder, and its optimizer step.

With x an activation, mu and s the mean and the root mean square about it (of the rows, by
coordinate), and u the input in those units (Gao et al. 2024, arXiv:2406.04093)::

    u = (x - mu) / s
    f = the k largest entries of relu((u - b) W_enc + b_enc)
    u_hat = f W_dec + b                                     rows of W_dec of length 1
    loss = |u - u_hat|^2 / d + aux * |e - e_hat|^2 / |e|^2,   e = u - u_hat without gradient

``e_hat`` is what the d / 2 most active of the dead features make of the error: this gives features
that no row activates a gradient (the paper's AuxK). A feature is dead after a number of rows
without it. The gradient's part along a row of W_dec is removed, and its length set back to 1.

What is saved reads x itself: b_dec = mu + s b, b_enc s, and features in units of x.
"""

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transformer_lens_bd3lm.analysis.sae.saved import top_k
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.plain_values import read_dataclass, read_json
from transformer_lens_bd3lm.training.folder import write_tensors

_REPORTED = {"step", "loss", "explained", "l0", "dead"}
_WARMUP, _DECAY = 0.05, 0.2  # shares of the steps in which the learning rate rises and falls


class TopKRun:
    """Weights, Adam's moments, the step and the reports so far.

    Args:
        settings: ``d_in``, ``d_sae``, ``k``, ``steps``, ``batch_size``, ``learning_rate``, ``aux``,
            ``dead_after``, ``seed``, and further plain values that tell this run from another.
        sample: rows that mean and scale are computed from ``[row, d_in]``.
        device: device that trains.
    """

    def __init__(
        self, settings: dict[str, Any], sample: Float[Tensor, "row d_in"], device: torch.device
    ):
        d_in, d_sae = settings["d_in"], settings["d_sae"]
        self.settings, self.device = settings, device
        self.mean = sample.double().mean(0).float().to(device)
        self.scale = float((sample.double() - sample.double().mean(0)).square().mean().sqrt())
        if not self.scale > 0:
            raise InputError("all rows hold the same activation: give another hook point")
        generator = torch.Generator().manual_seed(settings["seed"])
        decoder = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        initial = {
            "W_enc": decoder.T.contiguous(),
            "b_enc": torch.zeros(d_sae),
            "W_dec": decoder,
            "b_dec": torch.zeros(d_in),
        }
        self.weights = {
            name: w.to(device, copy=True).requires_grad_() for name, w in initial.items()
        }
        rate = settings["learning_rate"]
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=rate, fused=True)
        self.idle = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.step = 0
        self.sums: list[float] = [0.0, 0.0, 0.0, 0.0]  # since the last report
        self.reports: list[dict[str, Any]] = []

    @property
    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Features that no row has activated for ``dead_after`` rows."""
        return self.idle >= self.settings["dead_after"]

    def encode(self, x: Float[Tensor, "row d_in"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows in the units of training, pre-activations and features."""
        w, u = self.weights, (x.to(self.device) - self.mean) / self.scale
        a = (u - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        return u, a, top_k(a, self.settings["k"])

    def advance(self, x: Float[Tensor, "row d_in"]) -> float:
        """Make one optimizer step on a batch; return the share of the variance not explained."""
        w, settings = self.weights, self.settings
        u, a, features = self.encode(x)
        error = u - (features @ w["W_dec"] + w["b_dec"])
        squares = error.square().sum(1)
        dead = self.dead
        loss = squares.mean() / settings["d_in"]
        if settings["aux"] and bool(dead.any()):
            loss = loss + settings["aux"] * self._aux(a, error.detach(), dead)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            rows, gradient = w["W_dec"], w["W_dec"].grad
            assert gradient is not None
            gradient -= (gradient * rows).sum(1, keepdim=True) * rows
            torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
            self.optimizer.step()
            w["W_dec"].copy_(F.normalize(w["W_dec"], dim=1))
            active = features > 0
            self.idle = torch.where(active.any(0), 0, self.idle + len(x))
        self.step += 1
        spread = (u - u.mean(0)).square().sum()
        values = (loss.detach(), squares.detach().sum(), spread, active.sum() / len(x))
        self.sums = [old + float(new) for old, new in zip(self.sums, values, strict=True)]
        return float(values[1] / spread)

    def _aux(self, a: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """Return the share of the error that the dead features do not explain."""
        number = min(self.settings["d_in"] // 2 or 1, int(dead.sum()))
        features = top_k(a.masked_fill(~dead, -torch.inf), number)
        left = error - features @ self.weights["W_dec"]
        return left.square().sum() / error.square().sum().clamp(min=1e-12)

    def _rate(self) -> float:
        """Return the learning rate of this step: linear warm-up, constant, linear to zero."""
        steps = self.settings["steps"]
        rise, fall = max(_WARMUP * steps, 1), max(_DECAY * steps, 1)
        share = min(1.0, (self.step + 1) / rise, (steps - self.step) / fall)
        return self.settings["learning_rate"] * share

    def report(self, more: dict[str, float]) -> dict[str, Any]:
        """Close a stretch of steps: note its loss, explained variance, L0 and dead share."""
        steps = self.step - (self.reports[-1]["step"] if self.reports else 0)
        loss, squares, spread, l0 = self.sums
        self.reports.append(
            {
                "step": self.step,
                "loss": loss / steps,
                "explained": 1 - squares / spread if spread else math.nan,  # if all rows are one
                "l0": l0 / steps,
                "dead": float(self.dead.double().mean()),
            }
            | more
        )
        self.sums = [0.0, 0.0, 0.0, 0.0]
        return self.reports[-1]

    @torch.no_grad()
    def explained(self, x: Float[Tensor, "row d_in"]) -> float:
        """Return the explained variance of rows that are not trained on."""
        u, _, features = self.encode(x)
        error = u - (features @ self.weights["W_dec"] + self.weights["b_dec"])
        return float(1 - error.square().sum() / (u - u.mean(0)).square().sum())

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """Return weights that read activations as they are, float32, on the CPU."""
        w = {name: p.detach() for name, p in self.weights.items()}
        w |= {"b_enc": w["b_enc"] * self.scale, "b_dec": self.mean + self.scale * w["b_dec"]}
        return {name: p.cpu().contiguous() for name, p in w.items()}

    def save(self, path: Path) -> None:
        """Write the state to a file, whole or not at all.

        Raises:
            OSError: if it cannot be written (a full disk, say); the file is as before then.
        """
        state = {"idle": self.idle}
        for name, p in self.weights.items():
            state[name] = p.detach()
            state |= {f"{key}/{name}": value for key, value in self.optimizer.state[p].items()}
        metadata = {
            name: json.dumps(getattr(self, name))
            for name in ("settings", "step", "sums", "reports")
        }
        draft = path.with_suffix(".partial")
        write_tensors({name: x.contiguous() for name, x in state.items()}, draft, metadata)
        os.replace(draft, path)

    def load(self, path: Path) -> None:
        """Replace the state by a saved one of the same settings.

        Raises:
            InputError: if it cannot be read.
        """
        try:
            with safe_open(path, framework="pt") as saved:
                metadata = saved.metadata()
                names = [each.name for each in fields(_Progress)]
                values = {name: read_json(metadata[name]) for name in names}
                read_dataclass(_Progress, values).check(self.settings["steps"])
                for name, value in values.items():
                    setattr(self, name, value)
                self.idle.copy_(_same_kind(saved, "idle", self.idle))
                for name, p in self.weights.items():
                    p.data.copy_(_same_kind(saved, name, p))
                    likes = {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}
                    self.optimizer.state[p] = {
                        key: _same_kind(saved, f"{key}/{name}", like).to(p.device)
                        for key, like in likes.items()
                    }
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read as the state of a training ({error}): remove it to train "
                "anew"
            ) from error


@dataclass(frozen=True)
class _Progress:
    """How far a saved training is."""

    step: int
    sums: list[float]
    reports: list[dict[str, float]]

    def check(self, steps: int) -> None:
        """Check that these are values of a training of so many steps.

        Raises:
            ValueError: if they are not.
        """
        if not 0 <= self.step <= steps or len(self.sums) != 4:
            raise ValueError(f"it says step {self.step} of {steps}, sums {self.sums}")
        whole = all(_REPORTED <= set(report) for report in self.reports)
        last = self.reports[-1].get("step", 0) if self.reports else 0
        if not whole or last > self.step or (self.step == steps and last != steps):
            raise ValueError(f"its reports do not lead to step {self.step}")


def _same_kind(saved: Any, name: str, like: Tensor) -> Tensor:
    """Return a saved tensor of the same shape and dtype as another, and finite.

    Raises:
        ValueError: for any other.
    """
    x = saved.get_tensor(name)
    if x.shape != like.shape or x.dtype != like.dtype or not bool(x.isfinite().all()):
        raise ValueError(f"{name} is not {tuple(like.shape)} of finite {like.dtype}")
    return x
