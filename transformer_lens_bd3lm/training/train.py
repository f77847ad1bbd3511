"""A small model trained from scratch on a text of one's own, as a checkpoint that boots.

One text is enough: its last tenth is for validation (see ``own_text``). The defaults are chosen for
100 kB of text and five minutes of a laptop. A stopped training goes on with the same call in the
same folder, and ends with the same weights as one that was not stopped.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from transformer_lens_bd3lm.checks import check_int, check_number, is_int, read_several
from transformer_lens_bd3lm.errors import BlockSizeError, InputError
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.training.baselines import bigram_nats, unigram_nats
from transformer_lens_bd3lm.training.budget import steps_in, threads_of
from transformer_lens_bd3lm.training.data import even_windows, text_windows, train_tokenizer
from transformer_lens_bd3lm.training.folder import (
    begin_folder,
    begun_values,
    held_alone,
    read_begun,
    sha256_of,
)
from transformer_lens_bd3lm.training.own_text import TextPart, read_text, split_text, tokenize
from transformer_lens_bd3lm.training.precision import training_dtype
from transformer_lens_bd3lm.training.recipe import Recipe
from transformer_lens_bd3lm.training.train_recipe import continue_run
from transformer_lens_bd3lm.training.training import Training
from transformer_lens_bd3lm.training.training_run import TrainingRun

_MINUTES = 5.0
_MOST = 2**31 - 1
_ALPHABET = 258  # 256 bytes, BOS and the mask


def train(
    text: str | Path,
    out: str | Path,
    *,
    validation: str | Path | None = None,
    d_model: int = 64,
    n_layers: int = 3,
    n_heads: int = 4,
    vocab_size: int = 512,
    context: int = 128,
    block_sizes: Sequence[int | str] = (1, 2, 4, 8, 16),
    steps: int | None = None,
    minutes: float | None = None,
    batch_size: int = 8,
    learning_rate: float = 4e-3,
    dropout: float = 0.1,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    progress: bool | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
) -> Training:
    """Train a small model from scratch on a text; a stopped training goes on in its folder.

    The folder is a checkpoint at the end: ``TransformerBridge.boot_transformers(out)``. Ctrl-C and
    SIGTERM stop after the current step and save; the same call then goes on, to the same weights.

    Args:
        text: text to train on, or ``Path`` of a UTF-8 file. The more the better; 100 kB is enough
            for words and lines that look like the text.
        out: folder of the training and of the checkpoint, new or of a training begun before.
        validation: text to validate on, or its ``Path``; by default the last tenth of ``text``.
        d_model: width of the residual stream.
        n_layers: layers.
        n_heads: heads; ``d_model / n_heads`` is the even width of a head.
        vocab_size: tokens of the vocabulary, BOS and the mask included; a byte-level BPE of that
            size is trained on the training text.
        context: tokens of a row, BOS included.
        block_sizes: block sizes in tokens, or ``"full"``, one of which is drawn in each step; each
            divides ``context``.
        steps: number of optimizer steps.
        minutes: time to train, instead of ``steps``; 5 if neither is given. It is turned into a
            number of steps by timing a few, before the training.
        batch_size: rows a step.
        learning_rate: peak of the learning rate: linear warm-up, then a cosine to zero.
        dropout: probability with which an entry of a residual write is dropped.
        seed: random seed of weights, rows, masks and dropout.
        device: device that trains; CUDA where it is, else the CPU.
        dtype: ``"float32"`` or ``"bfloat16"``, the precision of the forward pass; by default
            bfloat16 where the device has instructions for it. A resumed training keeps the first.
        progress: whether a progress bar is shown; by default on a terminal and in a notebook.
        report: function called with each point of the learning curve, as in ``result.reports``.

    Raises:
        InputError: for a value outside its range, a text that is too short or cannot be read, a
            folder that was begun with something else, or one in which another process trains. No
            folder is made then.
        KeyboardInterrupt: after a stop by Ctrl-C or SIGTERM; the state is saved.
    """
    out = Path(out)
    sizes = _check_shape(d_model, n_layers, n_heads, vocab_size, context, block_sizes)
    _check_numbers(batch_size, learning_rate, dropout, seed, steps, minutes)
    whole = read_text("text", text)
    parts = split_text(whole)
    if validation is not None:
        parts = whole, read_text("validation", validation)
    check_folder(out)
    begun = begun_values(out)
    chosen = read_device(begun.get("device") if device is None else device)
    dtype = training_dtype(begun.get("dtype") if dtype is None else dtype, chosen)
    settings: dict[str, Any] = {
        "d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "vocab_size": vocab_size,
        "context": context, "block_sizes": list(sizes), "batch_size": batch_size,
        "learning_rate": learning_rate, "dropout": dropout, "seed": seed, "device": chosen.type,
        "dtype": dtype, "threads": begun.get("threads", torch.get_num_threads()),
    }  # fmt: skip
    settings |= _budget(steps, minutes, begun)
    hashes = {
        f"{kind} text": sha256_of(part.encode())
        for kind, part in zip(("training", "validation"), parts, strict=True)
    }
    tokenizer = read_begun(out, settings | hashes)
    tokenizer = train_tokenizer(parts[0], vocab_size) if tokenizer is None else tokenizer
    training, valid = tokenize(tokenizer, parts, context)
    draw = text_windows(training.ids, context)
    with torch.random.fork_rng(devices=[chosen] if chosen.type == "cuda" else []):
        if settings["steps"] is None:
            with progress_bar("timing a few steps", None, progress):
                fitting = steps_in(settings["minutes"], _recipe(settings, 1), draw, chosen)
            settings["steps"], settings["threads"] = fitting
        with held_alone(out), threads_of(settings["threads"]):
            if read_begun(out, settings | hashes) is None:  # another may have begun it meanwhile
                begin_folder(out, settings | hashes, tokenizer)
            run = TrainingRun(_recipe(settings, settings["steps"]), chosen)
            _continue(run, training, valid, out, progress, report)
    return _result(out, run, settings, training, valid)


def _continue(
    run: TrainingRun,
    training: TextPart,
    valid: TextPart,
    out: Path,
    progress: bool | None,
    report: Callable[[dict[str, float]], None] | None,
) -> None:
    """Train to the end, with a progress bar that says the loss."""
    recipe, name = run.recipe, "bfloat16" if run.recipe.autocast else "float32"
    draw = text_windows(training.ids, recipe.context)
    laid = even_windows(valid.ids, recipe.context)
    sizes = sorted(set(recipe.block_sizes))
    with progress_bar(f"training in {name}", recipe.steps, progress) as update:

        def moved(step: int, loss: float) -> None:
            label = f"training in {name}, {training.bits_per_character(loss):.2f} bits/char"
            update(completed=step, description=label)

        interval = max(1, recipe.steps // 40)
        for each in continue_run(run, draw, laid, out, interval, sizes, moved):
            if report is not None:
                report(_in_bits(each, training, valid))


def _in_bits(report: dict[str, float], training: TextPart, valid: TextPart) -> dict[str, float]:
    """Return a report with its losses in bits per character in place of nats per token."""
    in_bits = {"step": report["step"], "loss": training.bits_per_character(report["loss"])}
    return in_bits | {
        name: valid.bits_per_character(nats)
        for name, nats in report.items()
        if name.startswith("valid")
    }


def _result(
    out: Path, run: TrainingRun, settings: dict[str, Any], training: TextPart, valid: TextPart
) -> Training:
    """Gather the result of a finished run."""
    reports = [_in_bits(report, training, valid) for report in run.reports]
    counted = training.ids, valid.ids, settings["vocab_size"]
    sizes = sorted(set(settings["block_sizes"]))
    return Training(
        path=out,
        parameters=sum(p.numel() for p in run.model.parameters()),
        settings=settings,
        tokens={part.kind: len(part.ids) for part in (training, valid)},
        bits_per_character={size: reports[-1][f"valid_{size}"] for size in sizes},
        unigram=valid.bits_per_character(unigram_nats(*counted)),
        bigram=valid.bits_per_character(bigram_nats(*counted)),
        reports=reports,
    )


def _recipe(settings: dict[str, Any], steps: int) -> Recipe:
    """Return the recipe of the settings, with what is not an argument of ``train``."""
    sizes = settings["block_sizes"]
    return Recipe(
        vocab_size=settings["vocab_size"], context=settings["context"],
        block_sizes=tuple(sizes), hidden_dim=settings["d_model"], n_blocks=settings["n_layers"],
        n_heads=settings["n_heads"], cond_dim=8, dropout=settings["dropout"], steps=steps,
        schedule=steps, batch=settings["batch_size"], learning_rate=settings["learning_rate"],
        warmup=max(1, min(100, steps // 10)), weight_decay=0.05, ema=0.995,
        autocast=settings["dtype"] == "bfloat16", seed=settings["seed"],
        block_size=4 if 4 in sizes else sorted(set(sizes))[len(set(sizes)) // 2],
    )  # fmt: skip


def _check_shape(
    d_model: Any, n_layers: Any, n_heads: Any, vocab_size: Any, context: Any, block_sizes: Any
) -> tuple[int, ...]:
    """Check the shape of the model, and return its block sizes in tokens."""
    check_int("n_layers", n_layers, 1, 1000)
    check_int("n_heads", n_heads, 1, 1000)
    check_int("d_model", d_model, 2, 2**16)
    if d_model % (2 * n_heads):
        raise InputError(
            f"d_model={d_model}: with n_heads={n_heads} heads would not have an even width: give "
            f"a multiple of {2 * n_heads}"
        )
    rule = f"give an int >= {_ALPHABET}: the 256 bytes, BOS and the mask are always tokens"
    check_int("vocab_size", vocab_size, _ALPHABET, _MOST, rule=rule)
    check_int("context", context, 4, 2**20)
    rule = 'give a list of ints that divide the context, or "full"'
    given = [block_sizes] if is_int(block_sizes) or block_sizes == "full" else block_sizes
    sizes = [
        context if size == "full" else size for size in read_several("block_sizes", given, rule)
    ]
    if not sizes:
        raise BlockSizeError(f"block_sizes={block_sizes!r}: {rule}")
    for size in sizes:
        if not is_int(size) or not 1 <= size <= context or context % size:
            raise BlockSizeError(f"block_sizes={block_sizes!r}: {size!r}: {rule} ({context})")
    return tuple(sizes)


def _check_numbers(
    batch_size: Any, learning_rate: Any, dropout: Any, seed: Any, steps: Any, minutes: Any
) -> None:
    check_int("batch_size", batch_size, 1, 2**20)
    check_number("learning_rate", learning_rate, 1e-12, 1, "give a number in (0, 1], as 0.004")
    check_number("dropout", dropout, 0, 0.999, "give a number in [0, 1)")
    check_int("seed", seed, 0, 2**40)
    if steps is not None and minutes is not None:
        raise InputError(f"steps={steps!r} and minutes={minutes!r}: give one of the two")
    if steps is not None:
        check_int("steps", steps, 1, _MOST)
    if minutes is not None:
        check_number("minutes", minutes, 1e-3, 1e6, "give a number of minutes > 0")


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be made or written, before the work."""
    try:
        above = next((path for path in (out, *out.absolute().parents) if path.exists()), None)
    except OSError as error:  # a name that is too long, for example
        raise InputError(f"out={str(out)!r} cannot be written: {error.strerror}") from error
    open_ = above is not None and above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    if not open_ or "\0" in str(out):
        raise InputError(f"out={str(out)!r} cannot be written: give a folder, new or begun before")


def read_device(device: Any) -> torch.device:
    """Return the device that trains, after making a number on it."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"device={device!r} cannot be used: {why}; give cpu or cuda") from error


def _budget(steps: int | None, minutes: float | None, begun: dict[str, Any]) -> dict[str, Any]:
    """Return the number of steps and the minutes asked for, as far as they are known.

    A training that was begun has its number of steps, which is the answer to the same minutes.
    """
    if steps is None:
        return {"steps": begun.get("steps"), "minutes": _MINUTES if minutes is None else minutes}
    return {
        "steps": steps,
        "minutes": begun.get("minutes") if begun.get("steps") == steps else None,
    }
