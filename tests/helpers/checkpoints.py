"""Training checkpoints as the public training code writes them, small or large, whole or spoilt."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from omegaconf import OmegaConf
from torch import Tensor

from tests.helpers import small
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM

REPOSITORY = "JianYu03/bd3lms-bd3lms-lm1b-dep-stanza"
PRETRAINED = "JianYu03/bd3lms-mdlm-lm1b-dep-stanza"
PAIR = tuple(
    f"bd3lm_block16_a{alpha}_normalized_dependency_reverseTrue/best.ckpt"
    for alpha in ("0.0", "0.0625")
)
# Of the pair, but for the width and the number of layers.
LM1B: dict[str, Any] = {
    "block_size": 16,
    "model_length": 128,
    "vocab_size": 30522,
    "hidden_dim": 8,
    "cond_dim": 4,
    "n_blocks": 2,
    "n_heads": 2,
    "dropout": 0.1,
    "var_min": True,
}
SMALL: dict[str, Any] = {"var_min": True, "dropout": 0.1, "vocab_size": 12}
MDLM = {"cross_attn": False, "var_min": False, "block_size": 1}
AUTOREGRESSIVE = MDLM | {"causal": True, "adaln": False}

Edit = Callable[[dict[str, Any]], Any]


class Tokenizer:
    """A slow tokenizer: an object of a class that nobody can import from elsewhere."""

    def __init__(self):
        self.words = {"to": 0, "be": 1}


def training_config(model: BD3LM, alpha: float = 0.0) -> dict[str, Any]:
    """The config that a training run of this model has."""
    c = model.config
    name = "bd3lm" if c.cross_attn else "ar" if c.causal else "mdlm"
    return {
        "mode": "train",
        "seed": 1,
        "block_size": c.block_size,
        "model": {
            "name": "small", "type": "ddit", "hidden_size": c.hidden_dim, "cond_dim": c.cond_dim,
            "length": c.model_length, "n_blocks": c.n_blocks, "n_heads": c.n_heads,
            "scale_by_sigma": True, "dropout": c.dropout, "tie_word_embeddings": False,
        },
        "algo": {
            "name": name, "backbone": "dit", "parameterization": "ar" if c.causal else "subs",
            "time_conditioning": c.time_conditioning, "T": 0, "causal_attention": c.causal,
            "ignore_bos": c.cross_attn, "cross_attn": c.cross_attn, "var_min": c.var_min,
            "clip_search_widths": [0.5, 0.6, 0.7, 0.8, 0.9],
        },
        "data": {"train": "lm1b", "tokenizer_name_or_path": "bert-base-uncased", "wrap": True},
        "masking": {"mix_alpha": alpha, "depth_mode": "dependency", "reverse": True},
        "training": {"ema": 0.9999, "from_pretrained": "${oc.env:HOME}/x.ckpt"},
    }  # fmt: skip


def moments(parameters: list[Tensor]) -> dict[str, Any]:
    """Adam's state."""
    state = {
        i: {"step": torch.tensor(3.0), "exp_avg": p.clone(), "exp_avg_sq": p.square()}
        for i, p in enumerate(parameters)
    }
    groups = [{"lr": 3e-4, "params": list(range(len(parameters)))}]
    return {"state": state, "param_groups": groups}


def checkpoint(
    raw: BD3LM, ema: BD3LM, *, alpha: float = 0.0, compiled: bool = True, tokenizer: Any = None
) -> dict[str, Any]:
    """What a training run saves that has come to these weights and this moving average."""
    inside = "backbone._orig_mod." if compiled else "backbone."
    clip = {name: x for name, x in raw.state_dict().items() if name.startswith("sampling")}
    state = {
        name.replace("backbone.", inside): x
        for name, x in raw.state_dict().items()
        if name not in clip
    }
    parameters = [p.detach() for p in raw.parameters()]
    return {
        "epoch": 3,
        "global_step": 150000,
        "pytorch-lightning_version": "2.5.0.post0",
        "state_dict": clip | state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(3.0)}},
        "optimizer_states": [moments(parameters)],
        "lr_schedulers": [{"last_epoch": 3}],
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "config": OmegaConf.create(training_config(raw, alpha)),
            "tokenizer": Tokenizer() if tokenizer is None else tokenizer,
        },
        "ema": {
            "decay": 0.9999,
            "num_updates": 150000,
            "shadow_params": [p.detach() for p in ema.parameters()],
        },
        "sampler": {"random_state": None},
    } | clip


def write(
    path: Path, seed: int = 0, edit: Edit | None = None, how: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[BD3LM, BD3LM]:  # fmt: skip
    """Write a checkpoint of random weights; the raw model, and that of the moving average.

    Args:
        path: the file; its folders are made.
        seed: of the weights.
        edit: changes what is saved, in place.
        how: keywords of :func:`checkpoint`.
        **changes: of the model's config.
    """
    raw, ema = (small.model(s, **(SMALL | changes)) for s in (seed, seed + 1))
    saved = checkpoint(raw, ema, **(how or {}))
    if edit is not None:
        edit(saved)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved, path)
    return raw, ema


def bert_like(folder: Path) -> Path:
    """A repository with BERT's files, whose mask token stands amid the vocabulary."""
    folder.mkdir()
    words = [f"[unused{i}]" for i in range(30522)]
    words[0] = "[PAD]"
    words[100:104] = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words[1000:1003] = ["to", "be", "or"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    return folder


def empty_cache(parent: Path, monkeypatch: Any) -> Path:
    """A Hub cache with nothing in it, for one test."""
    folder = parent / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


def put_in_cache(
    cache: Path, repository: str, files: Path, commit: str = "a" * 40, ref: str = "main"
) -> None:
    """Lay a folder's files out in the Hub's cache, as a download would have: links to blobs."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot, blobs, name = folder / "snapshots" / commit, folder / "blobs", folder / "refs" / ref
    blobs.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(p for p in files.rglob("*") if p.is_file())):
        blob = blobs / f"{commit}{number:024x}"
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(files)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    name.parent.mkdir(parents=True, exist_ok=True)
    name.write_text(commit)
