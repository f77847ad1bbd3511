"""Finished texts under masks of one's choice: the noisy stream, over a clean stream run once.

The dual view is ``[noisy | clean]``, and the clean half never reads the noisy one. So the clean
stream's keys and values are computed once a text, and any number of mask patterns are run as
batches of noisy streams alone over them: half the rows of a dual pass, and only masked positions
are unembedded.

The baselines have one stream, which hooks see whole, whatever their scope. To full diffusion the
text is one block, with nothing before it. To the autoregressive model every token is a block, and
what it says of a token it says one position earlier.

It needs c constant, and it does not say which patterns, or what to do with their probabilities.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.attention import Routing
from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.forward import frequencies, read_dial, run, through_layers
from transformer_lens_bd3lm.bridge.kv_cache import CleanStream
from transformer_lens_bd3lm.bridge.texts import read_ids, refuse_path
from transformer_lens_bd3lm.checks import check_finished
from transformer_lens_bd3lm.denoising.pass_hooks import PassHooks, read_pass_hooks
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.model.inputs import View
from transformer_lens_bd3lm.model.modules import at_least_float32
from transformer_lens_bd3lm.model.subs import masked_log_probs

CHUNK = 256  # rows whose log-softmax is in memory at once


@dataclass(frozen=True)
class NoisyText:
    """Some texts of one length, to be looked at under masks.

    Attributes:
        bridge: a BD3LM bridge.
        tokens: the texts ``[batch, pos]``.
        block_size: the dial.
        hooks: on the noisy stream, and some also on the clean one, whose keys and values later
            blocks read.
        rows: rows of a pass, at most, unless one pattern has more.
        given: leading positions that are given: never masked, not counted; 1 is BOS alone.
        characters: characters of each text, if they were given as strings and count whole.
    """

    bridge: Any
    tokens: Int[Tensor, "batch pos"]
    block_size: int
    hooks: PassHooks
    rows: int
    given: int = 1
    characters: tuple[int, ...] | None = None

    @property
    def counted(self) -> Bool[Tensor, "batch pos"]:
        """Positions that may be masked, on the CPU: all but those given."""
        batch, n = self.tokens.shape
        return (torch.arange(n) >= self.given).expand(batch, n)

    @property
    def together(self) -> int:
        """Patterns a pass."""
        return max(self.rows // self.tokens.numel(), 1)

    def sigma(self, x: Tensor) -> Float[Tensor, " batch"]:
        """Zeros: the network does not see t."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.zeros(len(x), device=x.device, dtype=wide)

    def clean(self) -> CleanStream:
        """Keys and values of the clean stream, from one pass; nothing is read out of it."""
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
        """Raw logits for the tokens at pairs of (row, position), which are masked in their row."""
        model, n = self.bridge.original_model, ids.shape[1]
        noised = ids.index_put(where.unbind(-1), where.new_tensor(self.bridge.cfg.mask_token_id))
        x = model.backbone.vocab_embed(noised)
        beside = stream.beside(len(ids) // len(self.tokens))
        routing = Routing.of_noisy(n, self.block_size, beside, frequencies(model, x.device), x)
        return run(model, x, self.sigma(x), routing, slice(0, n), where)

    def log_p(
        self, stream: CleanStream, masked: Bool[Tensor, "pattern batch pos"]
    ) -> Float[Tensor, "pattern batch pos"]:
        """``log p`` of the true token at each masked position, nats; 0 elsewhere. One pass.

        In float64 on the CPU, from a log-softmax in float32 or wider.

        Raises:
            NotExactError: if one is NaN: activations overflow, or a hook made it so.
        """
        mask_id, hidden = self.bridge.cfg.mask_token_id, masked.flatten(0, 1)
        ids = self.tokens.repeat(len(masked), 1)
        at = hidden.nonzero()
        where = at.to(ids.device)
        with self.hooks.on():
            logits = self.logits(stream, ids, where)
        true = ids[where.unbind(-1)]
        parts = zip(logits.split(CHUNK), true.split(CHUNK), strict=True)
        found = [
            masked_log_probs(at_least_float32(x), mask_id).gather(-1, y[:, None])[:, 0]
            for x, y in parts
        ]
        values = torch.cat(found).double().cpu()
        if bool(values.isnan().any()):
            raise NotExactError(
                f"predictions are NaN in {logits.dtype}: boot in a wider dtype, or look at what a "
                "hook returned"
            )
        full = torch.zeros(hidden.shape, dtype=torch.float64)
        full = full.index_put(at.unbind(-1), values)
        return full.unflatten(0, masked.shape[:2])


@dataclass(frozen=True)
class OpenText(NoisyText):
    """The same to full diffusion: one stream, in which every position reads every other."""

    def clean(self) -> CleanStream:
        """Nothing comes before the one block."""
        return CleanStream()

    def logits(
        self, stream: CleanStream, ids: Int[Tensor, "row pos"], where: Int[Tensor, "token 2"]
    ) -> Float[Tensor, "token d_vocab"]:
        """As block diffusion's."""
        mask_id = where.new_tensor(self.bridge.cfg.mask_token_id)
        return self.single(ids.index_put(where.unbind(-1), mask_id), "open", where)

    def single(
        self, ids: Int[Tensor, "row pos"], kind: str, where: Int[Tensor, "token 2"]
    ) -> Float[Tensor, "token d_vocab"]:
        """Raw logits of one stream at pairs of (row, position)."""
        model, n = self.bridge.original_model, ids.shape[1]
        x = model.backbone.vocab_embed(ids)
        view = View(ids, n, self.block_size, kind, dual=False)
        routing = Routing.of_view(view, frequencies(model, x.device), x.dtype)
        return run(model, x, self.sigma(x), routing, slice(0, n), where)


@dataclass(frozen=True)
class CausalText(OpenText):
    """The same to the autoregressive baseline: nothing is masked, and nobody reads ahead."""

    def logits(
        self, stream: CleanStream, ids: Int[Tensor, "row pos"], where: Int[Tensor, "token 2"]
    ) -> Float[Tensor, "token d_vocab"]:
        """A token's are those of the position before it."""
        return self.single(ids, "causal", where - where.new_tensor([0, 1]))


def read_noisy_text(
    bridge: Any,
    tokens: Any,
    block_size: int | str | None,
    hooks: Any = None,
    scope: str = "active",
    rows: int = 2048,
    given: int = 1,
) -> NoisyText:
    """Read texts, dial and hooks at the door; nothing has been run then.

    Raises:
        InputError: for what does not fit.
        NotExactError: with time conditioning, or in training with dropout.
    """
    config = bridge.original_model.config
    if config.time_conditioning:
        raise NotExactError(
            "this checkpoint sees t (time_conditioning=True): what it says of a masked state "
            "depends on when it is met, so no finite sum over states is exact"
        )
    require_eval(bridge)
    pass_hooks = read_pass_hooks(bridge, hooks, scope)
    several = tokens if isinstance(tokens, list | tuple) else [tokens]
    texts = [text for text in several if isinstance(text, str)]
    for text in texts:
        refuse_path(text, "tokens")
    ids = read_ids(bridge, tokens, prepend_bos=True)
    size = min(read_dial(bridge, block_size), ids.shape[1])
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
    kind = NoisyText if config.cross_attn else CausalText if config.causal else OpenText
    characters = tuple(map(len, texts)) if texts and given == 1 else None
    return kind(bridge, ids, size, pass_hooks, rows, given, characters)
