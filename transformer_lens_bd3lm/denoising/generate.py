"""``bridge.diffusion_generate``, TransformerLens's method of generation, by the denoising loop.

TransformerLens's own version puts the prompt in front of the sampler's output unless the output
begins with it, which is wrong where masks in the prompt are filled in. It also refuses several
prompts, which :func:`denoise` writes exactly, of one length or not.
"""

from typing import Any

from jaxtyping import Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.adapter import BD3LMArchitectureAdapter
from transformer_lens_bd3lm.bridge.host import Bridge, Methods
from transformer_lens_bd3lm.bridge.mixin import put_in_front
from transformer_lens_bd3lm.denoising.denoise import denoise


class WithDenoising(Methods):
    """Mixin of the bridge's class: ``diffusion_generate`` by the denoising loop."""

    def diffusion_generate(
        self,
        input: Any = None,
        max_new_tokens: int = 32,
        prepend_bos: bool | None = None,
        **kwargs: Any,
    ) -> str | Int[Tensor, "batch pos"]:
        """Return what :func:`denoise` writes: a string for a string, else ids, prompt included.

        Args:
            input: a string, strings, ids ``[batch, pos]``, rows of ids, or None for BOS alone.
            max_new_tokens: masks appended to each; masks in the prompt are filled in anyway.
            prepend_bos: of strings, as in ``to_tokens``.
            kwargs: further keywords of :func:`denoise`, such as ``seed``, ``temperature``,
                ``nucleus_p``, ``sampler``, ``noise``, ``block_size``, ``hooks``.

        Returns:
            For a string, the finished text without special tokens. Otherwise ``run.tokens``, with
            masks behind the end of a shorter row.

        Raises:
            BD3LMError: as :func:`denoise`.
        """
        prompt = input
        if prepend_bos is not None and isinstance(input, str | list | tuple):
            texts = [input] if isinstance(input, str) else input
            if all(isinstance(text, str) for text in texts):
                prompt = [
                    self.to_tokens(text, prepend_bos=prepend_bos, truncate=False)[0]
                    for text in texts
                ]
        run = denoise(self, prompt, max_new_tokens=max_new_tokens, **kwargs)
        if not isinstance(input, str):
            return run.tokens
        return self.tokenizer.decode(run.final[0, : int(run.ends[0])], skip_special_tokens=True)


def _let_denoise(bridge: Bridge) -> None:
    """Give a bridge ``diffusion_generate``, unless it is autoregressive."""
    if not bridge.cfg.causal:
        bridge.adapter.native_sampler = "diffusion_generate"
        put_in_front(bridge, WithDenoising)


BD3LMArchitectureAdapter.extensions.append(_let_denoise)
