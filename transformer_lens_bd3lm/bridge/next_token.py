"""The autoregressive baseline: the host's shifted loss and its ``generate``, mask left out.

Position i of ``causal: true`` predicts token i + 1, so here the host's causal loss is the loss, and
what it generates is what the model writes. One thing is left to do: the vocabulary has the mask
token, which is no word, and its column of the raw logits was never trained::

    log p(x_i | x_<i) = log_softmax(logits[i - 1] with logits[mask] = -inf)

Raw logits stay as they are, in ``bridge(ids)`` as in the cache; they are cut where they become
probabilities. ``generate`` runs the whole text anew for every token (no key-value cache).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.errors import InputError, NotExactError

_writing: ContextVar[Any] = ContextVar("bd3lm_writing", default=None)


@contextmanager
def writing(bridge: Any) -> Iterator[None]:
    """While the host draws tokens from this bridge's logits."""
    token = _writing.set(bridge)
    try:
        yield
    finally:
        _writing.reset(token)


def many(input: Any) -> bool:
    """Whether these are several texts."""
    return isinstance(input, list) and all(isinstance(text, str) for text in input)


class WithNextToken:
    """Mixed in front of the bridge's class."""

    def cut(self: Any, logits: Float[Tensor, "*dims d_vocab"]) -> Float[Tensor, "*dims d_vocab"]:
        """Logits with the mask token's at minus infinity, as a new tensor."""
        # A floor above this one, so imported when it is there.
        from transformer_lens_bd3lm.diffusion.subs import without_mask

        return without_mask(logits, self.cfg.mask_token_id)

    def forward(
        self: Any, input: Any, return_type: str | None = "logits", *args: Any, **kwargs: Any
    ) -> Any:
        """As the host's; without the mask where tokens are drawn from it."""
        if return_type in ("loss", "both") and many(input):
            kwargs.setdefault("attention_mask", self.real(input, **kwargs))
        found = super().forward(input, return_type, *args, **kwargs)
        drawn = _writing.get() is self and return_type == "logits" and isinstance(found, Tensor)
        return self.cut(found) if drawn else found

    def real(self: Any, texts: list[str], prepend_bos: Any = None, **_: Any) -> Tensor:
        """Which positions of some texts are no padding ``[batch, pos]``: the rest has no loss."""
        rows = [self.to_tokens(text, prepend_bos=prepend_bos).shape[1] for text in texts]
        lengths = torch.tensor(rows, device=self.cfg.device)
        return (torch.arange(max(rows), device=self.cfg.device) < lengths[:, None]).long()

    def loss_fn(self: Any, logits: Any, tokens: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As the host's (nats a token), over the words alone.

        Raises:
            InputError: if a text holds the mask, which has probability zero.
        """
        self.check_finished(tokens)
        return super().loss_fn(self.cut(logits), tokens, *args, **kwargs)

    def _causal_labels_loss(self: Any, logits: Any, labels: Any, *args: Any, **how: Any) -> Tensor:
        """As the host's, over the words alone."""
        self.check_finished(labels)
        return super()._causal_labels_loss(self.cut(logits), labels, *args, **how)

    def check_finished(self: Any, tokens: Tensor) -> None:
        """Refuse the mask among what is to be predicted.

        Raises:
            InputError: if it is there.
        """
        if bool((tokens == self.cfg.mask_token_id).any()):
            raise InputError("tokens hold the mask, which is never predicted: give finished texts")

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the host's; it never writes the mask.

        Raises:
            InputError: for prompts of several lengths, whose positions padding would shift.
        """
        prompt = args[0] if args else kwargs.get("input")
        if many(prompt) and not bool(self.real(prompt, kwargs.get("prepend_bos")).all()):
            raise InputError(
                "the prompts have several lengths, and padding on the left would shift positions: "
                "generate from one at a time, or from prompts of one length"
            )
        with writing(self):
            return super().generate(*args, **kwargs)

    def generate_stream(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As the host's; it never writes the mask."""
        stream = super().generate_stream(*args, **kwargs)
        while True:
            try:
                with writing(self):
                    part = next(stream)
            except StopIteration:
                return
            yield part

    def hf_generate(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: transformers' own loop knows nothing of the mask.

        Raises:
            NotExactError: always.
        """
        raise NotExactError(
            "hf_generate draws from raw logits, the untrained one of the mask among them: call "
            "bridge.generate"
        )
