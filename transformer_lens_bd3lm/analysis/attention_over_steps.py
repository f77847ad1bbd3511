"""Where masked queries look: the share of their attention on masks, tokens and BOS, step by step.

Every key that a masked query reads belongs to one group::

    masks     positions that are still masked, the query's own left out
    block     tokens of the query's own block
    past      tokens of earlier blocks
    BOS       position 0
    itself    the query's own position

The shares of a query sum to 1; beside each stands the share that uniform attention would have. The
drift of a head is the total variation between its attention at two steps in a row, over queries
that are masked at both (the keys of a block do not change while it is denoised).

Attention is read, not edited: a large share does not say that a head uses what it reads.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.analysis.heads.masked_text import read_masked_text
from transformer_lens_bd3lm.analysis.noised_text import pattern_names
from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.distribution import masks_anywhere
from transformer_lens_bd3lm.checks import check_choice
from transformer_lens_bd3lm.denoising.along import along, run_or_texts
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.errors import NotExactError
from transformer_lens_bd3lm.model.modules import at_least_float32
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values

GROUPS = ("masks", "block", "past", "BOS", "itself")
"""Groups of keys, in the order of the last axis of ``shares``."""


@dataclass(frozen=True, kw_only=True, repr=False)
class AttentionOverSteps(Result):
    """Shares of attention of masked queries by step, head and group of keys; float64, CPU.

    Attributes:
        model: the checkpoint's name.
        view: ``"run"``, or of one pass ``"dual"`` or ``"sampling"``, which has one step.
        shares: mean share over the masked queries of a row ``[step, batch, layer, head, group]``,
            groups in the order of ``GROUPS``; NaN where a row has no masked query.
        uniform: shares that uniform attention would have ``[step, batch, group]``.
        drift: total variation between a head's attention at this step and at the step before, 0 to
            1 ``[step, batch, layer, head]``; NaN at the first step of a block, and where the step
            before revealed nothing in this row.
        masks_left: masked queries of each row ``[step, batch]``: in a run, masks of the block.
        block: the block of each step, 0 for the first denoised; empty for one pass.
        contract: what was measured.
    """

    model: str
    view: str
    shares: Float[Tensor, "step batch layer head group"] = field(repr=False)
    uniform: Float[Tensor, "step batch group"] = field(repr=False)
    drift: Float[Tensor, "step batch layer head"] = field(repr=False)
    masks_left: Int[Tensor, "step batch"] = field(repr=False)
    block: list[int] = field(repr=False)
    contract: Contract

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of keys, in order."""
        return GROUPS

    @property
    def mean(self) -> Float[Tensor, "layer head group"]:
        """Mean shares: over the steps of each text, then over texts."""
        return self.shares.nanmean(0).nanmean(0)

    @property
    def mean_uniform(self) -> Float[Tensor, " group"]:
        """Mean of ``uniform``, in the same way."""
        return self.uniform.nanmean(0).nanmean(0)

    @property
    def mean_drift(self) -> Float[Tensor, "layer head"]:
        """Mean drift: over the steps of each text, then over texts; NaN for one pass."""
        return self.drift.nanmean(0).nanmean(0)

    def by_masks_left(self) -> tuple[list[int], Float[Tensor, "masks_left layer head group"]]:
        """Return the numbers of masks left that occur, ascending, and the mean shares at each."""
        numbers = sorted({int(n) for n in self.masks_left.unique()} - {0})
        means = []
        for n in numbers:
            at = (self.masks_left == n)[..., None, None, None]
            means.append(self.shares.where(at, torch.nan).nanmean(0).nanmean(0))
        return numbers, torch.stack(means)

    def above_uniform(self, group: str, texts: Any = None, level: float = 0.95) -> Effects:
        """Compute each head's share on a group less uniform attention's, ``[layer, head]``.

        Args:
            group: one of ``groups``.
            texts: number of each row's text, if rows share texts, as in :func:`mean_effects`.
            level: of the intervals over texts.

        Raises:
            InputError: for another group, or fewer than two texts to average.
        """
        check_choice("group", group, GROUPS)
        at = GROUPS.index(group)
        above = self.shares[..., at] - self.uniform[:, :, None, None, at]
        return mean_effects(above.nanmean(0), texts, level=level)

    def _figures(self) -> str:
        mean, uniform = self.mean, self.mean_uniform
        above = (mean - uniform).nan_to_num(-torch.inf)
        layer, head, group = (int(i) for i in torch.unravel_index(above.argmax(), above.shape))
        share = float(mean[layer, head, group])
        return (
            f"{self.model}, {self.view}, {count(self.shares.shape[1], 'text')}: head "
            f"{layer}.{head} gives {share:.2f} to {self.groups[group]}, "
            f"uniform {float(uniform[group]):.2f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return means by head and by masks left as plain values for JSON."""
        numbers, by_masks_left = self.by_masks_left()
        values = {
            "model": self.model,
            "view": self.view,
            "groups": self.groups,
            "shares": self.mean,
            "uniform": self.mean_uniform,
            "drift": self.mean_drift,
            "masks_left": numbers,
            "shares_by_masks_left": by_masks_left,
            "contract": vars(self.contract),
        }
        return plain_values(values)


def _grouped(
    is_mask: Bool[Tensor, "batch query key"],
    own_block: Bool[Tensor, "query key"],
    query: Int[Tensor, " query"],
    key: Int[Tensor, " key"],
) -> Int[Tensor, "batch query key"]:
    """Return the number of each key's group; all keys are taken as readable."""
    label = torch.where(own_block, 1, 2) * torch.ones_like(is_mask, dtype=torch.long)
    label = label.masked_fill(is_mask, 0).masked_fill(key == 0, 3)
    return label.masked_fill(query[:, None] == key, 4)


def _mean_over(
    values: Float[Tensor, "batch query *dims"], queries: Bool[Tensor, "batch query"]
) -> Float[Tensor, "batch *dims"]:
    """Average over some queries of each row, in float64 on the CPU; NaN in a row without any."""
    values, queries = values.cpu().double(), queries.cpu()
    kept = queries.view(*queries.shape, *[1] * (values.dim() - 2))
    return values.where(kept, 0.0).sum(1) / kept.sum(1)


def _shares(
    attention: Float[Tensor, "batch head query key"], label: Int[Tensor, "batch query key"]
) -> Float[Tensor, "batch query head group"]:
    """Sum each query's attention over the keys of each group."""
    sums = [(attention * (label == g)[:, None]).sum(-1) for g in range(len(GROUPS))]
    return torch.stack(sums, dim=-1).transpose(1, 2)


def _uniform(
    label: Int[Tensor, "batch query key"], readable: Bool[Tensor, "batch query key"]
) -> Float[Tensor, "batch query group"]:
    """Return the shares of uniform attention over the readable keys."""
    counts = torch.stack([((label == g) & readable).sum(-1) for g in range(len(GROUPS))], -1)
    return counts.double() / counts.sum(-1, keepdim=True)


class _StepReader:
    """Reduces the attention patterns of each step as its pass runs, and keeps one step of them."""

    def __init__(self):
        self.shares: list[Tensor] = []
        self.drift: list[Tensor] = []
        self.before: dict[int, tuple[Tensor, Step]] = {}

    def label(self, step: Step, keys: int) -> Int[Tensor, "batch query key"]:
        """Return the groups of the keys that the active block reads at a step."""
        start, end = step.window
        device = step.tokens.device
        query = torch.arange(start, end, device=device)
        key = torch.arange(end - keys, end, device=device)
        is_mask = (step.tokens[:, end - keys : end] == step.mask_id)[:, None]
        is_mask = is_mask.expand(-1, end - start, -1)
        return _grouped(is_mask, (key >= start).expand(end - start, -1), query, key)

    def see(self, pattern: Tensor, hook: Any, step: Step, layer: int) -> None:
        """Reduce one layer's pattern ``[batch, head, query, key]``."""
        attention, queries = at_least_float32(pattern), step.masked
        label = self.label(step, attention.shape[-1])
        self.shares.append(_mean_over(_shares(attention, label), queries))
        drift = torch.full(self.shares[-1].shape[:2], torch.nan, dtype=torch.float64)
        before, earlier = self.before.get(layer, (attention, None))
        if earlier is not None and earlier.block == step.block:
            both = queries & earlier.masked
            both &= (step.tokens != earlier.tokens).any(-1).cpu()[:, None]
            varied = (attention - before).abs().sum(-1).transpose(1, 2) / 2
            drift = _mean_over(varied, both)
        self.drift.append(drift)
        self.before[layer] = (attention.clone(), step)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the shares and the drift of the step that has run, by layer."""
        result = torch.stack(self.shares, dim=1), torch.stack(self.drift, dim=1)
        self.shares, self.drift = [], []
        return result


@torch.no_grad()
def attention_over_steps(
    source: Any, texts: Any = None, *, block_size: Any = None, seed: int = 0
) -> AttentionOverSteps:
    """Measure where the masked queries of a run attend, at every step, head by head.

    Nothing needs to have been recorded: the run is replayed with its tokens pinned. Attention is
    read after the run's own hooks.

    Args:
        source: a finished run; or a bridge, or a checkpoint's name, beside ``texts``.
        texts: texts of one length, which are revealed in a random order; None beside a run.
        block_size: tokens per block, beside texts; the bridge's by default.
        seed: random seed of that order.

    Raises:
        InputError: for anything else, a run from a file that does not hold its functions, or the
            autoregressive baseline.
        NotExactError: where the bridge is no longer what the run was made with, or the run's own
            hooks return other values.
    """
    run = run_or_texts(source, texts, block_size, seed)
    names = pattern_names(run.bridge)
    reader = _StepReader()
    hooks = [(name, partial(reader.see, layer=layer)) for layer, name in enumerate(names)]
    rows: list[tuple[Tensor, ...]] = []
    for step, *_ in along(run, hooks=hooks):
        keys = step.window[1] - run.canvas.first_visible(step.window[0])
        label = reader.label(step, keys)
        uniform = _mean_over(_uniform(label, torch.ones_like(label).bool()), step.masked)
        rows.append((*reader.take(), uniform, step.masks_left))
    shares, drift, uniform, masks_left = (torch.stack(x) for x in zip(*rows, strict=True))
    return AttentionOverSteps(
        model=Path(run.bridge.cfg.model_name).name,
        view="run",
        shares=shares,
        uniform=uniform,
        drift=drift,
        masks_left=masks_left,
        block=list(run.timeline.block),
        contract=Contract(
            target="share of attention of masked queries, a head and step, 0 to 1",
            edited="nothing",
            fixed="tokens and order of the run",
            masks="those that each step of the run met",
        ),
    )


@torch.no_grad()
def attention_shares(
    bridge: Any,
    tokens: Any,
    clean: Any = None,
    block_size: int | str | None = None,
    hooks: Any = None,
    timesteps: Any = None,
) -> AttentionOverSteps:
    """Measure where masked queries attend in one pass, in the dual view or the sampling view.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        tokens: a string, strings of equally many tokens, or ids ``[batch, pos]``, with masks.
        clean: the finished text; makes the view dual, where earlier blocks are read clean. Without
            it the view is that of sampling: masks of earlier blocks are read as masks.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        hooks: TransformerLens's ``[(name or filter, fn), ...]``; attention is read after them.
        timesteps: sigma of the forward, for checkpoints with time conditioning.

    Returns:
        The shares, with one step.

    Raises:
        InputError: for texts without masks, texts that do not fit each other, or the
            autoregressive baseline.
        BlockSizeError: for a value that is not a block size of this checkpoint.
        HookNameError: for a hook name that the bridge does not have.
        NotExactError: in training mode with dropout, or where attention is NaN.
    """
    bridge = read_bridge(bridge)
    require_eval(bridge)
    text = read_masked_text(bridge, tokens, clean, block_size)
    size, n = block_size_of(bridge, block_size), text.x_t.shape[1]
    position = torch.arange(n, device=text.x_t.device)
    own_block = position[:, None] // size == position // size
    label = _grouped(text.read == text.mask_id, own_block, position, position)
    row, query = text.masked.nonzero().unbind(-1)
    picked = label[row, query][:, None]
    shares: list[Tensor] = []

    def see(pattern: Tensor, hook: Any) -> None:
        by_query = _shares(text.attention(pattern)[:, :, None], picked)[:, 0].cpu().double()
        if bool(by_query.isnan().any()):
            raise NotExactError(
                f"attention is NaN in {pattern.dtype}: boot in a wider dtype, or check what the "
                "hooks return"
            )
        sums = by_query.new_zeros(len(label), *by_query.shape[1:])
        shares.append(sums.index_add_(0, row.cpu(), by_query))

    own = [(name, see) for name in pattern_names(bridge)]
    given = read_pass_hooks(bridge, hooks).fns
    with read_pass_hooks(bridge, [*given, *own]).on(), masks_anywhere(bridge):
        bridge(text.x_t, clean=text.clean, block_size=block_size, timesteps=timesteps)
    count = text.masked.sum(-1).cpu()
    by_row = torch.stack(shares, dim=1) / count[:, None, None, None]
    uniform = _uniform(label, text.readable.expand_as(label))
    view = "sampling" if text.clean is None else "dual"
    return AttentionOverSteps(
        model=Path(bridge.cfg.model_name).name,
        view=view,
        shares=by_row[None],
        uniform=_mean_over(uniform, text.masked)[None],
        drift=torch.full_like(by_row[None, ..., 0], torch.nan),
        masks_left=count[None],
        block=[],
        contract=Contract(
            target="share of attention of masked queries, a head, 0 to 1",
            edited="nothing" if hooks is None else "by the hooks that were given",
            fixed="the texts and their masks",
            masks=f"those given, in the {view} view",
        ),
    )
