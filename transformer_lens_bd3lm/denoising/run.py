"""A finished denoising run: compact arrays, and the steps, text and caches that follow from them.

A step's canvas follows from the final one and from the step that revealed each position, so a run
keeps one number a position and one row a step, not a canvas a step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import ActivationCache

from transformer_lens_bd3lm.bridge.activation_cache import BD3LMActivationCache
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.masked_positions import Predicted
from transformer_lens_bd3lm.denoising.canvas import Canvas
from transformer_lens_bd3lm.denoising.made_with import MadeWith
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.request import Request
from transformer_lens_bd3lm.denoising.run_files import manifest_of, read_run, tensors_of
from transformer_lens_bd3lm.denoising.run_folder import write_folder
from transformer_lens_bd3lm.denoising.step import RevealedStep
from transformer_lens_bd3lm.denoising.timeline import Timeline
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import Result, brief, count, one_line, plain_values

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, repr=False)
class Run(Result):
    """A finished denoising run.

    Attributes:
        bridge: the model that wrote it.
        canvas: the prompts and masks that were filled in, and the grid of blocks.
        final: the finished canvas ``[batch, pos]``, to the end of the last block.
        ends: positions that each row keeps ``[batch]``: prompt and new tokens, fewer where a stop
            rule ended the row.
        timeline: when each step happened.
        activations: recorded activations ``[step, batch, block position, ...]`` by the name given
            in the record. Keys of a pattern that a step did not have yet are 0 (scores: -inf); keys
            count from the first position in view, which moves where text outgrows the context.
        recorded_steps: index of the step of each slice of ``activations``.
        sampler: the sampler, which chose the positions to reveal and drew their tokens.
        noise: the randomness of the run.
        kv_cache: whether finished blocks were stored; exact either way unless ``slid``.
        request: settings of the run; see :mod:`.request`.
        made_with: state of the bridge when the run was made; see :mod:`.made_with`.
        passes: number of passes of the network that it took; fewer than steps where one pass ran
            several (``lookahead``).
    """

    bridge: Bridge = field(repr=False)
    canvas: Canvas = field(repr=False)
    final: Int[Tensor, "batch total"] = field(repr=False)
    ends: Int[Tensor, " batch"]
    commit_step_all: Int[Tensor, "batch total"] = field(repr=False)
    log_p_all: Float[Tensor, "batch total"] = field(repr=False)
    lead_all: Float[Tensor, "batch total"] = field(repr=False)
    timeline: Timeline = field(repr=False)
    activations: dict[str, Tensor] = field(repr=False)
    recorded_steps: Sequence[int] = field(repr=False)
    sampler: Any
    noise: Noise
    kv_cache: bool
    request: Request = field(repr=False)
    made_with: MadeWith = field(repr=False)
    passes: int

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.canvas.block_size

    @property
    def slid(self) -> bool:
        """Whether text outgrew the context: then cached and uncached runs differ."""
        return self.canvas.reach is not None

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return int(self.ends.max())

    @property
    def kept(self) -> Bool[Tensor, "batch pos"]:
        """Positions that belong to each row's text, on the CPU; the rest of ``tokens`` is masks."""
        return torch.arange(self.length) < self.ends[:, None]

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """The finished ids, prompt included; the mask behind the end of a shorter row.

        The model may write the padding token, which other calls read as padding at a row's end:
        ``bridge(run.tokens, attention_mask=run.kept)`` reads it as text.
        """
        ids = self.final[:, : self.length]
        return ids.masked_fill(~self.kept.to(ids.device), self.canvas.mask_id)

    @property
    def text(self) -> list[str]:
        """The finished text, one string a row, special tokens kept; empty without a tokenizer."""
        if self.bridge.tokenizer is None:
            return []
        rows = zip(self.final.tolist(), self.ends.tolist(), strict=True)
        return [self.bridge.tokenizer.decode(ids[:end]) for ids, end in rows]

    @property
    def commit_step(self) -> Int[Tensor, "batch pos"]:
        """Index of the step that revealed each position; -1 where it was given, or never was."""
        return self.commit_step_all[:, : self.length].masked_fill(~self.kept, -1)

    @property
    def log_p(self) -> Float[Tensor, "batch pos"]:
        """Log-probability in nats of each written token when it was revealed; NaN elsewhere."""
        return self.log_p_all[:, : self.length].masked_fill(~self.kept, torch.nan)

    @property
    def lead(self) -> Float[Tensor, "batch pos"]:
        """By how much, in nats, each token's score beat the runner-up's; NaN where none was drawn.

        Two correct runs in float32 may part only where this is about as small as rounding.
        """
        return self.lead_all[:, : self.length].masked_fill(~self.kept, torch.nan)

    @property
    def steps(self) -> "Steps":
        """Every step, without logits, rebuilt from the step that revealed each position."""
        return Steps(self)

    def cache(self, step: int) -> ActivationCache:
        """Return the activations recorded at a step, as TransformerLens's own cache.

        Args:
            step: index of the step in the run.

        Raises:
            InputError: if that step was not recorded.
            NotExactError: if the bridge's weights have changed since, which the cache would use.
        """
        self.made_with.require_weights(self.bridge)
        if step not in self.recorded_steps:
            kept = list(self.recorded_steps)
            which = f"{kept[0]}..{kept[-1]} hold {len(kept)} recorded steps" if kept else "none was"
            raise InputError(f"step {step} was not recorded ({which}): record=Record(names)")
        slot = list(self.recorded_steps).index(step)
        number = self.timeline.index.index(step)
        window = self.timeline.window[number]
        offsets = list(range(window[1] - window[0]))
        keys = window[1] - self.canvas.first_visible(window[0])
        record = self.request.record
        if record is not None:
            offsets = record.offsets(len(offsets))
        rows = len(offsets)
        points = self.bridge.hook_dict
        activations = {}
        for name, stacked in self.activations.items():
            spec, x = lookup(name), stacked[slot]
            if spec.has_keys:
                x = x[:, :, :rows, :keys]
            elif spec.rows != "none":
                x = x[:, :rows]
            activations |= {alias: x for alias in points if points[alias] is points[name]}
        ids = self.steps[number].tokens
        positions = window[0] + torch.tensor(offsets, dtype=torch.long, device=ids.device)
        whole = record is None or record.positions is None
        predicted = Predicted(ids[:, positions] == self.canvas.mask_id, positions, whole)
        return BD3LMActivationCache(activations, self.bridge, predicted=predicted)

    def logit_lens(
        self, *, translate: Any = None, texts: Any = None, progress: bool | None = None
    ) -> Any:
        """Compute what each layer predicts at every step and masked position: the logit lens.

        Residuals are computed again, under the run's own hooks; nothing has to be recorded.

        Args:
            translate: translators, as of a tuned lens: a function of residuals ``[token, d_model]``
                for each depth but the last, or None for a depth that is left as it is.
            texts: number of each row's text ``[row]``, the unit of intervals; by default rows of
                one prompt are one text, and each row is one where the prompt is BOS alone.
            progress: show a progress bar; by default on a terminal.

        Returns:
            A ``bd3lm.results.RunLens``: by depth and prediction the final token's log-probability,
            the likeliest token, entropy, and KL to the last depth, in nats.

        Raises:
            InputError: for translators or texts that do not fit.
            NotExactError: where the bridge is no longer what the run was made with, a hook does
                not return what it returned in the run, or one edits the read-out.
        """
        return run_lens(self, translate=translate, texts=texts, progress=progress)

    def dataset(
        self, names: Any = (), *, max_bytes: int | float = 4 * 2**30, progress: bool | None = None
    ) -> "Dataset":
        """Return activations as rows of a Hugging Face dataset, one a position and step.

        Every position of the active block is a row at each step. Recorded activations are used if
        the run has them for every step, else they are computed again, under its own hooks.

        Args:
            names: a hook name, several, or a function of names: hook points with an axis of
                positions and without keys.
            max_bytes: most bytes that the activations may take.
            progress: show a progress bar; by default on a terminal.

        Returns:
            Columns ``row``, ``position``, ``block``, ``step`` (index in the run), ``t``,
            ``masks_left``, ``masked``, ``token`` (id before the step), ``final`` (id in the end),
            ``log_p`` (of the final token, in nats; NaN where not masked), and one for each name, in
            torch format, which reads floats as float32 (``.with_format("torch",
            dtype=torch.float64)`` reads wider ones); ``.to_pandas()`` makes a data frame.

        Raises:
            InputError: for names of other hook points, or more than ``max_bytes``.
            HookNameError: for a hook name that the bridge does not have.
            NotExactError: where the bridge is no longer what the run was made with.
        """
        return run_dataset(self, names, max_bytes=max_bytes, progress=progress)

    def beside_bridge(self) -> "Run":
        """Return the run with its canvas on the device that the bridge is on now."""
        device = self.bridge.embed.weight.device
        if self.final.device == device:
            return self
        finished = [replace(s, tokens=s.tokens.to(device)) for s in self.request.finished]
        return replace(
            self,
            canvas=replace(self.canvas, tokens=self.canvas.tokens.to(device)),
            final=self.final.to(device),
            request=replace(self.request, finished=finished),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the run as plain values for JSON: text, settings, and what each step did.

        ``tokens`` and the values of each position are lists by row, as long as the row. Recorded
        activations are left out.
        """
        positions = {
            "tokens": self.tokens,
            "commit_step": self.commit_step,
            "log_p_nats": self.log_p,
            "lead_nats": self.lead,
        }
        by_row = {
            name: [row[:end].tolist() for row, end in zip(x, self.ends.tolist(), strict=True)]
            for name, x in positions.items()
        }
        timeline = zip(*vars(self.timeline).values(), strict=True)
        values = {
            "text": self.text,
            "block_size": self.block_size,
            "sampler": repr(self.sampler),
            "noise_seed": self.noise.seed,
            "noise_rows": None if self.noise.rows is None else list(self.noise.rows),
            "kv_cache": self.kv_cache,
            "slid": self.slid,
            "passes": self.passes,
            "steps": [dict(zip(vars(self.timeline), step, strict=True)) for step in timeline],
        }
        return plain_values(values | by_row)

    def save(self, path: str | Path) -> None:
        """Write the run into a new folder, whole or not at all.

        Functions are not stored: hooks, and stop rules or samplers of the user's own. A replay
        is written as a run, without its base.

        Args:
            path: the folder, which must not exist yet.

        Raises:
            InputError: if the folder exists.
            NotExactError: if the bridge's weights have changed since: the file names them.
            OSError: if it cannot be written (a full disk, say); nothing is left behind then.
        """
        self.made_with.require_weights(self.bridge)
        write_folder(Path(path), manifest_of(self), tensors_of(self))

    @staticmethod
    def load(
        path: str | Path,
        bridge: Bridge,
        *,
        hooks: Any = None,
        stop: Any = None,
        sampler: Any = None,
    ) -> "Run":
        """Read a saved run back, for a bridge with the weights that wrote it.

        Args:
            path: the folder.
            bridge: the model, or its checkpoint's name; its weights must be those of the run, to
                the bit.
            hooks: the step hooks that the run was made with, if it is to be replayed or forked.
            stop: its stop rules, where they were functions.
            sampler: its sampler, where it was a class of the user's.

        Raises:
            InputError: for a folder that is no run, is damaged or edited, or belongs to other
                weights, and for hooks at other hook points or of other scopes than the run's.
            HookNameError: for a hook name that the bridge does not have.
        """
        return Run(**read_run(Path(path), bridge, hooks, stop, sampler))

    def _figures(self) -> str:
        written = int((self.commit_step >= 0).sum())
        known = is_dataclass(self.sampler) and not isinstance(self.sampler, type)
        sampler = brief(self.sampler) if known else type(self.sampler).__name__
        return (
            f"{count(len(self.ends), 'row')}, {count(written, 'token')} written in "
            f"{count(len(self.timeline.t), 'step')}, {count(self.passes, 'pass')}, "
            f"block_size={self.block_size}, {sampler}, seed {self.noise.seed}"
            f"{'' if self.kv_cache else ', no cache'}{', slid' * self.slid}"
        )

    def to_html(
        self,
        path: str | Path,
        *,
        other: "Run | None" = None,
        lens: bool | None = None,
        attention: bool | None = None,
        top: int = 5,
        progress: bool | None = None,
    ) -> Path:
        """Write the run as one HTML file that a browser opens without a network.

        The page shows the canvas at each step, what each layer predicts for a token before its
        reveal, where a head attends from it, entropy and lead, and the difference from another
        run. Predictions and attention are computed again, under the run's own hooks.

        Args:
            path: the file; one that exists is overwritten.
            other: a run of the same prompts to show beside it, as a replay; of a replay, by
                default its base.
            lens: keep predictions of each layer. By default at every step where they fit into the
                page, else at the step that reveals a token. False: the model's own alone, and none
                without attention either.
            attention: keep attention patterns, as ``lens``; by default they are left out where
                even those of the revealing steps do not fit. The page says what it holds.
            top: number of likeliest tokens to keep of each prediction.
            progress: show a progress bar; by default on a terminal.

        Returns:
            The path of the file.

        Raises:
            InputError: for another run that is not of the same prompts, a file that cannot be
                written, attention that does not fit, and a run from a file that does not hold its
                hooks.
            NotExactError: where the bridge is no longer what the run was made with, a hook does
                not return what it returned in the run, or one edits the read-out.
        """
        return run_page(
            self, path, other=other, lens=lens, attention=attention, top=top, progress=progress
        )


@singledispatch
def run_lens(run: Any, **options: Any) -> Any:
    """Compute the logit lens over a run; ``analysis.over_run`` registers the function."""
    raise InputError(f"run is {type(run).__name__}: give a Run, as denoise returns it")


@singledispatch
def run_page(run: Any, path: Any, **options: Any) -> Path:
    """Write a run as an HTML file; ``show`` registers the function."""
    raise InputError(f"run is {type(run).__name__}: give a Run, as denoise returns it")


@singledispatch
def run_dataset(run: Any, names: Any, **options: Any) -> Any:
    """Return a run's activations as a dataset; ``denoising.dataset`` registers the function."""
    raise InputError(f"run is {type(run).__name__}: give a Run, as denoise returns it")


@dataclass(frozen=True)
class Steps(Sequence[RevealedStep]):
    """A run's steps, each rebuilt when it is read."""

    run: Run

    def __repr__(self) -> str:
        return one_line(f"Steps({count(len(self), 'step')} of {self.run!r})")

    def __len__(self) -> int:
        return len(self.run.timeline.t)

    @overload
    def __getitem__(self, index: int) -> RevealedStep: ...
    @overload
    def __getitem__(self, index: slice) -> list[RevealedStep]: ...
    def __getitem__(self, index: int | slice) -> RevealedStep | list[RevealedStep]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        run, timeline = self.run, self.run.timeline
        i = range(len(self))[index]
        number, window = timeline.index[i], timeline.window[i]
        reveal_step, part = run.commit_step_all, slice(*window)
        revealed = reveal_step[:, part] == number
        return RevealedStep(
            index=number,
            block=timeline.block[i],
            step=timeline.step[i],
            window=window,
            t=timeline.t[i],
            masked=reveal_step[:, part] >= number,
            tokens=self.canvas_before(number),
            mask_id=run.canvas.mask_id,
            after=self.canvas_before(number + 1),
            revealed=revealed,
            log_p=run.log_p_all[:, part].masked_fill(~revealed, torch.nan),
            lead=run.lead_all[:, part].masked_fill(~revealed, torch.nan),
        )

    def __iter__(self) -> Iterator[RevealedStep]:
        return (self[i] for i in range(len(self)))

    def canvas_before(self, index: int) -> Int[Tensor, "batch pos"]:
        """Return the canvas with everything that was revealed before a step of this index."""
        run = self.run
        later = (run.commit_step_all >= index).to(run.final.device)
        return run.final.masked_fill(later, run.canvas.mask_id)
