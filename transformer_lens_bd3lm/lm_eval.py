"""BD3LM as a model of lm-evaluation-harness: exact likelihoods, or the bound, by name.

The harness asks a model three questions, and each is answered by a function of this package:

    loglikelihood           log p(continuation | context)     :func:`exact`, or -:func:`nelbo`
    loglikelihood_rolling   log p(text), in windows           :func:`likelihood`
    generate_until          text after a prompt               :func:`denoise`

The likelihood of a continuation is that of what the sampler writes after the context: blocks lie on
the grid of the whole text, and the context's tokens are given from the start, also those in the
block where the continuation begins. So it is no difference of the likelihoods of two texts, unless
the context ends at a border of blocks: inside a block, a text alone is written in any order.

It needs the extra ``lm-eval``. Importing the package does not import this module; importing this
module registers the model ``"bd3lm"``, and ``python -m transformer_lens_bd3lm.lm_eval`` is the
harness's own command with that model.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.texts import bos_of, tokens_of
from transformer_lens_bd3lm.checks import check_int, check_tokenizer
from transformer_lens_bd3lm.denoising.denoise import denoise
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.step import RevealedStep
from transformer_lens_bd3lm.denoising.stop import EndOfText
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import likelihood
from transformer_lens_bd3lm.likelihoods.exact import exact
from transformer_lens_bd3lm.likelihoods.likelihood_settings import read_settings
from transformer_lens_bd3lm.likelihoods.nelbo import nelbo
from transformer_lens_bd3lm.model.config import trained_block_sizes
from transformer_lens_bd3lm.model.subs import without_mask
from transformer_lens_bd3lm.progress import progress_bar

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(
        "lm_eval (lm-evaluation-harness) is not installed: "
        "pip install 'lm_eval>=0.4.13,<0.5' (the extra [lm-eval])"
    ) from error

Encoded = tuple[Any, list[int], list[int]]  # strings, ids of the context, ids of the continuation

MOST_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("bd3lm")
class BD3LM(TemplateLM):
    """A BD3LM bridge as a model of lm-evaluation-harness.

    Attributes:
        bridge: the bridge.
        settings: settings of the likelihoods: block size, method, seed.
        cut: number of contexts of ``loglikelihood`` that were cut from the left, because context
            and continuation were longer than the model's context.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        block_size: int | str | None = None,
        method: str | None = None,
        replicates: int = 8,
        seed: int = 0,
        stride: int | None = None,
        max_states: int = 256,
        rows: int = 2048,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        progress: bool | None = None,
    ):
        """Read the arguments, which are also those of the harness's ``model_args``.

        Args:
            pretrained: a BD3LM bridge with a tokenizer, or a checkpoint's name, which is booted.
            block_size: tokens per block, or ``"full"``; the bridge's by default.
            method: ``"exact"``, ``"stratified"`` or ``"monte_carlo"``; by default exact where a
                block has at most ``max_states`` mask patterns, else Monte Carlo.
            replicates: number of estimates of the bound that are averaged.
            seed: random seed of the mask draws, and of what is written.
            stride: tokens by which windows of a rolling likelihood move on, as in ``likelihood``.
            max_states: largest number of mask patterns of the exact sum.
            rows: largest number of positions in one pass of a likelihood.
            batch_size: number of texts that are written at once; ``"auto"`` is 16.
            max_batch_size: unused; the harness passes it on.
            device: of a checkpoint that is booted; TransformerLens's choice by default.
            dtype: of a checkpoint that is booted, a name such as ``"float64"``.
            progress: show a bar; by default on a terminal.

        Raises:
            InputError: for an argument that does not fit, or a bridge without a tokenizer.
            CheckpointError: for a name whose checkpoint cannot be loaded.
        """
        super().__init__()
        if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise InputError(f'dtype={dtype!r}: give the name of a torch type, as "float32"')
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None  # the command's default, which a machine without CUDA cannot mean
        at: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}
        self.bridge: Any = read_bridge(pretrained, **at)
        check_tokenizer(self.bridge, "the harness asks about texts; boot it with a tokenizer")
        self.tokenizer = self.bridge.tokenizer
        self.batch_size = check_int("batch_size", 16 if batch_size == "auto" else batch_size, 1)
        options = {"stride": stride, "max_states": max_states, "rows": rows}
        estimates = {"replicates": replicates, "seed": seed, "strata": "permuted", "clip": None}
        self.settings = read_settings(
            self.bridge, block_size, method, **estimates, **options, scope="active"
        )
        self.progress = progress
        self.cut = 0

    @property
    def kind(self) -> str:
        """``"exact"``: log-likelihoods under the sampler; ``"bound"``: estimates of -NELBO."""
        return "exact" if self.settings.method == "exact" else "bound"

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token; that of BOS without one."""
        ends = self._ends()
        return bos_of(self.bridge) if ends is None else ends

    @property
    def prefix_token_id(self) -> int:
        """Id of BOS, which every text begins with."""
        return bos_of(self.bridge)

    @property
    def tokenizer_name(self) -> str:
        """Name of the checkpoint, for the harness's caches."""
        return str(self.bridge.cfg.model_name)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into ``results["config"]``: what was measured, and how."""
        settings, config = self.settings, self.bridge.original_model.config
        trained = trained_block_sizes(config)
        return {
            "model_name": self.tokenizer_name,
            "block_size": settings.block_size,
            "trained_block_sizes": list(trained),
            "likelihood": self.kind,
            "likelihood_method": settings.method,
            "likelihood_replicates": 1 if self.kind == "exact" else settings.replicates,
            "is_greedy": "left to right, each token the likeliest at its turn",
            "contexts_cut": self.cut,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return ids of a string by this package's rule: BOS, unless it is declined, and tokens."""
        (ids,) = tokens_of(self.bridge, [string], prepend_bos=add_special_tokens is not False)
        return ids.tolist()

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Compute log p of each continuation given its context, in nats, and whether it is greedy.

        Requests of one length, with contexts of one length, share passes.

        Raises:
            InputError: for a continuation that is longer than the model's context.
        """
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        groups: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            ids, given = self._fitted(context, continuation)
            if continuation:
                groups.setdefault((len(ids), given), []).append((number, ids))
        progress = False if disable_tqdm else self.progress
        with progress_bar("loglikelihood", len(requests), progress) as update:
            for group, ((_, given), members) in enumerate(sorted(groups.items())):
                numbers, rows = zip(*members, strict=True)
                tokens = torch.tensor(rows, device=self.bridge.cfg.device)
                log_p = self._log_p(tokens, given, group)
                pairs = zip(log_p.tolist(), self._is_greedy(tokens, given).tolist(), strict=True)
                for number, pair in zip(numbers, pairs, strict=True):
                    results[number] = pair
                update(advance=len(members))
        return results

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """Return the ids of a text that fits the model's context, and how many of them are given.

        Raises:
            InputError: if the continuation alone does not fit behind BOS.
        """
        longest = self.bridge.cfg.n_ctx
        if len(continuation) >= longest:
            raise InputError(
                f"a continuation has {len(continuation)} tokens, and the context holds {longest}, "
                "BOS included: ask for its rolling likelihood"
            )
        over = len(context) + len(continuation) - longest
        if over > 0:
            self.cut += 1
            context = [context[0], *context[1 + over :]]
        return [*context, *continuation], len(context)

    def _log_p(self, tokens: Int[Tensor, "batch pos"], given: int, group: int) -> Tensor:
        """Compute log p of the tokens after the first ``given`` ones, or its bound, nats."""
        settings = self.settings
        options: dict[str, Any] = {"given": given, "rows": settings.rows}
        if settings.method == "exact":
            options["max_states"] = settings.max_states
            return -exact(self.bridge, tokens, settings.block_size, **options).nll
        draws = np.random.SeedSequence([settings.seed, group])
        options |= {"method": settings.method, "replicates": settings.replicates}
        options |= {"seed": int(draws.generate_state(1)[0])}
        return -nelbo(self.bridge, tokens, settings.block_size, **options).nats

    @torch.no_grad()
    def _is_greedy(self, tokens: Int[Tensor, "batch pos"], given: int) -> Bool[Tensor, " batch"]:
        """Return whether each token after the given ones is the likeliest, from left to right.

        Each place of all blocks is read in one pass, with the places before it revealed.
        """
        bridge, config = self.bridge, self.bridge.original_model.config
        mask_id, size = bridge.cfg.mask_token_id, self.settings.block_size
        position = torch.arange(tokens.shape[1], device=tokens.device)
        written, place = position >= given, position % size
        greedy = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        for rank in sorted(set(place[written].tolist())):
            at = written & (place == rank)
            masked = written & (place >= rank)
            for rows in torch.arange(len(tokens)).split(max(self.settings.rows // len(place), 1)):
                ids = tokens[rows]
                if config.causal:
                    logits = bridge(ids).roll(1, dims=1)
                else:
                    dual = {"clean": ids, "block_size": size} if config.cross_attn else {}
                    logits = bridge(ids.masked_fill(masked, mask_id), **dual)
                best = without_mask(logits[:, at], mask_id).argmax(-1)
                greedy[rows] &= (best == ids[:, at]).all(-1)
        return greedy

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Compute log p of whole texts in nats, as :func:`likelihood` does for them together.

        That of a text without tokens is 0.
        """
        settings, texts = self.settings, [request.args[0] for request in requests]
        if not any(self.tok_encode(text, add_special_tokens=False) for text in texts):
            return [0.0] * len(texts)
        result = likelihood(
            self.bridge, texts, settings.block_size, settings.method,
            replicates=settings.replicates, seed=settings.seed, stride=settings.stride,
            max_states=settings.max_states, rows=settings.rows,
            progress=False if disable_tqdm else self.progress,
        )  # fmt: skip
        return (0.0 - result.best.nats).tolist()  # 0.0, not -0.0, without tokens

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Write the text after each prompt, up to the first of its stop strings.

        Without sampling, tokens are the likeliest ones, and their order is first hitting's.

        Raises:
            InputError: for a generation option that denoising does not have.
        """
        texts = [""] * len(requests)
        groups: dict[Any, list[tuple[int, list[int]]]] = {}
        for number, request in enumerate(requests):
            prompt, options = request.args
            settings = _read_generation(options)
            groups.setdefault(settings, []).append((number, self.tok_encode(prompt)))
        progress = False if disable_tqdm else self.progress
        with progress_bar("generate_until", len(requests), progress) as update:
            for settings, members in groups.items():
                members.sort(key=lambda member: len(member[1]))
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    numbers, prompts = zip(*batch, strict=True)
                    written = self._write(list(prompts), list(numbers), *settings)
                    for number, text in zip(numbers, written, strict=True):
                        texts[number] = text
                    update(advance=len(batch))
        return texts

    def _write(
        self, prompts: list[list[int]], rows: list[int], until: tuple[str, ...], most: int,
        temperature: float, nucleus_p: float,
    ) -> list[str]:  # fmt: skip
        """Write a text after each prompt, with noise of its own row, whatever its batch."""
        if most == 0:
            return [""] * len(prompts)
        ends = self._ends()
        lengths = [len(prompt) for prompt in prompts]
        stop: list[Any] = [] if ends is None else [EndOfText(ends)]
        if until:
            stop.append(self._stop_rule(until, lengths))
        run = denoise(
            self.bridge, [torch.tensor(prompt) for prompt in prompts], max_new_tokens=most,
            block_size=self.settings.block_size, noise=Noise(self.settings.seed, rows=rows),
            stop=stop, temperature=temperature, nucleus_p=nucleus_p, progress=False,
        )  # fmt: skip
        texts = []
        for ids, start, end in zip(run.final.tolist(), lengths, run.ends.tolist(), strict=True):
            written = ids[start:end]
            written = written[: written.index(ends)] if ends in written else written
            texts.append(_before(self.tokenizer.decode(written), until))
        return texts

    def _stop_rule(
        self, until: tuple[str, ...], lengths: list[int]
    ) -> Callable[[RevealedStep], Tensor]:
        """Return the rule that ends a row when what it has written holds a stop string."""

        def rule(step: RevealedStep) -> Tensor:
            end = step.window[1]
            written = zip(step.after.tolist(), lengths, strict=True)
            texts = (self.tokenizer.decode(ids[start:end]) for ids, start in written)
            return torch.tensor([any(word in text for word in until) for text in texts])

        return rule

    def _ends(self) -> int | None:
        """Return the id of the end-of-text token, if it is one of the checkpoint's."""
        token = self.tokenizer.eos_token_id
        size = self.bridge.original_model.config.vocab_size
        known = token is not None and token < size and token != self.bridge.cfg.mask_token_id
        return token if known else None


def _read_generation(options: dict[str, Any]) -> tuple[tuple[str, ...], int, float, float]:
    """Return stop strings, largest number of new tokens, temperature and nucleus of a request.

    Raises:
        InputError: for an option that denoising does not have, or a value that does not fit.
    """
    left = dict(options)
    until = left.pop("until", None) or []
    strings = [until] if isinstance(until, str) else until
    if not isinstance(strings, list | tuple) or not all(isinstance(word, str) for word in strings):
        raise InputError(f"until={until!r}: give a string or several")
    lengths = [(name, left.pop(name, None)) for name in MOST_NEW]
    most = [_read_number(name, value, int) for name, value in lengths if value is not None]
    sample, temperature = left.pop("do_sample", None), left.pop("temperature", None)
    temperature = None if temperature is None else _read_number("temperature", temperature, float)
    if sample is None:
        sample = bool(temperature)
    temperature = (1.0 if temperature is None else temperature) if sample else 0.0
    top_p = left.pop("top_p", None)
    nucleus_p = _read_number("top_p", top_p, float) if sample and top_p is not None else 1.0
    if left.pop("num_beams", 1) != 1 or left:
        unknown = sorted(left) or ["num_beams"]
        raise InputError(
            f"generation options {', '.join(unknown)}: denoising has until, max_gen_toks, "
            "do_sample, temperature and top_p; leave the others out"
        )
    return tuple(word for word in strings if word), (most or [256])[0], temperature, nucleus_p


def _read_number(name: str, value: Any, kind: type) -> Any:
    """Return a generation option as a number of a type, 0 or more; a string may spell it.

    Raises:
        InputError: for anything else.
    """
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not number >= 0 or (not isinstance(value, str) and number != value):
        raise InputError(f"{name}={value!r}: give {'an int' if kind is int else 'a number'} >= 0")
    return number


def _before(text: str, until: Iterable[str]) -> str:
    """Return a text up to the first of some strings."""
    return text[: min((text.find(word) for word in until if word in text), default=len(text))]


def main() -> None:
    """Run the harness's own command, with the model ``bd3lm`` registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
