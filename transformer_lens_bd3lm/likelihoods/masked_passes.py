"""Log-probabilities of finished texts under given mask patterns, sharing one clean pass.

In the dual view ``[noisy | clean]`` the clean stream never reads the noisy one. So the clean
stream's keys and values are computed once a text, and any number of mask patterns run as batches of
noisy streams over them: half the rows of a dual pass, and only masked positions are unembedded.

The baselines have one stream, which hooks see whole, whatever their scope. For full diffusion the
text is one block, with nothing before it. For the autoregressive model every token is a block, and
a token is predicted one position before it.

It needs the conditioning c to be constant. It does not choose the mask patterns, nor sum over them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.casts import frequencies
from transformer_lens_bd3lm.bridge.forward import run, through_layers
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.kv_cache import CleanStream
from transformer_lens_bd3lm.bridge.routing import Routing
from transformer_lens_bd3lm.bridge.texts import read_ids, refuse_path
from transformer_lens_bd3lm.checks import check_finished
from transformer_lens_bd3lm.denoising.pass_hooks import PassHooks, read_pass_hooks
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.model.config import trained_block_sizes
from transformer_lens_bd3lm.model.inputs import View
from transformer_lens_bd3lm.model.modules import at_least_float32
from transformer_lens_bd3lm.model.subs import masked_log_probs

CHUNK = 256  # rows whose log-softmax is in memory at once


@dataclass(frozen=True)
class MaskedPasses:
    """Passes over finished texts of one length, under mask patterns.

    Attributes:
        bridge: a BD3LM bridge.
        tokens: the texts ``[batch, pos]``.
        block_size: tokens per block, at most the length of the texts.
        trained_at: block sizes that the checkpoint was trained at, if the one asked for is none of
            them; else empty.
        hooks: hooks on the noisy stream; some also on the clean one, whose keys and values later
            blocks read.
        rows: largest number of positions of a pass, unless one mask pattern has more.
        given: number of leading positions that are never masked and not counted; 1 is BOS alone.
        characters: characters of each text, if they were given as strings and count whole.
    """

    bridge: Bridge
    tokens: Int[Tensor, "batch pos"]
    block_size: int
    trained_at: tuple[int, ...]
    hooks: PassHooks
    rows: int
    given: int = 1
    characters: tuple[int, ...] | None = None

    @property
    def counted(self) -> Bool[Tensor, "batch pos"]:
        """Which positions may be masked, on the CPU: all but those given."""
        batch, n = self.tokens.shape
        return (torch.arange(n) >= self.given).expand(batch, n)

    @property
    def patterns_per_pass(self) -> int:
        """Number of mask patterns that run in one pass."""
        return max(self.rows // self.tokens.numel(), 1)

    def sigma(self, x: Tensor) -> Float[Tensor, " batch"]:
        """Return sigma of each row: zeros, since the network does not see t."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.zeros(len(x), device=x.device, dtype=wide)

    def clean_stream(self) -> CleanStream:
        """Return the keys and values of the clean stream, from one pass without a read-out."""
        model, stream = self.bridge.original_model, CleanStream()
        view = View(self.tokens, self.tokens.shape[1], self.block_size, "block", dual=False)
        with self.hooks.on_clean():
            x = model.backbone.vocab_embed(self.tokens)
            routing = Routing.of_view(view, frequencies(model, x.device), x.dtype)
            routing.cache = stream
            through_layers(model, x, self.sigma(x), routing, slice(0, 1))
        return stream

    def logits(
        self, stream: CleanStream, ids: Int[Tensor, "row pos"], where: Int[Tensor, "token 2"]
    ) -> Float[Tensor, "token d_vocab"]:
        """Return raw logits at pairs of (row, position), which are masked in their row."""
        model, n = self.bridge.original_model, ids.shape[1]
        noised = ids.index_put(where.unbind(-1), where.new_tensor(self.bridge.cfg.mask_token_id))
        x = model.backbone.vocab_embed(noised)
        beside = stream.beside(len(ids) // len(self.tokens))
        routing = Routing.of_noisy(n, self.block_size, beside, frequencies(model, x.device), x)
        return run(model, x, self.sigma(x), routing, slice(0, n), where)

    def log_probs(
        self, stream: CleanStream, masked: Bool[Tensor, "pattern batch pos"]
    ) -> Float[Tensor, "pattern batch pos"]:
        """Compute ``log p`` of the true token at each masked position, nats; 0 elsewhere; one pass.

        Returned in float64 on the CPU, from a log-softmax in float32 or wider.

        Raises:
            NotExactError: if one is NaN, because activations overflow or a hook returned NaN.
        """
        mask_id, hidden = self.bridge.cfg.mask_token_id, masked.flatten(0, 1)
        ids = self.tokens.repeat(len(masked), 1)
        at = hidden.nonzero()
        where = at.to(ids.device)
        with self.hooks.on():
            logits = self.logits(stream, ids, where)
        true = ids[where.unbind(-1)]
        chunks = zip(logits.split(CHUNK), true.split(CHUNK), strict=True)
        log_probs = [
            masked_log_probs(at_least_float32(x), mask_id).gather(-1, y[:, None])[:, 0]
            for x, y in chunks
        ]
        values = torch.cat(log_probs).double().cpu()
        if bool(values.isnan().any()):
            raise NotExactError(
                f"predictions are NaN in {logits.dtype}: boot in a wider dtype, or check what the "
                "hooks return"
            )
        full = torch.zeros(hidden.shape, dtype=torch.float64)
        full = full.index_put(at.unbind(-1), values)
        return full.unflatten(0, masked.shape[:2])


@dataclass(frozen=True)
class _FullDiffusionPasses(MaskedPasses):
    """Passes of full diffusion: one stream, in which every position reads every other."""

    def clean_stream(self) -> CleanStream:
        """Return an empty stream: nothing comes before the one block."""
        return CleanStream()

    def logits(
        self, stream: CleanStream, ids: Int[Tensor, "row pos"], where: Int[Tensor, "token 2"]
    ) -> Float[Tensor, "token d_vocab"]:
        """Return raw logits at pairs of (row, position), which are masked in their row."""
        mask_id = where.new_tensor(self.bridge.cfg.mask_token_id)
        return self._one_stream(ids.index_put(where.unbind(-1), mask_id), "open", where)

    def _one_stream(
        self, ids: Int[Tensor, "row pos"], kind: str, where: Int[Tensor, "token 2"]
    ) -> Float[Tensor, "token d_vocab"]:
        """Return raw logits of a pass over one stream at pairs of (row, position)."""
        model, n = self.bridge.original_model, ids.shape[1]
        x = model.backbone.vocab_embed(ids)
        view = View(ids, n, self.block_size, kind, dual=False)
        routing = Routing.of_view(view, frequencies(model, x.device), x.dtype)
        return run(model, x, self.sigma(x), routing, slice(0, n), where)


@dataclass(frozen=True)
class _AutoregressivePasses(_FullDiffusionPasses):
    """Passes of the autoregressive baseline: nothing is masked, and no position reads ahead."""

    def logits(
        self, stream: CleanStream, ids: Int[Tensor, "row pos"], where: Int[Tensor, "token 2"]
    ) -> Float[Tensor, "token d_vocab"]:
        """Return the raw logits of each token, which are at the position before it."""
        return self._one_stream(ids, "causal", where - where.new_tensor([0, 1]))


def read_masked_passes(
    bridge: Bridge,
    tokens: Any,
    block_size: int | str | None,
    hooks: Any = None,
    scope: str = "active",
    rows: int = 2048,
    given: int = 1,
) -> MaskedPasses:
    """Check texts, block size and hooks, and return their passes, before anything is run.

    A string gets BOS in front, whatever ``cfg.default_prepend_bos`` is: position 0 is context that
    every likelihood is conditioned on.

    Raises:
        InputError: for arguments that do not fit.
        HookNameError: for a hook name that the bridge does not have.
        NotExactError: with time conditioning, or in training mode with dropout.
    """
    config = bridge.original_model.config
    if config.time_conditioning:
        raise NotExactError(
            "this checkpoint sees t (time_conditioning=True): its prediction under a mask pattern "
            "depends on t, so no finite sum over mask patterns is exact"
        )
    require_eval(bridge)
    pass_hooks = read_pass_hooks(bridge, hooks, scope)
    several = tokens if isinstance(tokens, list | tuple) else [tokens]
    texts = [text for text in several if isinstance(text, str)]
    for text in texts:
        refuse_path(text, "tokens")
    ids = read_ids(bridge, tokens, prepend_bos=True)
    asked, trained = block_size_of(bridge, block_size), trained_block_sizes(config)
    if not 2 <= ids.shape[1] <= config.model_length:
        raise InputError(
            f"{ids.shape[1]} tokens: give BOS and at least one more, at most {config.model_length}"
        )
    check_finished("tokens", ids, bridge.cfg.mask_token_id)
    if not 1 <= given < ids.shape[1]:
        raise InputError(
            f"given={given} of {ids.shape[1]} positions: give at least 1 (BOS), and leave one to "
            "count"
        )
    kind = MaskedPasses
    if not config.cross_attn:
        kind = _AutoregressivePasses if config.causal else _FullDiffusionPasses
    characters = tuple(map(len, texts)) if texts and given == 1 else None
    return kind(
        bridge=bridge,
        tokens=ids,
        block_size=min(asked, ids.shape[1]),
        trained_at=() if asked in trained else trained,
        hooks=pass_hooks,
        rows=rows,
        given=given,
        characters=characters,
    )
