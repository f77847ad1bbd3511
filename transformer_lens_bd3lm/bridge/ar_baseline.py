"""Autoregressive baseline: TransformerLens's causal loss and ``generate``, without the mask token.

Position i of ``causal: true`` predicts token i + 1, so TransformerLens's causal loss and its
``generate`` mean what they say. One thing is left to do: the vocabulary has the mask token, whose
column of the raw logits was never trained::

    log p(x_i | x_<i) = log_softmax(logits[i - 1] with logits[mask] = -inf)

Raw logits stay as they are, in ``bridge(ids)`` as in the cache; they are cut where they become
probabilities. ``generate`` runs the whole text anew for every token (no key-value cache).
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from transformer_lens_bd3lm.bridge.host import Bridge, Methods
from transformer_lens_bd3lm.bridge.texts import is_ids, padding
from transformer_lens_bd3lm.checks import check_finished
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.model.subs import without_mask

_writing: ContextVar[Any] = ContextVar("bd3lm_writing", default=None)


@contextmanager
def _drawing_from(bridge: Bridge) -> Iterator[None]:
    """Mark this bridge as the one whose logits TransformerLens draws tokens from."""
    token = _writing.set(bridge)
    try:
        yield
    finally:
        _writing.reset(token)


class WithNextToken(Methods):
    """Mixed in front of the bridge's class: causal loss and generation without the mask token."""

    def cut(self, logits: Float[Tensor, "*dims d_vocab"]) -> Float[Tensor, "*dims d_vocab"]:
        """Return the logits with the mask token's at minus infinity, as a new tensor."""
        return without_mask(logits, self.cfg.mask_token_id)

    def forward(
        self, input: Any, return_type: str | None = "logits", *args: Any, **kwargs: Any
    ) -> Any:
        """Run the forward; logits that tokens are drawn from have no mask token."""
        output = super().forward(input, return_type, *args, **kwargs)
        drawn = _writing.get() is self and return_type == "logits" and isinstance(output, Tensor)
        return self.cut(output) if drawn else output

    def loss_fn(self, logits: Any, tokens: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Compute TransformerLens's causal loss in nats a token, without the mask token.

        Raises:
            InputError: if a text holds the mask, which has probability zero, or has nothing to
                predict.
        """
        self.check_finished(tokens)
        if tokens.shape[-1] < 2:
            raise InputError("one token has no loss: give BOS and at least one more")
        behind = padding(torch.atleast_2d(tokens), self.cfg.pad_token_id)
        if behind is not None:
            tokens = torch.atleast_2d(tokens).masked_fill(behind, 0)
            if not args:
                kwargs.setdefault("attention_mask", (~behind).long())
        return super().loss_fn(self.cut(logits), tokens, *args, **kwargs)

    def _causal_labels_loss(self, logits: Any, labels: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss of given labels, without the mask token."""
        self.check_finished(labels)
        behind = padding(torch.atleast_2d(labels), self.cfg.pad_token_id)
        labels = labels if behind is None else torch.atleast_2d(labels).masked_fill(behind, -100)
        return super()._causal_labels_loss(self.cut(logits), labels, *args, **kwargs)

    def check_finished(self, tokens: Tensor) -> None:
        """Refuse texts that hold the mask token, which is never predicted.

        Raises:
            InputError: if they do.
        """
        way_out = "it is never predicted, give finished texts"
        check_finished("tokens", tokens, self.cfg.mask_token_id, way_out)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as TransformerLens does; the mask token is never written.

        Raises:
            InputError: for prompts of several lengths, whose positions padding would shift, and for
                texts that would outgrow the context.
        """
        self.check_prompt(TransformerBridge.generate, *args, **kwargs)
        with _drawing_from(self):
            return super().generate(*args, **kwargs)

    def check_prompt(self, call: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse prompts of several lengths, and texts that would outgrow the context.

        Raises:
            InputError: for either.
        """
        given = inspect.signature(call).bind(self, *args, **kwargs)
        given.apply_defaults()
        prompt, bos = given.arguments["input"], given.arguments["prepend_bos"]
        new = given.arguments["max_new_tokens"]
        if not isinstance(prompt, str | list | Tensor):
            raise InputError(
                f"the prompt is {type(prompt).__name__}: give a string, a list of them, or ids"
            )
        if isinstance(prompt, str | list):
            prompt = self.to_tokens(prompt, prepend_bos=bos, truncate=False)
        if is_ids(prompt) and padding(torch.atleast_2d(prompt), self.cfg.pad_token_id) is not None:
            raise InputError(
                "the prompts have several lengths, and padding on the left would shift positions: "
                "generate from one at a time, or from prompts of one length"
            )
        if isinstance(prompt, Tensor) and prompt.ndim > 1:
            length = prompt.shape[1]
            if length + new - 1 > self.cfg.n_ctx:
                raise InputError(
                    f"prompt of {length} tokens and max_new_tokens={new}: the last token would be "
                    f"predicted from {length + new - 1}, and the context is {self.cfg.n_ctx}"
                )

    def generate_stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Generate as a stream, as TransformerLens does; the mask token is never written.

        Raises:
            InputError: as ``generate``.
        """
        self.check_prompt(TransformerBridge.generate_stream, *args, **kwargs)
        stream = super().generate_stream(*args, **kwargs)
        while True:
            try:
                with _drawing_from(self):
                    part = next(stream)
            except StopIteration:
                return
            yield part

    def hf_generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse transformers' own loop, which would write the mask token.

        Raises:
            NotExactError: always.
        """
        raise NotExactError(
            "hf_generate draws from raw logits, and could draw the mask token, whose logit is "
            "untrained: call bridge.generate"
        )
