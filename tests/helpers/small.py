"""Small random checkpoints that are not sure of themselves, and depend on all that they read.

The goldens' unembedding is so large that almost every draw is the same word. Here every weight
matters and no word is certain, so a wrong key, row or position changes what is written.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.model.config import BD3LMConfig

DEFAULTS: dict[str, Any] = {
    "block_size": 4,
    "model_length": 16,
    "vocab_size": 12,
    "hidden_dim": 16,
    "cond_dim": 6,
    "n_blocks": 2,
    "n_heads": 2,
    "dropout": 0.0,
    "attn_backend": "sdpa",
    "var_min": False,
    "architectures": ["BD3LM"],
    "return_dict": False,
    "dtype": "float32",
}


def model(seed: int = 0, **changes: Any) -> BD3LM:
    """Plain modules in eval mode, float32, every parameter random and none of them idle."""
    made = BD3LM(BD3LMConfig(**(DEFAULTS | changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("embedding"):
                p.copy_(noise)
            elif p.ndim == 2:
                p.copy_(noise / p.shape[1] ** 0.5)
            else:
                p.copy_(0.5 * noise)
    return made


def save(folder: Path, seed: int = 0, mask_id: int | None = None, **changes: Any) -> Path:
    """The same as a checkpoint's folder, with a tokenizer: BOS is 0, the mask the last id."""
    made = model(seed, **changes)
    made.save_pretrained(folder)
    size = made.config.vocab_size
    words = ["<bos>", *(f"w{i}" for i in range(1, size - 1))]
    words.insert(size - 1 if mask_id is None else mask_id, "[MASK]")
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<bos>",
        pad_token="<bos>",
        mask_token="[MASK]",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return folder


def prompt_of(batch: int, length: int, vocab_size: int = 12, seed: int = 0) -> Tensor:
    """Rows of BOS and random words, without masks."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab_size - 1, (batch, length), generator=generator)
    ids[:, 0] = 0
    return ids


def gpt2_like(folder, size=50257):
    """A repository with GPT-2's files: bytes, words that no text has, and the end of text last."""
    folder.mkdir()
    words = sorted(ByteLevel.alphabet())
    words += [f"unused{i}" for i in range(size - len(words) - 1)] + ["<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
    return folder
