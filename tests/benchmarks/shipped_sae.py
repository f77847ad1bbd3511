"""Scores of the embedded sparse autoencoder on held-out text, as its card and docs give them.

Run by hand, with a text that the model was not trained on (Hamlet and the Sonnets)::

    python -m tests.benchmarks.shipped_sae VALID.txt

It prints explained variance, active features and the exact loss recovered by masks left, of the
SAE, a random dictionary and the identity: at block size 4 over 32 texts of 64 tokens, at block size
8 over 12 texts of 40. The identity is scored in float64, over 8 texts of 32 tokens.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformer_lens.model_bridge import TransformerBridge

import transformer_lens_bd3lm as bd3lm

SIZES = {4: (32, 64), 8: (12, 40)}
OUT = Console(width=160)


class Identity:
    """The dictionary of every axis."""

    def encode(self, x: Any) -> Any:
        """Return the activations."""
        return x

    def decode(self, features: Any) -> Any:
        """Return the features."""
        return features


def texts_of(bridge: Any, text: str, number: int, tokens: int) -> torch.Tensor:
    """Return evenly spaced texts, each BOS and tokens."""
    starts = range(0, len(text) - 10 * tokens, (len(text) - 10 * tokens) // number)
    rows = [bridge.to_tokens(text[start : start + 10 * tokens])[:, :tokens] for start in starts]
    return torch.cat(rows[:number])


def share(effects: Any, *cell: int) -> str:
    """Return a share with its interval."""
    mean, low, high = (float(x[cell]) for x in (effects.mean, effects.low, effects.high))
    return f"{mean:.1%} ({low:.1%} to {high:.1%})"


def rows_of(scores: Any) -> list[str]:
    """Return the lines of a table by masks left, and the two losses in all."""
    by_masks, lines = scores.recovered(by="masks"), []
    for m in range(scores.nelbo.shape[-1]):
        cells = (f"{scores.explained_by_masks[i, m]:.3f}" for i in (0, 1))
        active = f"{scores.l0_by_masks[0, m]:.1f}"
        shares = (share(by_masks, i, m) for i in (0, 1))
        lines.append(" | ".join((f"| {m + 1}", *cells, active, *shares)) + " |")
    for loss in ("nelbo", "nll"):
        cells = (f"{scores.explained[i, 0]:.3f}" for i in (0, 1))
        shares = (share(scores.recovered(loss), i) for i in (0, 1))
        active = f"{scores.l0[0, 0]:.1f}"
        lines.append(" | ".join((f"| {loss.upper()}, all", *cells, active, *shares)) + " |")
    return lines


def main() -> None:
    """Print the tables."""
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    sae, name = bd3lm.load_sae(bd3lm.TINY_SAE), "blocks.3.hook_resid_post"
    bridge: Any = TransformerBridge.boot_transformers(bd3lm.TINY)
    for size, (number, tokens) in SIZES.items():
        scores = bd3lm.sae_scores(bridge, sae, name, texts_of(bridge, text, number, tokens), size)
        OUT.print(f"block size {size}, {number} texts of {tokens} tokens: {scores!r}")
        for line in rows_of(scores):
            OUT.print(line)
        lost = {loss: scores.lost(loss) for loss in ("nelbo", "nll")}
        OUT.print({loss: [each.text(i) for i in range(3)] for loss, each in lost.items()})
    exact: Any = TransformerBridge.boot_transformers(bd3lm.TINY, dtype=torch.float64)
    scores = bd3lm.sae_scores(exact, Identity(), name, texts_of(exact, text, 8, 32), 4)
    whole = [scores.recovered(loss).mean[0] for loss in ("nelbo", "nll")]
    parts = torch.cat([torch.stack(whole), scores.recovered(by="masks").mean[0]])
    OUT.print(f"identity, float64: furthest from 1 by {float((parts - 1).abs().max()):.1e}")


if __name__ == "__main__":
    main()
