"""``bd3lm info``: what a checkpoint is."""

from typing import Any

import typer

from bd3lm_cli.models import ModelName, not_loaded, resolve
from bd3lm_cli.options import Json, Model
from bd3lm_cli.output import write_json
from bd3lm_cli.terminal import console


def info(model: Model, json: Json = None) -> None:
    """Describe a checkpoint from its config and file headers; nothing is loaded, no code is run.

    Try: bd3lm info tiny
    """
    resolved = resolve(model)
    is_training = resolved.kind.startswith("training checkpoint")
    rows = _training_checkpoint(resolved) if is_training else _published(model, resolved)
    write_json(rows, json)
    if str(json) != "-":
        from transformer_lens_bd3lm.show.tables import new_table

        table = new_table(model, ("key", "value"), ("key", "value"), "")
        table.show_header = False
        for key, value in rows.items():
            table.add_row(key, value)
        console.print(table)


def _published(model: str, resolved: ModelName) -> dict[str, str]:
    """Describe a folder or Hub repository."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from transformer_lens_bd3lm.bridge.boot import DAMAGE
    from transformer_lens_bd3lm.checkpoint.weights import check_weights, weight_shapes
    from transformer_lens_bd3lm.errors import BD3LMError
    from transformer_lens_bd3lm.model.config import BD3LMConfig

    try:
        config = AutoConfig.from_pretrained(resolved.path)
    except BD3LMError:
        raise
    except DAMAGE as error:
        raise not_loaded(model, resolved, error) from error
    if not isinstance(config, BD3LMConfig):
        raise typer.BadParameter(f"{model} is a {config.model_type!r} checkpoint, not BD3LM")
    check_weights(resolved.path, config)
    shapes = weight_shapes(resolved.path)
    parameters = sum(
        torch.Size(shape).numel() for key, shape in shapes.items() if "inv_freq" not in key
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolved.path)
        mask = tokenizer.mask_token or "added when booted"
        described = f"{len(tokenizer)} tokens, mask {mask}"
    except BD3LMError as error:
        described = f"none: {error}"
    return _rows(resolved.kind, config, parameters, described)


def _training_checkpoint(resolved: ModelName) -> dict[str, str]:
    """Describe a training checkpoint."""
    from transformer_lens_bd3lm.checkpoint.lightning import find_checkpoint_file, read_lightning

    path, _, filename = resolved.path.partition("::")
    with read_lightning(find_checkpoint_file(path, filename or None), "ema") as checkpoint:
        parameters = sum(tensor.numel() for tensor in checkpoint.state().values())
        return _rows(resolved.kind, checkpoint.config, parameters, "found when it is booted")


def _rows(kind: str, config: Any, parameters: int, tokenizer: str) -> dict[str, str]:
    """Return what a config says, in words."""
    from transformer_lens_bd3lm.model.config import kind_of, trained_block_sizes

    return {
        "is": kind,
        "kind": kind_of(config),
        "parameters": f"{parameters / 1e6:.1f} M, names and shapes as the config calls for",
        "layers x heads x width": f"{config.n_blocks} x {config.n_heads} x {config.hidden_dim}",
        "context": f"{config.model_length} tokens",
        "block size": f"{config.block_size}, trained at "
        f"{', '.join(map(str, trained_block_sizes(config)))}; it can be set from 1 to "
        f"{config.model_length}"
        if config.cross_attn
        else "no blocks",
        "vocabulary": f"{config.vocab_size}",
        "tokenizer": tokenizer,
        "adaLN": f"yes, conditioning {config.cond_dim} wide" if config.adaln else "no",
        "sees t": "yes: no cache, nothing folds"
        if config.time_conditioning
        else "no: cached denoising is exact",
    }
