"""Conversion of a training checkpoint into a folder like the published ones.

Config, weights and tokenizer are converted; optimizer states are not. To go on with a training run,
use the code that wrote it.
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from transformers.utils.hub import cached_file

from transformer_lens_bd3lm.checkpoint.lightning.reader import (
    ByteProgress,
    LightningCheckpoint,
    read_lightning,
)
from transformer_lens_bd3lm.checkpoint.lightning.tokenizer import find_tokenizer
from transformer_lens_bd3lm.checkpoint.new_folder import new_folder
from transformer_lens_bd3lm.checkpoint.tokenizer import teach_mask
from transformer_lens_bd3lm.errors import CheckpointError

CARD = """---
library_name: transformers
tags: [bd3lm, block-diffusion, transformer-lens]
---

# {name}

A BD3LM (Arriola et al., ICLR 2025), converted from the PyTorch Lightning training checkpoint
`{file}` by transformer_lens_bd3lm.

```python
from transformer_lens.model_bridge import TransformerBridge
import transformer_lens_bd3lm as bd3lm

bridge = TransformerBridge.boot_transformers("{name}")
```

| of the training run | |
|---|---|
{rows}

The licence is that of the training checkpoint.
"""


def convert_lightning(
    path_or_repo: str | Path,
    folder: str | Path,
    filename: str | None = None,
    weights: str = "ema",
    *,
    revision: str | None = None,
    tokenizer: Any = None,
    progress: ByteProgress | None = None,
) -> None:
    """Convert a PyTorch Lightning training checkpoint into a folder that boots.

    ``TransformerBridge.boot_transformers(folder)`` boots the folder. It holds a config, weights,
    the tokenizer and a model card with facts about the training run. Nothing in the file is run.

    Args:
        path_or_repo: a ``.ckpt`` file, or the folder or Hub id that has it.
        folder: path of the new folder, which must not exist.
        filename: name of the file in the folder or repository.
        weights: ``"ema"``, the moving average, which is what gets published; or ``"raw"``.
        revision: revision of the repository; the newest by default.
        tokenizer: tokenizer of the checkpoint. By default it is the public one with a vocabulary of
            the checkpoint's size, from the Hub cache; or the one pickled in the file, if that is a
            fast tokenizer and has another vocabulary, or no public one is found.
        progress: function that is called with the bytes read so far and the bytes in all.

    Raises:
        CheckpointError: if the file does not exist, is not a training checkpoint of BD3LM, is
            damaged, or names something that would run code.
        TokenizerError: if no tokenizer is found, or it does not fit the vocabulary.
        InputError: if the folder exists, or ``weights`` is neither ``"ema"`` nor ``"raw"``.
        OSError: if the folder cannot be written; nothing is left behind then.
    """
    path = find_checkpoint_file(path_or_repo, filename, revision)
    with read_lightning(path, weights) as checkpoint, new_folder(Path(folder)) as draft:
        write_config_and_tokenizer(checkpoint, tokenizer, draft)
        facts = checkpoint.facts.items()
        rows = "\n".join(f"| {key} | `{_in_cell(value)}` |" for key, value in facts)
        card = CARD.format(name=Path(folder).name, file=_in_cell(path.name), rows=rows)
        (draft / "README.md").write_text(card, encoding="utf-8")
        save_torch_state_dict(checkpoint.state(progress), draft)


def find_checkpoint_file(
    path_or_repo: str | Path, filename: str | None, revision: str | None = None
) -> Path:
    """Return the path of a ``.ckpt`` file, downloaded if it is on the Hub.

    Raises:
        CheckpointError: if it does not exist.
    """
    if filename is None and Path(path_or_repo).is_file():
        return Path(path_or_repo)
    if filename is None:
        raise CheckpointError(
            f"{path_or_repo} is no file: give a file, or a folder or Hub id and the file's name in "
            'it, filename="run/best.ckpt"'
        )
    try:
        return Path(str(cached_file(os.fspath(path_or_repo), filename, revision=revision)))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{filename} of {path_or_repo} was not found: {str(error).splitlines()[0]}"
        ) from error


def write_config_and_tokenizer(
    checkpoint: LightningCheckpoint, tokenizer: Any, folder: Path
) -> None:
    """Write the config, and the tokenizer with its mask and BOS, into a folder.

    Raises:
        TokenizerError: if no tokenizer is found, or it does not fit the vocabulary.
    """
    checkpoint.config.save_pretrained(folder)
    tokenizer = find_tokenizer(checkpoint) if tokenizer is None else tokenizer
    if tokenizer.bos_token is None and tokenizer.cls_token is not None:
        tokenizer.bos_token = tokenizer.cls_token
        tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    teach_mask(tokenizer, checkpoint.config.vocab_size)
    tokenizer.save_pretrained(folder)


def _in_cell(text: str) -> str:
    """Return text that stays in its table cell, and in its quotes, in Markdown."""
    return text.replace("`", "'").replace("|", "\\|")
