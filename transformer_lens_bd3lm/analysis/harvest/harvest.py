"""``harvest``: activations of named hook points on disk, under a declared distribution of noise.

The corpus is cut into windows, the windows are put in a random order, and cut into shards
(``windows``). A shard is computed (``passes``) in memory (``rows``), its rows are put in a random
order, and it becomes one Arrow file (``folder``). The file depends on the corpus, the settings and
the shard's number alone. So processes that share the work, or a harvest that was stopped at any
moment and called again, write the same files to the bit; on the same hardware, with as many
threads.

Under ``accelerate launch`` process r of n computes every n-th shard that is left.

The distributions are in ``distributions``.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformer_lens_bd3lm.analysis.harvest.distributions import most_rows
from transformer_lens_bd3lm.analysis.harvest.folder import FinishedShard, HarvestFolder
from transformer_lens_bd3lm.analysis.harvest.passes import Collector, Shown, activations_of
from transformer_lens_bd3lm.analysis.harvest.result import Harvest
from transformer_lens_bd3lm.analysis.harvest.rows import Rows, bytes_a_row, features_of
from transformer_lens_bd3lm.analysis.harvest.settings import (
    HarvestSettings,
    read_harvest_settings,
    width_and_dtype,
)
from transformer_lens_bd3lm.analysis.harvest.windows import (
    Shard,
    Windows,
    cut_shards,
    read_windows,
)
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.made_with import identity_of
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus import read_texts
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import processes
from transformer_lens_bd3lm.model.config import trained_block_sizes
from transformer_lens_bd3lm.progress import progress_bar

# What a pass takes at most, for a position of one stream: vectors of d_model and of d_mlp.
_D_MODELS, _D_MLPS = 12, 3


def harvest(
    bridge: Bridge,
    corpus: Any,
    names: Any,
    *,
    distribution: str,
    out: str | Path,
    t: tuple[float, float] = (0, 1),
    block_size: int | str | None = None,
    draws: int = 1,
    valid: float = 0.1,
    seed: int = 0,
    max_texts: int | None = None,
    max_windows: int | None = None,
    prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    sampler: Any = None,
    rows: int = 2048,
    max_bytes: int | float = 2**30,
    field: str = "text",
    split: str | None = None,
    progress: bool | None = None,
) -> Harvest:
    """Write activations of named hook points to disk, as a shuffled dataset of ``datasets``.

    Call it again with the same arguments to go on with a harvest that was stopped: finished shards
    are kept. Where a process group exists, every process of it must call this.

    Args:
        bridge: a BD3LM bridge with a tokenizer, or a checkpoint's name, which is booted.
        corpus: the texts: a string, a ``Path``, ids ``[batch, pos]`` with BOS first, or an iterable
            of texts, such as a dataset. Each text is a document.
        names: hook points: a name, several of them, or a function of names. Each must have an axis
            ``pos`` and no keys; heads are put one after the other.
        distribution: ``"t-uniform"``, ``"nelbo-weighted"``, ``"on-policy"`` or ``"clean-stream"``;
            the formulas are in docs/harvest.md.
        out: path of a new folder, or of a harvest to go on with; or a URL that fsspec reads.
        t: interval that times are drawn from, or, on-policy, that steps are kept of.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        draws: number of times that each window gets new masks.
        valid: share of the documents whose rows are the validation part; 0 makes none.
        seed: random seed of masks, runs, split and order.
        max_texts: number of texts to read at most; all by default.
        max_windows: number of windows to draw from the corpus at most, from both parts in
            proportion; all by default.
        prompt_tokens: on-policy: tokens of each window that are the prompt, behind BOS; by default
            they fill half the context.
        max_new_tokens: on-policy: tokens that each run writes; by default the rest of the context.
        sampler: on-policy: first hitting by default.
        rows: largest number of positions of one stream in a pass, unless a window has more.
        max_bytes: most bytes of memory to take: a half for the rows of a shard, a quarter each for
            passes and for the corpus's ids. Not counted are the weights and the corpus's texts.
        field: key of the text in mappings and ``.jsonl`` lines.
        split: a regular expression; plain files are cut into texts before each match.
        progress: show a bar; by default on a terminal.

    Returns:
        What lies in the folder; ``result.dataset("train")`` opens it.

    Raises:
        InputError: for arguments that do not fit, a distribution that the checkpoint does not have,
            a budget that is too small, a folder of another harvest or in which one is running, a
            corpus that changed, and a disk that is full; finished shards stay.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        HookNameError: for a hook name that the bridge does not have, or that would never fire.
        NotExactError: in training mode with dropout; with time conditioning, unless on-policy.
    """
    bridge = read_bridge(bridge)
    settings = read_harvest_settings(
        bridge, names, distribution, t, block_size, prompt_tokens, max_new_tokens, sampler,
        seed=seed, draws=draws, valid=valid, max_texts=max_texts, max_windows=max_windows,
        rows=rows, max_bytes=max_bytes,
    )  # fmt: skip
    folder, state = HarvestFolder(out), processes()
    texts = read_texts(corpus, field, split)
    windows = read_windows(bridge, texts, max_texts, settings.max_bytes / 4)
    points = _points_of(bridge, windows, settings)
    empty = Rows(points, 0).activations
    shards = _plan(windows, settings, bytes_a_row(empty))
    trained = trained_block_sizes(bridge.original_model.config)
    identity = identity_of(bridge) | {
        "settings": asdict(settings),
        "corpus": windows.digest(),
        "shards": len(shards),
        "trained_at": [] if settings.block_size in trained else list(trained),
    }
    positions = _positions(bridge, windows, settings)
    collector = Collector(bridge, windows, settings, sampler, positions)
    with _named(folder, len(shards)), folder.held(state):
        folder.begin(identity, state)
        done = folder.finished()
        state.wait_for_everyone()
        left = [shard for shard in shards if shard.number not in done]
        total = sum(len(shard.windows) for shard in shards)
        own = left[state.process_index :: state.num_processes]
        wanted = progress if state.is_main_process else False
        with progress_bar("harvest", total, wanted) as update:
            update(advance=total - sum(len(shard.windows) for shard in own))
            for shard in own:
                folder.keep(_write(shard, collector, points, folder, update))
        state.wait_for_everyone()
        if state.is_main_process:
            finished = folder.finished()
            folder.finish([finished[shard.number] for shard in shards], features_of(empty))
        state.wait_for_everyone()
    return Harvest.load(out)


def _write(
    shard: Shard, collector: Collector, points: Any, folder: HarvestFolder, update: Any
) -> FinishedShard:
    """Compute a shard and write its file."""
    settings = collector.settings
    capacity = sum(_most_rows(collector.windows, number, settings) for number in shard.windows)
    rows, shown = Rows(points, capacity), Shown(settings.names)
    collector.collect(shard.windows, rows, shown, update)
    tables = rows.tables(
        [settings.seed, _ORDER, shard.number], settings.stream, settings.block_size,
        settings.max_bytes,
    )  # fmt: skip
    schema = features_of(rows.activations).arrow_schema
    checksum, size = folder.write_tables(shard.name, tables, schema)
    return FinishedShard(
        number=shard.number,
        part=shard.part,
        file=shard.name,
        xxh3_128=checksum,
        bytes=size,
        rows=rows.number,
        dropped=shown.dropped,
        same=shown.same,
        windows=len(shard.windows),
    )


_ORDER = 4  # sets the order of rows apart from other draws of the same seed


class _named:
    """Turn an error of the disk, or Ctrl-C, into one that says what is kept and how to go on."""

    def __init__(self, folder: HarvestFolder, shards: int):
        self.folder, self.shards = folder, shards

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Raise the error with its way out."""
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{self._kept()}; call it again to go on") from error
        if isinstance(error, OSError):
            why = error.strerror or str(error)
            raise InputError(
                f"out={self.folder.out} cannot be written: {why}. {self._kept()}; make room, and "
                "call it again with the same arguments to go on"
            ) from error

    def _kept(self) -> str:
        try:
            kept = len(self.folder.finished())
        except (OSError, InputError):
            kept = 0
        return f"{kept} of {self.shards} shards are finished and kept"


def _points_of(bridge: Bridge, windows: Windows, settings: HarvestSettings) -> Any:
    """Return width and dtype of each hook point, from a pass over two tokens."""
    ids = windows.stack([0])[:, :2].to(bridge.embed.weight.device)
    config = bridge.original_model.config
    options: dict[str, Any] = (
        {"clean": ids} if config.cross_attn and settings.stream == "noisy" else {}
    )
    seen = activations_of(bridge, settings.names, ids, **options)
    return {name: width_and_dtype(seen[name]) for name in settings.names}


def _most_rows(windows: Windows, number: int, settings: HarvestSettings) -> int:
    """Return the most rows that a window gives."""
    length = windows.length(number)
    prompt = min(settings.prompt, length)
    return most_rows(
        settings.distribution, length, settings.block_size, settings.draws, prompt,
        settings.new_tokens,
    )  # fmt: skip


def _plan(windows: Windows, settings: HarvestSettings, bytes_a_row: int) -> list[Shard]:
    """Cut the corpus into shards whose rows take half the budget at most.

    Raises:
        InputError: if one window takes more.
    """
    longest = max(range(len(windows)), key=windows.length)
    a_window = _most_rows(windows, longest, settings) * bytes_a_row
    at_once = int(settings.max_bytes / 2 // a_window)
    if not at_once:
        raise InputError(
            f"max_bytes={settings.max_bytes:,.0f}: the rows of one window take up to {a_window:,} "
            "bytes, more than half of it; raise max_bytes, or give fewer names or draws"
        )
    return cut_shards(windows, settings.valid, settings.seed, settings.max_windows, at_once)


def _positions(bridge: Bridge, windows: Windows, settings: HarvestSettings) -> int:
    """Return how many positions of one stream a pass may have.

    Raises:
        InputError: if a pass over one window takes more than a quarter of the budget.
    """
    cfg, size = bridge.cfg, max(bridge.embed.weight.dtype.itemsize, 4)
    layer = _D_MODELS * cfg.d_model + _D_MLPS * int(cfg.d_mlp or 4 * cfg.d_model)
    position = size * layer * (2 if settings.stream == "noisy" else 1)
    if any(name.startswith(("unembed", "hook_unembed")) for name in settings.names):
        position += 2 * size * cfg.d_vocab
    fitting = int(settings.max_bytes / 4 // position)
    longest = max(map(windows.length, range(len(windows))))
    if settings.distribution != "on-policy" and fitting < longest:
        raise InputError(
            f"max_bytes={settings.max_bytes:,.0f}: a pass over one window of {longest} positions "
            f"takes up to {longest * position:,} bytes, more than a quarter of it; raise max_bytes"
        )
    return min(settings.rows, fitting)
