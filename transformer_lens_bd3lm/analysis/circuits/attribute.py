"""Attribution of edges over texts: means, the strongest, and how well two sets of them agree."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.circuits.components import Components
from transformer_lens_bd3lm.analysis.circuits.passes import edge_scores, split
from transformer_lens_bd3lm.analysis.circuits.texts import read_masked_pairs
from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice, check_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values


@dataclass(frozen=True, kw_only=True, repr=False)
class EdgeAttribution(Result):
    """Attribution of a prediction at masks to nodes and to edges between them; float64, CPU, nats.

    Attributes:
        by_text: attribution of each pair of texts ``[text, node, reader]``; 0 where no edge is.
        clean_score: score of each clean text ``[text]``: log p of the target at the masks, minus
            that of ``against`` if it was given.
        corrupted_score: the same of each corrupted text.
        node_names: names of the nodes: ``embed``, heads as ``2.1``, MLPs as ``mlp2``.
        reader_names: names of the readers: ``2.1.q``, ``2.1.k``, ``2.1.v``, ``mlp2``, ``logits``.
        exists: which pairs of a node and a reader are edges ``[node, reader]``.
        steps: number of points between the two embeddings at which gradients were taken.
        model: name of the model.
        block_size: tokens per block; None without blocks.
        off_distribution: whether a block reads masks of an earlier one in some text.
        contract: what was measured, edited and held fixed.
    """

    by_text: Float[Tensor, "text node reader"] = field(repr=False)
    clean_score: Float[Tensor, " text"] = field(repr=False)
    corrupted_score: Float[Tensor, " text"] = field(repr=False)
    node_names: list[str] = field(repr=False)
    reader_names: list[str] = field(repr=False)
    exists: Bool[Tensor, "node reader"] = field(repr=False)
    steps: int
    model: str
    block_size: int | None
    off_distribution: bool
    contract: Contract

    @property
    def edges(self) -> Float[Tensor, "node reader"]:
        """Mean attribution of each edge, nats; NaN where none is."""
        return self.by_text.mean(0).masked_fill(~self.exists, torch.nan)

    @property
    def nodes(self) -> Float[Tensor, " node"]:
        """Mean attribution of each node, nats: the sum of its edges."""
        return self.by_text.mean(0).sum(-1)

    @property
    def node_effects(self) -> Effects:
        """Attribution of each node with an interval over texts and a corrected p-value."""
        return mean_effects(self.by_text.sum(-1))

    @property
    def gap(self) -> float:
        """Mean clean minus corrupted score, nats: what the embedding's edges sum to."""
        return float((self.clean_score - self.corrupted_score).mean())

    def top(self, n: int = 10) -> list[tuple[str, str, float]]:
        """Return the ``n`` edges with the largest absolute attribution: node, reader, nats."""
        mean, readers = self.by_text.mean(0), len(self.reader_names)
        return [
            (
                self.node_names[i // readers],
                self.reader_names[i % readers],
                float(mean.flatten()[i]),
            )
            for i in _strongest(mean, self.exists, n)
        ]

    def top_nodes(self, n: int = 10) -> list[tuple[str, float]]:
        """Return the ``n`` nodes with the largest absolute attribution: name, nats."""
        order = self.nodes.abs().argsort(descending=True)[:n].tolist()
        return [(self.node_names[i], float(self.nodes[i])) for i in order]

    def overlap(self, other: "EdgeAttribution", n: int = 50) -> float:
        """Return the Jaccard overlap of the ``n`` strongest edges of both: 1 if they are the same.

        Raises:
            InputError: for the attribution of a model of another shape.
        """
        if other.reader_names != self.reader_names:
            raise InputError("other is of a model with other layers or heads: give the same shape")
        return jaccard(self.by_text.mean(0), other.by_text.mean(0), self.exists, n)

    def split_half(self, n: int = 50, splits: int = 50, seed: int = 0) -> float:
        """Return the mean overlap of two halves of the texts: what chance over texts leaves.

        Args:
            n: number of edges of each half.
            splits: number of random halves.
            seed: random seed of the halves.

        Raises:
            InputError: with fewer than 2 texts.
        """
        parts = halves(len(self.by_text), splits, seed)
        x = self.by_text
        each = [jaccard(x[a].mean(0), x[b].mean(0), self.exists, n) for a, b in parts]
        return sum(each) / len(each)

    def _figures(self) -> str:
        (node, reader, nats), *_ = self.top(1)
        return (
            f"strongest {node} -> {reader} {nats:+.3f} of a gap of {self.gap:+.3f} nats, "
            f"{count(len(self.by_text), 'text')}, block size {self.block_size}, "
            f"{count(self.steps, 'gradient')} a text"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain values for JSON; edges as a list, the strongest first."""
        names = ("node", "reader", "nats")
        values = {
            "model": self.model,
            "block_size": self.block_size,
            "steps": self.steps,
            "gap_nats": self.gap,
            "off_distribution": self.off_distribution,
            "clean_score_nats": self.clean_score,
            "corrupted_score_nats": self.corrupted_score,
            "nodes_nats": dict(zip(self.node_names, self.nodes.tolist(), strict=True)),
            "edges": [dict(zip(names, e, strict=True)) for e in self.top(int(self.exists.sum()))],
            "contract": vars(self.contract),
        }
        return plain_values(values)


def jaccard(
    a: Float[Tensor, "node reader"],
    b: Float[Tensor, "node reader"],
    exists: Bool[Tensor, "node reader"],
    n: int,
) -> float:
    """Return the share of the strongest ``n`` edges of two attributions that both have."""
    one, other = (set(_strongest(x, exists, n)) for x in (a, b))
    return len(one & other) / len(one | other)


def _strongest(
    scores: Float[Tensor, "node reader"], exists: Bool[Tensor, "node reader"], n: int
) -> list[int]:
    """Return the flat places of the ``n`` edges with the largest absolute scores."""
    check_int("n", n, 1, rule="give the number of edges, 1 or more")
    sizes = scores.abs().masked_fill(~exists, -1.0).flatten()
    return sizes.argsort(descending=True, stable=True)[: min(n, int(exists.sum()))].tolist()


def halves(texts: int, splits: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return random halves of the texts, by number; one is left out of an odd number.

    Raises:
        InputError: with fewer than 2 texts.
    """
    if texts < 2:
        raise InputError(f"{texts} text: halves need 2 or more, better 10")
    generator = torch.Generator().manual_seed(check_int("seed", seed, 0, 2**63 - 1))
    orders = [
        torch.randperm(texts, generator=generator) for _ in range(check_int("splits", splits, 1))
    ]
    return [(order[: texts // 2], order[texts // 2 : texts // 2 * 2]) for order in orders]


def attribute_edges(
    bridge: Bridge,
    clean: Any,
    corrupted: Any,
    target: Any = None,
    against: Any = None,
    *,
    masks: Any = None,
    block_size: int | str | None = None,
    steps: int = 8,
    view: str | None = None,
    timesteps: Any = None,
    progress: bool | None = None,
) -> EdgeAttribution:
    """Attribute a prediction at masks to nodes and edges, by integrated gradients (EAP-IG).

    Gradients are taken at ``steps`` points between the embeddings of the corrupted and of the clean
    text (Hanna et al. 2024; on masked models Mechanism Shift 2601.14758), and multiplied by what
    each node writes in the clean run less what it writes in the corrupted one. The edges of the
    embedding sum to the difference of the two scores as ``steps`` grows. An attribution is an
    estimate of what an edge does, first of all of its rank and sign; only in a linear model is it
    equal to the effect of patching the edge. Hooks that are set on the bridge fire; with those that
    rescale the residual stream the edges of the embedding need not sum to the difference.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name, which is booted.
        clean: a text, or several, as strings or ids; with masks, unless ``masks`` is given.
        corrupted: the same texts with other tokens: as many, and masks at the same positions.
        target: the tokens at the masks whose log p counts: a string, an id or ids, for all texts or
            one for each. By default, with ``masks``, those of the clean text.
        against: tokens whose log p is subtracted, as ``target``: the score is log-odds then.
        masks: booleans ``[text, pos]``: which positions of finished texts are masked. The view is
            dual then: each block reads earlier blocks without masks, as in training.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        steps: number of points; 1 is EAP: the gradient at the corrupted text alone.
        view: ``"dual"`` or ``"sampling"`` to be sure of the view; by default as ``masks`` says.
        timesteps: sigma of the passes, for checkpoints with time conditioning.
        progress: show a bar; by default on a terminal.

    Raises:
        InputError: for texts, masks or targets that do not fit each other (a position that is
            masked in one text of a pair and not in the other among them), the autoregressive
            baseline, and under ``torch.inference_mode``, where no gradient can be computed.
        BlockSizeError: for a value that is not a block size of this checkpoint.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        NotExactError: in training mode with dropout, or where predictions are NaN.
    """
    bridge = read_bridge(bridge)
    require_eval(bridge)
    if torch.is_inference_mode_enabled():
        raise InputError(
            "attribute_edges was called under torch.inference_mode, where no gradient can be "
            "computed: call it outside"
        )
    check_int("steps", steps, 1)
    if view is not None:
        check_choice("view", view, ("dual", "sampling"))
        if (view == "dual") != (masks is not None):
            raise InputError(f"view={view!r}: the view is dual with masks=, sampling without")
    size: int | None = block_size_of(bridge, block_size)
    size = size if bridge.original_model.config.cross_attn else None
    if size is None and masks is not None:
        raise InputError("masks: this checkpoint has no dual view; give texts with masks in them")
    for name, texts in (("clean", clean), ("corrupted", corrupted)):
        if isinstance(texts, list | tuple) and not texts:
            raise InputError(f"{name}={texts!r}: give a text or more")
    pairs = read_masked_pairs(bridge, clean, corrupted, target, against, masks)
    parts, rows = Components.of(bridge), []
    with progress_bar("gradients", len(pairs), progress) as update, split(bridge):
        for pair in pairs:
            rows.append(edge_scores(bridge, pair, size, steps, timesteps))
            update(advance=1)
    scores = torch.tensor([row[1:] for row in rows], dtype=torch.float64)
    return EdgeAttribution(
        by_text=torch.stack([row[0] for row in rows]),
        clean_score=scores[:, 0],
        corrupted_score=scores[:, 1],
        node_names=parts.nodes,
        reader_names=parts.readers,
        exists=parts.edges,
        steps=steps,
        model=Path(bridge.cfg.model_name).name,
        block_size=size,
        off_distribution=size is not None and not all(p.last_block_only(size) for p in pairs),
        contract=Contract(
            target="log p of the target at the masks"
            + ("" if against is None else " minus that of against")
            + ", clean less corrupted, nats",
            edited="nothing: gradients at a reader's input times the change of what a node writes",
            fixed="masks, and all tokens in which the two texts agree",
            masks=("as given in the text" if masks is None else "as given, dual view")
            + f", block size {size}",
        ),
    )
