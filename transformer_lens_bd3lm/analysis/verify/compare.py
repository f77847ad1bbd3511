"""Whether a bridge is its checkpoint: every hook point, read and edited, beside the plain modules.

The plain modules, as ``AutoModelForMaskedLM`` loads them, are the reference. With a the bridge's
value at a hook point and a' theirs (see ``reference``), over random tokens half of which are
masked, in both views and at several block sizes::

    read       max |a - a'|                                  every hook point, on one forward
    logits     max |f(x) - f'(x)|                            without hooks
    gradient   max |df/da - df'/da'|                         of one random sum of the logits
    edit       max |f(x; a + d) - f'(x; a' + d)|             the same random d at both

Each may be at most a share of the reference's largest value, as large as rounding makes it. An edit
must also move the reference's logits by more than that: one that moves nothing verifies nothing,
and fails, unless all that it acts through is zero.

With processed weights most activations differ on purpose; compared is what stays the same: queries,
keys, scores, patterns (read only: with value biases folded, an edit means something else), neurons
and norms' scales, and the log-probabilities of real tokens at masked positions in place of the
logits. In half precision rounding drowns gradients and edits, and they are left out.

It does not say whether the plain modules are right: they are what a checkpoint is compared with.
Hook points behind a flag and the denoising loop's cache are not compared.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from transformer_lens_bd3lm.analysis.comparable import check_bridge
from transformer_lens_bd3lm.analysis.verify.arguments import (
    check_arguments,
    check_same_shape,
    load_plain_modules,
    read_allowed,
    read_length,
)
from transformer_lens_bd3lm.analysis.verify.pair import Pair
from transformer_lens_bd3lm.analysis.verify.passes import Pass, RandomText, draw_text, list_passes
from transformer_lens_bd3lm.analysis.verify.reference import counterparts
from transformer_lens_bd3lm.analysis.verify.report import Row, Verification
from transformer_lens_bd3lm.analysis.verify.transformer_lens import run_benchmark
from transformer_lens_bd3lm.bridge.boot import loading, path_of
from transformer_lens_bd3lm.bridge.distribution import masks_anywhere
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar

_SETTINGS = ("block_size", "causal", "time_conditioning")
_EDITED = 24  # positions of the texts of gradients and edits, at most


def verify(
    model: Any,
    against: Any = None,
    *,
    benchmark: bool = False,
    block_sizes: Any = (1, "full"),
    length: Any = None,
    seed: Any = 0,
    allowed: Any = None,
    dtype: Any = None,
    device: Any = None,
    trust_remote_code: bool = False,
    progress: bool | None = None,
) -> Verification:
    """Compare a bridge with the plain modules of a checkpoint, hook point by hook point.

    Args:
        model: a folder or Hub id to boot, or a bridge as it is now.
        against: the folder or Hub id whose plain modules are the reference; the model's own by
            default.
        benchmark: also run TransformerLens's own benchmark on the model's checkpoint.
        block_sizes: block sizes beside the checkpoint's own, in tokens or ``"full"``.
        length: tokens of the texts that are read; up to 160 by default. Gradients and edits see the
            first 24.
        seed: random seed of tokens, masks and edits.
        allowed: the largest difference, as a share of the reference's largest value; by default
            what rounding may make in this dtype.
        dtype: dtype to boot in, float32 by default; float64 tells rounding from error.
        device: device to boot on.
        trust_remote_code: boot the model with its repository's own modules, which runs its code.
            The reference never does.
        progress: show a progress bar; by default on a terminal.

    Raises:
        InputError: for arguments, devices or models that cannot be compared; nothing has been
            changed then.
        BlockSizeError: for a value in ``block_sizes`` that is not a block size of the checkpoint.
        CheckpointError: if a checkpoint cannot be loaded as it is.
        TokenizerError: if no tokenizer is found for a checkpoint that is booted.
        NotExactError: for a bridge in training mode with dropout.
    """
    if isinstance(model, str | Path):
        check_arguments(against, block_sizes, seed, dtype, device)
        with loading(str(model)):
            bridge: Any = TransformerBridge.boot_transformers(
                path_of(str(model)), device=device, dtype=dtype or torch.float32,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
    elif dtype is not None or device is not None or trust_remote_code or benchmark:
        raise InputError(
            "dtype, device, trust_remote_code and benchmark are for a checkpoint that is booted "
            "here: give its folder or Hub id, or the bridge alone"
        )
    else:
        check_arguments(against, block_sizes, seed)
        bridge = model
    check_bridge(bridge)
    path = str(bridge.cfg.model_name)
    reference = path if against is None else path_of(str(against))
    names = _short_name(path), _short_name(reference)
    revision = getattr(bridge.cfg, "revision", None) if against is None else None
    pair = _pair(bridge, reference, names, allowed, seed, revision)
    config = pair.plain.config
    length = read_length(length, config.model_length)
    text = draw_text(config, bridge.cfg.mask_token_id, length, seed, pair.plain.device)
    passes = list_passes(config, block_sizes)
    rows = list(compare_settings(bridge, pair.plain))
    left_out: list[str] = []
    bar = progress_bar("comparing", pair.count(passes), progress)
    with bar as update, masks_anywhere(bridge):
        for row in compare_passes(pair, passes, text, left_out):
            rows.append(row)
            update(advance=1)
    order = {each.name: i for i, each in enumerate(pair.counterparts)}
    order["logits"] = len(order)
    rows.sort(key=lambda row: order.get(row.name, -1))
    if benchmark:
        rows += run_benchmark(bridge, path, trust_remote_code)
    return Verification(
        *names, pair.dtype, str(pair.plain.device), bridge._weights_processed, pair.allowed,
        tuple(rows), tuple(left_out),
    )  # fmt: skip


def _short_name(path: str) -> str:
    """Return a Hub id, or the last part of a folder's path."""
    return Path(path).name if Path(path).is_dir() else path


def _pair(
    bridge: Bridge, path: str, names: tuple[str, str], allowed: Any, seed: int, revision: str | None
) -> Pair:
    """Put a checkpoint's plain modules beside a bridge, on its device and in its dtype.

    Raises:
        InputError: if the two cannot be compared.
        CheckpointError: if the checkpoint cannot be loaded as it is.
    """
    weight = bridge.embed.weight
    share = read_allowed(allowed, weight.dtype)
    plain = load_plain_modules(path, weight.dtype, weight.device, revision)
    check_same_shape(bridge.original_model.config, plain.config, names)
    compared = counterparts(plain.config.n_blocks, plain.config.adaln)
    if bridge._weights_processed:
        compared = [each for each in compared if lookup(each.name).survives_processing]
    return Pair(bridge, plain, compared, share, seed)


def compare_settings(bridge: Bridge, plain: Any) -> Iterator[Row]:
    """Compare the config's keys that decide mask and conditioning with the reference's."""
    config = bridge.original_model.config
    for key in _SETTINGS:
        if key == "block_size" and not config.cross_attn:
            continue
        own = bridge.cfg.block_size if key == "block_size" else getattr(config, key)
        wanted = getattr(plain.config, key)
        note = f"{own}, of the reference {wanted}"
        if key == "block_size" and own != config.block_size:
            note += f"; it was changed, bd3lm.set_block_size(bridge, {wanted}) sets it back"
        yield Row(key, "config", own == wanted, note="" if own == wanted else note)


def compare_passes(
    pair: Pair, passes: list[Pass], text: RandomText, left_out: list[str]
) -> Iterator[Row]:
    """Compare reads in every pass; if they agree gradients, and edits at the own block size.

    Args:
        pair: the bridge and the plain modules.
        passes: views and block sizes.
        text: the tokens that both read.
        left_out: a list to add to: what is not compared, and why.
    """
    if not pair.differentiable:
        left_out.append(f"gradients and edits, which in {pair.dtype} rounding would drown")
    few = text.start(min(_EDITED, text.x_t.shape[1]))
    for each in passes:
        reads = pair.read(each, text)
        yield from reads
        if pair.differentiable and not all(row.ok for row in reads):
            left_out.append(f"gradients and edits {each}, where reads differ already")
        elif pair.differentiable:
            yield from pair.differentiate(each, few)
            if each.given is None:
                yield from pair.edit(each, few)
