"""Log-probabilities of finished texts under given mask patterns, sharing one clean pass.

In the dual view ``[noisy | clean]`` the clean stream never reads the noisy one. So the clean
stream's keys and values are computed once per text, and any number of mask patterns run over them.
Only masked positions are unembedded.

Without hooks a pass runs noisy blocks: each block runs once under each of its distinct masks,
however many mask patterns share them. With hooks, on the passes or on the bridge itself, a pass is
a batch of whole noisy streams ``[batch * pattern, pos, ...]``, and each distinct mask pattern of
the texts runs once. A *place* is a position counted within its block.

The baselines have one stream, which hooks see whole, whatever their scope. For full diffusion the
text is one block, with nothing before it. For the autoregressive model every token is a block, and
a token is predicted one position before it.

The conditioning c must be constant. ``mask_patterns`` and ``mask_draws`` choose the mask patterns.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.casts import frequencies
from transformer_lens_bd3lm.bridge.forward import before_unembedding, through_layers
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.kv_cache import CleanStream
from transformer_lens_bd3lm.bridge.noisy_blocks import NoisyBlocks
from transformer_lens_bd3lm.bridge.routing import Routing
from transformer_lens_bd3lm.bridge.texts import read_ids, refuse_path
from transformer_lens_bd3lm.bridge.token_log_probs import token_log_probs
from transformer_lens_bd3lm.bridge.watched import watched
from transformer_lens_bd3lm.checks import check_finished, check_int
from transformer_lens_bd3lm.denoising.pass_hooks import PassHooks, read_pass_hooks
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.likelihoods.distinct_masks import (
    distinct_blocks,
    distinct_patterns,
    passes_of,
)
from transformer_lens_bd3lm.model.config import trained_block_sizes
from transformer_lens_bd3lm.model.inputs import View


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
        hooked: whether the network has hooks, these or others on the bridge itself. Passes then run
            whole noisy streams.
        rows: largest number of positions in a pass, unless one text has more, or, with hooks, all
            texts under one mask pattern have more.
        given: number of leading positions that are never masked and not counted; 1 is BOS alone.
        characters: characters of each text, if they were given as strings and count whole.
    """

    bridge: Bridge
    tokens: Int[Tensor, "batch pos"]
    block_size: int
    trained_at: tuple[int, ...]
    hooks: PassHooks
    hooked: bool
    rows: int
    given: int = 1
    characters: tuple[int, ...] | None = None

    @property
    def counted(self) -> Bool[Tensor, "batch pos"]:
        """Which positions may be masked, on the CPU: all but those given."""
        batch, n = self.tokens.shape
        return (torch.arange(n) >= self.given).expand(batch, n)

    def by_block(self, x: Shaped[Tensor, "*dims pos"]) -> Shaped[Tensor, "*dims block place"]:
        """Cut texts into blocks; the last one is filled up with zeros."""
        size = self.block_size
        return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))

    def sigma(self, x: Tensor) -> Float[Tensor, " batch"]:
        """Return sigma of each row: zeros, since the network does not see t."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.zeros(len(x), device=x.device, dtype=wide)

    def clean_stream(self) -> CleanStream:
        """Return the keys and values of the clean stream, from one pass without a read-out.

        It is empty for texts of one block without hooks, since nothing would read it.
        """
        model, stream = self.bridge.original_model, CleanStream()
        if not self.hooked and self.block_size == self.tokens.shape[1]:
            return stream
        view = View(self.tokens, self.tokens.shape[1], self.block_size, "block", dual=False)
        with self.hooks.on_clean():
            x = model.backbone.vocab_embed(self.tokens)
            routing = Routing.of_view(view, frequencies(model, x.device), x.dtype)
            routing.cache = stream
            through_layers(model, x, self.sigma(x), routing, slice(0, 1))
        return stream

    def log_probs(
        self, masked: Bool[Tensor, "pattern batch pos"]
    ) -> Float[Tensor, "pattern batch pos"]:
        """Compute ``log p`` in nats of the true token at each masked position; 0 elsewhere.

        It is computed in float32 or wider, and returned in float64 on the CPU.

        Raises:
            NotExactError: if one is NaN, because activations overflow or a hook returned NaN.
        """
        full = self.by_block(torch.zeros(masked.shape, dtype=torch.float64))
        for texts, passes in self.by_texts():
            part = full[:, texts]
            for at, log_p in passes.by_pass(passes.clean_stream(), masked[:, texts]):
                part[at.unbind(-1)] = log_p
        return full.flatten(-2)[..., : masked.shape[-1]]

    def by_texts(self) -> Iterator[tuple[slice, "MaskedPasses"]]:
        """Yield a few texts at a time, with their passes; one pass runs their clean streams.

        With hooks these are all texts, so that hooks see them side by side.
        """
        batch, n = self.tokens.shape
        at_once = batch if self.hooked else max(self.rows // n, 1)
        for first in range(0, batch, at_once):
            texts = slice(first, min(first + at_once, batch))
            yield texts, replace(self, tokens=self.tokens[texts])

    def by_pass(
        self, stream: CleanStream, masked: Bool[Tensor, "pattern batch pos"]
    ) -> Iterator[tuple[Int[Tensor, "block 3"], Float[Tensor, "block place"]]]:
        """Yield the noisy blocks of each pass, and ``log p`` of the true tokens at their places.

        A block is given as (pattern, text, block). All blocks with a mask are yielded. ``log p`` is
        in nats, and 0 at places that are not masked.

        Raises:
            NotExactError: if a prediction is NaN.
        """
        at = self.by_block(masked).any(-1).nonzero()
        if len(at):
            yield from (self.pattern_passes if self.hooked else self.block_passes)(
                stream, masked, at
            )

    def pattern_passes(
        self, stream: CleanStream, masked: Bool[Tensor, "pattern batch pos"], at: Tensor
    ) -> Iterator[tuple[Int[Tensor, "block 3"], Float[Tensor, "block place"]]]:
        """Run each distinct mask pattern of the texts once, as batches of whole noisy streams."""
        patterns, owner = distinct_patterns(masked)
        at_once = max(self.rows // self.tokens.numel(), 1)
        for part, here in passes_of(owner[at[:, 0]], at_once):
            log_p = self.by_block(self.of_streams(stream, masked[patterns[part]]))
            pattern, text, block = at[here].unbind(-1)
            yield at[here], log_p[owner[pattern] - part.start, text, block]

    def block_passes(
        self, stream: CleanStream, masked: Bool[Tensor, "pattern batch pos"], at: Tensor
    ) -> Iterator[tuple[Int[Tensor, "block 3"], Float[Tensor, "block place"]]]:
        """Run each distinct noisy block once, many of them in one pass."""
        blocks = self.by_block(masked)
        first, owner = distinct_blocks(blocks, at)
        for part, here in passes_of(owner, max(self.rows // self.block_size, 1)):
            pattern, text, block = at[first[part]].unbind(-1)
            noisy = NoisyBlocks(
                length=self.tokens.shape[1],
                text=text,
                start=block * self.block_size,
                masked=blocks[pattern, text, block],
            )
            yield at[here], self.of_blocks(stream, noisy)[owner[here] - part.start]

    def of_blocks(self, stream: CleanStream, blocks: NoisyBlocks) -> Float[Tensor, "block place"]:
        """Compute ``log p`` of the true tokens at masks of noisy blocks, 0 elsewhere, in a pass.

        Raises:
            NotExactError: if one is NaN.
        """
        h = self.block_outputs(stream, blocks)
        where = torch.arange(h.shape[1], device=h.device)
        where = torch.stack([torch.zeros_like(where), where], dim=1)
        return _placed(self._read(h, where, self.true(blocks)[blocks.masked_rows]), blocks.masked)

    def true(self, blocks: NoisyBlocks) -> Int[Tensor, " row"]:
        """Return the true token of each row of noisy blocks."""
        return self.tokens[tuple(x.to(self.tokens.device) for x in blocks.sources)]

    def block_outputs(
        self, stream: CleanStream, blocks: NoisyBlocks
    ) -> Float[Tensor, "1 masked d_model"]:
        """Run noisy blocks in one pass; return what the unembedding reads at their masked rows."""
        model, mask_id = self.bridge.original_model, self.bridge.cfg.mask_token_id
        noised = self.true(blocks)
        noised[blocks.masked_rows] = mask_id
        x = model.backbone.vocab_embed(noised[None])
        routing = blocks.routing(stream, frequencies(model, x.device), x)
        return before_unembedding(model, x, self.sigma(x), routing, blocks.masked_rows)

    def of_streams(
        self, stream: CleanStream, masked: Bool[Tensor, "pattern batch pos"]
    ) -> Float[Tensor, "pattern batch pos"]:
        """Compute ``log p`` of the true tokens at masks of whole noisy streams, in one pass.

        Its batch rows, ``batch * pattern`` of them, are what hooks see.

        Raises:
            NotExactError: if one is NaN.
        """
        ids = self.tokens.repeat(len(masked), 1)
        where = masked.flatten(0, 1).nonzero().to(ids.device)
        with self.hooks.on():
            log_p = self._read(*self.streams(stream, ids, where), ids[where.unbind(-1)])
        return _placed(log_p, masked)

    def streams(
        self, stream: CleanStream, ids: Int[Tensor, "row pos"], where: Int[Tensor, "token 2"]
    ) -> tuple[Float[Tensor, "row pos d_model"], Int[Tensor, "token 2"]]:
        """Run whole noisy streams, masked at pairs of (row, position).

        Returns the input of the unembedding, and the pairs at which masked tokens are predicted.
        """
        model, n = self.bridge.original_model, ids.shape[1]
        noised = ids.index_put(where.unbind(-1), where.new_tensor(self.bridge.cfg.mask_token_id))
        x = model.backbone.vocab_embed(noised)
        beside = stream.beside(len(ids) // len(self.tokens))
        routing = Routing.of_noisy(n, self.block_size, beside, frequencies(model, x.device), x)
        return before_unembedding(model, x, self.sigma(x), routing, slice(0, n)), where

    def _read(
        self,
        h: Float[Tensor, "row pos d_model"],
        where: Int[Tensor, "token 2"],
        true: Int[Tensor, " token"],
    ) -> Float[Tensor, " token"]:
        """Compute ``log p`` of the true tokens at pairs of (row, position), float64 on the CPU.

        Raises:
            NotExactError: if one is NaN.
        """
        unembed = self.bridge.original_model.backbone.output_layer.linear
        log_p = token_log_probs(unembed, h, where, true, self.bridge.cfg.mask_token_id)
        log_p = log_p.cpu().double()
        if bool(log_p.isnan().any()):
            raise NotExactError(
                f"predictions are NaN in {h.dtype}: boot in a wider dtype, or check what the hooks "
                "return"
            )
        return log_p


@dataclass(frozen=True)
class _FullDiffusionPasses(MaskedPasses):
    """Passes of full diffusion: one stream, in which every position reads every other."""

    kind: ClassVar[str] = "open"

    def clean_stream(self) -> CleanStream:
        """Return an empty stream: nothing comes before the one block."""
        return CleanStream()

    def streams(
        self, stream: CleanStream, ids: Int[Tensor, "row pos"], where: Int[Tensor, "token 2"]
    ) -> tuple[Float[Tensor, "row pos d_model"], Int[Tensor, "token 2"]]:
        """Run whole noisy streams; see :class:`MaskedPasses`."""
        mask_id = where.new_tensor(self.bridge.cfg.mask_token_id)
        return self.one_stream(ids.index_put(where.unbind(-1), mask_id)), where

    def one_stream(self, ids: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos d_model"]:
        """Run one stream; return the input of the unembedding."""
        model, n = self.bridge.original_model, ids.shape[1]
        x = model.backbone.vocab_embed(ids)
        view = View(ids, n, self.block_size, self.kind, dual=False)
        routing = Routing.of_view(view, frequencies(model, x.device), x.dtype)
        return before_unembedding(model, x, self.sigma(x), routing, slice(0, n))


@dataclass(frozen=True)
class _AutoregressivePasses(_FullDiffusionPasses):
    """Passes of the autoregressive baseline: nothing is masked, and no position reads ahead."""

    kind: ClassVar[str] = "causal"

    def block_passes(
        self, stream: CleanStream, masked: Bool[Tensor, "pattern batch pos"], at: Tensor
    ) -> Iterator[tuple[Int[Tensor, "block 3"], Float[Tensor, "block place"]]]:
        """Run the texts once, since predictions do not depend on the masks."""
        wanted = masked.any(0)
        where = wanted.nonzero().to(self.tokens.device)
        h = self.one_stream(self.tokens)
        log_p = self._read(h, where - where.new_tensor([0, 1]), self.tokens[where.unbind(-1)])
        _, text, position = at.unbind(-1)
        yield at, _placed(log_p, wanted)[text, position, None]

    def streams(
        self, stream: CleanStream, ids: Int[Tensor, "row pos"], where: Int[Tensor, "token 2"]
    ) -> tuple[Float[Tensor, "row pos d_model"], Int[Tensor, "token 2"]]:
        """Run whole streams; each token is predicted one position before it."""
        return self.one_stream(ids), where - where.new_tensor([0, 1])


def _placed(
    values: Float[Tensor, " token"], masked: Bool[Tensor, "*dims"]
) -> Float[Tensor, "*dims"]:
    """Return values, in order, where masked, and 0 elsewhere."""
    return torch.zeros(masked.shape, dtype=values.dtype).masked_scatter(masked, values)


def _is_hooked(bridge: Bridge) -> bool:
    """Whether the network has hooks, or flags that give its heads copies or results."""
    model = bridge.original_model
    return watched(*model.modules()) or any(b.plain() is None for b in bridge.blocks)


def read_masked_passes(
    bridge: Bridge,
    tokens: Any,
    block_size: int | str | None,
    hooks: Any = None,
    scope: str = "active",
    rows: int = 2048,
    given: int = 1,
    name: str = "tokens",
) -> MaskedPasses:
    """Check texts, block size and hooks, and return their passes, before anything is run.

    ``name`` is that of ``tokens`` where it was given, for messages.

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
    check_int("rows", rows, 1)
    pass_hooks = read_pass_hooks(bridge, hooks, scope)
    several = tokens if isinstance(tokens, list | tuple) else [tokens]
    texts = [text for text in several if isinstance(text, str)]
    for text in texts:
        refuse_path(text, name)
    ids = read_ids(bridge, tokens, name, prepend_bos=True)
    asked, trained = block_size_of(bridge, block_size), trained_block_sizes(config)
    if not 2 <= ids.shape[1] <= config.model_length:
        raise InputError(
            f"{ids.shape[1]} tokens: give BOS and at least one more, at most {config.model_length}"
        )
    check_finished(name, ids, bridge.cfg.mask_token_id)
    if not 1 <= given < ids.shape[1]:
        raise InputError(
            f"given={given} of {ids.shape[1]} positions: give at least 1 (BOS), and leave one to "
            "count"
        )
    kind = MaskedPasses
    if not config.cross_attn:
        kind = _AutoregressivePasses if config.causal else _FullDiffusionPasses
    characters = tuple(map(len, texts)) if texts and given == 1 else None
    size = min(asked, ids.shape[1])  # a text within one block is the same at both sizes
    return kind(
        bridge=bridge,
        tokens=ids,
        block_size=size,
        trained_at=() if asked in trained or size in trained else trained,
        hooks=pass_hooks,
        hooked=bool(pass_hooks.fns) or _is_hooked(bridge),
        rows=rows,
        given=given,
        characters=characters,
    )
