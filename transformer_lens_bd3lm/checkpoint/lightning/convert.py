"""Write a training checkpoint as a folder like the published ones.

Only what :mod:`.reader` reads of the file is used.

The tokenizer is the one that the vocabulary's size names, if it is in the Hub cache. Else it is the
file's own: a fast tokenizer pickles itself as its ``tokenizer.json``, which is data.

The optimizer's side of a checkpoint is not converted: training goes on with the code that wrote it.
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from transformer_lens_bd3lm.checkpoint.lightning.reader import Lightning, Progress, read_lightning
from transformer_lens_bd3lm.checkpoint.lightning.unpickle import Made, entry
from transformer_lens_bd3lm.checkpoint.new_folder import new_folder
from transformer_lens_bd3lm.checkpoint.tokenizer import known_tokenizer, teach_mask
from transformer_lens_bd3lm.checkpoint.tokenizer_rules import check_tokenizer
from transformer_lens_bd3lm.errors import CheckpointError, TokenizerError

ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
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
    progress: Progress | None = None,
) -> None:
    """Write a training checkpoint as a folder that ``boot_transformers(folder)`` boots.

    Args:
        path_or_repo: a ``.ckpt`` file, or the folder or Hub id that has it.
        folder: where to, a folder which must not exist yet.
        filename: its name in the folder or repository.
        weights: ``"ema"``, the moving average, which is what gets published; or ``"raw"``.
        revision: of the repository.
        tokenizer: the checkpoint's, where it is not to be found by itself.
        progress: called with the bytes read so far and those to be read.

    Raises:
        CheckpointError: if the file is not such a checkpoint, damaged, or hostile.
        TokenizerError: if its tokenizer is not to be found.
        InputError: if the folder exists, or ``weights`` is neither.
        OSError: if it cannot be written; nothing is left behind then.
    """
    path = locate(path_or_repo, filename, revision)
    with read_lightning(path, weights) as found, new_folder(Path(folder)) as draft:
        write_words(found, tokenizer, draft)
        rows = "\n".join(f"| {key} | `{inert(value)}` |" for key, value in found.facts.items())
        told = CARD.format(name=Path(folder).name, file=inert(path.name), rows=rows)
        (draft / "README.md").write_text(told, encoding="utf-8")
        save_torch_state_dict(found.state(progress), draft)


def locate(path_or_repo: str | Path, filename: str | None, revision: str | None = None) -> Path:
    """The file, downloaded if need be.

    Raises:
        CheckpointError: if there is none.
    """
    if filename is None and Path(path_or_repo).is_file():
        return Path(path_or_repo)
    if filename is None:
        raise CheckpointError(
            f"{path_or_repo} is no file: give one, or a folder or Hub id and the file's name in "
            'it, filename="run/best.ckpt"'
        )
    try:
        return Path(str(cached_file(os.fspath(path_or_repo), filename, revision=revision)))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{filename} of {path_or_repo} is not to be had: {str(error).splitlines()[0]}"
        ) from error


def write_words(found: Lightning, tokenizer: Any, folder: Path) -> None:
    """Write the config, and the tokenizer with its mask and BOS."""
    found.config.save_pretrained(folder)
    tokenizer = find_tokenizer(found) if tokenizer is None else tokenizer
    if tokenizer.bos_token is None and tokenizer.cls_token is not None:
        tokenizer.bos_token = tokenizer.cls_token
        tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    teach_mask(tokenizer, found.config.vocab_size)
    tokenizer.save_pretrained(folder)


def find_tokenizer(found: Lightning) -> PreTrainedTokenizerBase:
    """The tokenizer by the vocabulary's size, unless the file's own says that it is another.

    Raises:
        TokenizerError: if neither is there.
    """
    size = found.config.vocab_size
    own = pickled_tokenizer(found.tokenizer)
    if own is not None and len(own) + (own.mask_token is None) != size:
        own = None
    try:
        known = known_tokenizer(
            size, f"{found.archive.path} holds no fast tokenizer that can be used, and"
        )
    except TokenizerError:
        if own is None:
            raise
        return own
    return known if own is None or words(own) == words(known) else own


def words(tokenizer: Any) -> dict[str, int]:
    """The vocabulary, without what was added to it."""
    return tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)


def pickled_tokenizer(x: Any) -> PreTrainedTokenizerFast | None:
    """A fast tokenizer, from what its stand-in says it is; None for anything else."""
    try:
        return spelled_out(x.state)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic in Rust is no Exception
        return None


def spelled_out(state: Any) -> PreTrainedTokenizerFast:
    """A fast tokenizer from its state; whatever fails in it, fails here."""
    text = json_of(entry(state, "_tokenizer"))
    check_tokenizer(text, "the checkpoint")
    backend = Tokenizer.from_str(text)
    backend.no_padding()
    backend.no_truncation()
    backend.encode("a")
    named = entry(state, "_special_tokens_map", entry(state, "init_kwargs"))
    special = {role: content(entry(named, role)) for role in ROLES}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=entry(state, "clean_up_tokenization_spaces") is True,
        **{
            role: token for role, token in special.items() if backend.token_to_id(token) is not None
        },
    )


def json_of(x: Any) -> str:
    """The state of a pickled ``tokenizers.Tokenizer``: its JSON, as bytes."""
    raw = x.state
    # Protocol 2 has no bytes, and spells them as encode(text, "latin1").
    if isinstance(raw, Made) and raw.name == "_codecs.encode":
        raw = raw.args[0].encode("latin1")
    return raw.decode()


def content(x: Any) -> str:
    """A special token: its text, or an object that has it."""
    x = entry(x.state, "content") if isinstance(x, Made) else x
    return x if isinstance(x, str) else ""


def inert(text: str) -> str:
    """Text that stays in its cell, and in its quotes, in Markdown."""
    return text.replace("`", "'").replace("|", "\\|")
