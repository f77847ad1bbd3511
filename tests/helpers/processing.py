"""Bridges with processed weights and without, and passes over both views of them."""

import functools

import torch

from tests.helpers import small
from tests.helpers.passes import boot, shared

OPTIONS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
NONE = dict.fromkeys(OPTIONS, False)


def streams(bridge, batch=2, length=16):
    """A clean text and a noisy one, half of it masked, and the end, 1 to 4 and 6 in any case."""
    length = min(length, bridge.cfg.n_ctx)
    clean = small.prompt_of(batch, length, bridge.cfg.mask_token_id + 1).to(bridge.cfg.device)
    generator = torch.Generator().manual_seed(1)
    masked = (torch.rand(clean.shape, generator=generator) < 0.5).to(clean.device)
    masked[:, [i for i in (1, 2, 3, 4, 6, -1) if i < length]] = True
    masked[:, 0] = False
    return torch.where(masked, bridge.cfg.mask_token_id, clean), clean


LENGTH = 8


@functools.cache
def processed(path, device, **options):
    """A processed bridge in float64, left as it is found."""
    bridge = boot(path, device, torch.float64)
    bridge.enable_compatibility_mode(**options)
    return bridge


@functools.cache
def plain(path, device):
    return shared(path, device, torch.float64)


def sigma_of(bridge):
    return {"timesteps": 0.7} if bridge.cfg.time_conditioning else {}


@torch.no_grad()
def run(bridge, view, **kwargs):
    """Logits, and a cache as it comes: of a dual pass with all 2n positions."""
    x_t, clean = streams(bridge, length=LENGTH)
    if view == "dual":
        kwargs["clean"] = clean
    return bridge.run_with_cache(x_t, **sigma_of(bridge), **kwargs)


def views_of(bridge):
    return ("sampling", "dual") if bridge.cfg.cross_attn else ("sampling",)


def real_tokens(bridge, seed=0):
    """A token that can be predicted for every position ``[batch, pos]``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, bridge.cfg.d_vocab - 1, (2, LENGTH), generator=generator)
    return (ids + (ids >= bridge.cfg.mask_token_id)).to(bridge.cfg.device)


def at(ids, logits):
    return logits.gather(-1, ids[..., None])[..., 0]
