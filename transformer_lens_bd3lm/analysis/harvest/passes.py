"""Run the network over windows, and keep the rows of named hook points.

Dual passes and passes of finished texts end as soon as every named hook point has been seen: later
layers and the unembedding are not run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.harvest.distributions import draw_masks, masks_left
from transformer_lens_bd3lm.analysis.harvest.rows import Rows
from transformer_lens_bd3lm.analysis.harvest.same_rows import (
    before_attention,
    own_token_is_text,
    text_is_read,
)
from transformer_lens_bd3lm.analysis.harvest.settings import HarvestSettings
from transformer_lens_bd3lm.analysis.harvest.windows import Windows, passes_of
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.batches import Cost, batches_of
from transformer_lens_bd3lm.denoising.denoise import denoise
from transformer_lens_bd3lm.denoising.denoise_many import read_canvases
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.samplers import FirstHitting
from transformer_lens_bd3lm.denoising.step import RevealedStep
from transformer_lens_bd3lm.denoising.step_hooks import StepHooks


class _AllSeen(Exception):
    """Every named hook point of a pass has been seen."""


def activations_of(
    bridge: Bridge,
    names: Sequence[str],
    x_t: Int[Tensor, "batch pos"],
    take: Callable[[str, Tensor], Any] = lambda name, activation: activation,
    **options: Any,
) -> dict[str, Any]:
    """Run a pass until every hook point has been seen; return what was taken of each by name.

    Args:
        bridge: a BD3LM bridge.
        names: hook points.
        x_t: token ids.
        take: function of a name and its activation that returns what to keep, all by default.
        options: further arguments of the forward.
    """
    kept: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(activation: Tensor, hook: Any) -> None:
            kept[name] = take(name, activation.detach())
            if len(kept) == len(names):
                raise _AllSeen

        return hook

    with torch.no_grad(), bridge.hooks(fwd_hooks=[(name, keep(name)) for name in names]):
        try:
            bridge(x_t, **options)
        except _AllSeen:
            pass
    return kept


class Shown:
    """Which rows to drop, and how many that are kept are the same in every text, by hook point.

    Attributes:
        early: whether each hook point comes before the first attention, by name.
        dropped: number of rows dropped.
        same: by hook point, number of rows kept that are the same in every text there.
    """

    def __init__(self, names: Sequence[str]):
        self.early = {name: before_attention(name) for name in names}
        self.dropped, self.same = 0, dict.fromkeys(names, 0)

    def keep(
        self,
        rows: Bool[Tensor, "batch pos"],
        masked: Bool[Tensor, "batch pos"],
        block_size: int,
    ) -> Bool[Tensor, "batch pos"]:
        """Return the rows to keep.

        Where all hook points come before the first attention these are the tokens of the text.
        Otherwise all are kept, so that the distribution is the one that was asked for.
        """
        own, read = own_token_is_text(masked), text_is_read(masked, block_size)
        kept = rows & own if all(self.early.values()) else rows
        self.dropped += int(rows.sum() - kept.sum())
        for name, early in self.early.items():
            self.same[name] += int((kept & ~(own if early else read)).sum())
        return kept


class Collector:
    """Computes the rows of a shard.

    Args:
        bridge: a BD3LM bridge.
        windows: the corpus.
        settings: settings of the harvest.
        sampler: how runs draw; None unless ``"on-policy"``.
        positions: largest number of positions in a pass.
    """

    def __init__(
        self,
        bridge: Bridge,
        windows: Windows,
        settings: HarvestSettings,
        sampler: Any,
        positions: int,
    ):
        self.bridge, self.windows, self.settings = bridge, windows, settings
        self.sampler, self.positions = sampler, positions
        config = bridge.original_model.config
        self.dual = config.cross_attn and settings.distribution != "clean-stream"
        self.sized = {"block_size": settings.block_size} if config.cross_attn else {}

    def collect(
        self, numbers: list[int], rows: Rows, shown: Shown, update: Callable[..., None]
    ) -> None:
        """Compute the rows of windows, and append them to ``rows``."""
        if self.settings.distribution == "on-policy":
            self._along_runs(numbers, rows, shown, update)
            return
        for members in passes_of(self.windows, numbers, self.positions):
            for draw in range(self.settings.draws):
                self._pass(members, draw, rows, shown)
            update(advance=len(members))

    def _pass(self, numbers: list[int], draw: int, rows: Rows, shown: Shown) -> None:
        """Run one pass over windows of one length."""
        settings, size = self.settings, self.settings.block_size
        x_0 = self.windows.stack(numbers)
        length = x_0.shape[1]
        noised = draw_masks(
            numbers, length, size, settings.distribution, (settings.t[0], settings.t[1]),
            settings.seed, draw,
        )  # fmt: skip
        x_t = torch.where(noised.masked, self.bridge.cfg.mask_token_id, x_0)
        kept = shown.keep(noised.rows, noised.masked, size)
        device = self.bridge.embed.weight.device
        options = {**self.sized, "clean": x_0.to(device)} if self.dual else self.sized
        flat = kept.flatten().nonzero()[:, 0]
        batch, position = kept.nonzero().unbind(-1)

        def put(name: str, activation: Tensor) -> None:
            rows.put(name, chosen(activation[:, :length].flatten(0, 1), flat))

        # Each activation becomes rows as soon as it is seen: all of a pass would take more memory
        # than the pass itself.
        activations_of(self.bridge, settings.names, x_t.to(device), put, **options)
        rows.add(
            {},
            token=x_t[kept],
            final=x_0[kept],
            position=position,
            t=noised.t[kept],
            masks_left=masks_left(noised.masked, size)[kept],
            masked=noised.masked[kept],
            document=torch.from_numpy(self.windows.document[numbers])[batch],
        )

    def _along_runs(
        self, numbers: list[int], rows: Rows, shown: Shown, update: Callable[..., None]
    ) -> None:
        """Denoise the continuation of each window's prompt, and keep every step's rows."""
        settings, bridge = self.settings, self.bridge
        prompts = []
        for number in numbers:
            (ids,) = self.windows.stack([number])
            prompts.append(ids[: settings.prompt])
        canvases = read_canvases(bridge, prompts, settings.new_tokens, settings.block_size, True)
        config = bridge.original_model.config
        cached = config.cross_attn and not config.time_conditioning
        cost = Cost(bridge, self.sampler or FirstHitting(), cached, hooked=True)
        for batch in batches_of(canvases, cost, settings.max_bytes / 4, True):
            members = [numbers[i] for i in batch.numbers]
            self._run([prompts[i] for i in batch.numbers], members, rows, shown)
            update(advance=len(members))

    def _run(self, prompts: list[Tensor], numbers: list[int], rows: Rows, shown: Shown) -> None:
        """Denoise prompts in one batch, and keep every step's rows."""
        settings, seen, at = self.settings, {}, []
        ends = torch.tensor([len(prompt) + settings.new_tokens for prompt in prompts])
        document = torch.from_numpy(self.windows.document[numbers])
        low, high = settings.t

        def keep(name: str) -> Callable[..., None]:
            def hook(activation: Tensor, hook: Any, step: Any) -> None:
                seen[name] = activation.detach()

            return hook

        def on_step(step: RevealedStep) -> None:
            start, end = step.window
            t = step.t.cpu().double()
            chosen_rows = step.masked.any(-1) & (low <= t) & (t <= high)
            inside = torch.arange(start, end) < ends[:, None]
            x_t = step.tokens[:, :end].cpu()
            masked = torch.zeros_like(x_t, dtype=torch.bool)
            masked[:, start:] = x_t[:, start:] == step.mask_id
            wanted = torch.zeros_like(masked)
            wanted[:, start:] = inside & chosen_rows[:, None]
            kept = shown.keep(wanted, masked, settings.block_size)[:, start:]
            row, offset = kept.nonzero().unbind(-1)
            flat = kept.flatten().nonzero()[:, 0]
            added = rows.add(
                {name: chosen(x.flatten(0, 1), flat) for name, x in seen.items()},
                token=x_t[:, start:][kept],
                final=torch.zeros(len(row)),
                position=start + offset,
                t=t[row],
                masks_left=step.masks_left[row],
                masked=masked[:, start:][kept],
                document=document[row],
            )
            at.append((added, row, start + offset))
            seen.clear()

        hooks = StepHooks()
        for name in settings.names:
            hooks.add(name, keep(name))
        run = denoise(
            self.bridge, prompts, max_new_tokens=settings.new_tokens, hooks=hooks,
            block_size=self.sized.get("block_size"), sampler=self.sampler,
            noise=Noise(settings.seed, rows=numbers), progress=False, on_step=on_step,
        )  # fmt: skip
        final = run.final.cpu()
        for added, row, position in at:
            rows.columns["final"][added] = final[row, position].int()


def chosen(x: Tensor, rows: Int[Tensor, " row"]) -> Tensor:
    """Return rows of ``[row, ...]`` as vectors ``[row, width]``, on the CPU."""
    return x.index_select(0, rows.to(x.device)).flatten(1).cpu()
