"""The recipes that made the embedded models: small BD3LMs trained over the whole dial.

Every step draws a block size B, so that one set of weights is on-distribution from autoregressive
(B = 1) to full diffusion. The loss is the NELBO with its integral over time done in closed form:
for a block of k maskable tokens, draw the number of masks m uniformly from 1..k and a subset of
that size uniformly, and ::

    loss = sum over blocks of  (k / m) * sum over masked i of  -log p(x_i | x_t, clean earlier
    blocks)

Its expectation is the NELBO of Arriola et al. (equation 8 with the log-linear schedule), because
the integral of t^(m-1) (1-t)^(k-m) over t is 1 / (m C(k, m)). At B = 1 it is the exact
autoregressive NLL. The numbers of masks are stratified over the blocks of a batch, the strata
permuted.

Where the rows come from is a function of the generator: windows of a text for the default,
``grammar.sample`` for the grammar. Everything random comes from (seed, step), so a run that was
stopped resumes as if it had not been: ``bd3lm train TRAIN.txt VALID.txt OUT`` does both. It resumes
from the recipe and texts that it was begun with, and no others; see ``training_folder.py``.

Nothing here is needed to study a checkpoint; several processes and mixed corpora are out of scope.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from transformer_lens_bd3lm import grammar
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.config import BD3LMConfig
from transformer_lens_bd3lm.training.folder import (
    begin,
    fingerprint,
    read_begun,
    whole_files,
)
from transformer_lens_bd3lm.training.loss import masked_nll

BOS = "<|endoftext|>"
MASK = "[MASK]"

Rows = Callable[[int, torch.Generator], Int[Tensor, "batch pos"]]
"""So many random rows, each BOS and tokens."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, beside where the rows come from.

    Attributes:
        vocab_size: tokens, the mask (last id) included.
        context: tokens a row, BOS included.
        block_sizes: the dial's settings, one drawn a step; each divides ``context``. One that is
            there twice is drawn twice as often.
        hidden_dim: width of the residual stream.
        n_blocks: layers.
        n_heads: heads.
        cond_dim: width of the conditioning vector.
        dropout: residual dropout.
        steps: optimizer steps.
        schedule: steps of the cosine; where it outlasts the run, the average does the annealing.
        batch: rows a step.
        learning_rate: peak of the cosine schedule.
        warmup: steps of linear warm-up.
        weight_decay: AdamW's.
        ema: decay of the averaged weights, which are what ships.
        autocast: forward in bfloat16; a very small model is as fast without.
        seed: of weights, data order, masks and dropout.
    """

    vocab_size: int = 1024
    context: int = 256
    block_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 256)
    hidden_dim: int = 192
    n_blocks: int = 6
    n_heads: int = 6
    cond_dim: int = 32
    dropout: float = 0.0
    steps: int = 3_000
    schedule: int = 4_000
    batch: int = 16
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.05
    ema: float = 0.999
    autocast: bool = True
    seed: int = 0

    def config(self) -> BD3LMConfig:
        """The checkpoint's config: the released architecture, small."""
        return BD3LMConfig(
            block_size=4, model_length=self.context, vocab_size=self.vocab_size,
            hidden_dim=self.hidden_dim, cond_dim=self.cond_dim, n_blocks=self.n_blocks,
            n_heads=self.n_heads, dropout=self.dropout, attn_backend="sdpa", var_min=False,
            architectures=["BD3LM"], dtype="float32", bos_token_id=0,
            eos_token_id=0, trained_block_sizes=sorted(set(self.block_sizes)),
        )  # fmt: skip


GRAMMAR_RECIPE = Recipe(
    vocab_size=grammar.MASK + 1, context=grammar.CONTEXT, block_sizes=(1, 2, 4, 8, 8),
    hidden_dim=64, n_blocks=3, n_heads=4, cond_dim=8, steps=4_000, schedule=4_000, batch=256,
    learning_rate=3e-3, weight_decay=0.01, autocast=False,
)  # fmt: skip


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as a fast tokenizer; BOS (also EOS) is id 0, the mask the last id.

    Raises:
        InputError: if the text is too short for that many tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
    bpe.add_special_tokens([AddedToken(MASK, lstrip=True, special=True)])
    if bpe.get_vocab_size() != vocab_size:
        raise InputError(
            f"the text gives {bpe.get_vocab_size()} tokens, not vocab_size={vocab_size}: train on "
            "more text, or with a smaller vocabulary"
        )
    return fast(bpe)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Words between spaces; BOS is id 0, the mask the last id. Another word is an error."""
    vocabulary = {word: i for i, word in enumerate((BOS, *words, MASK))}
    whole = Tokenizer(models.WordLevel(vocabulary))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(whole)


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """As transformers takes it: BOS is also the end and the padding."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS, mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def windows(ids: Int[Tensor, " text"], context: int) -> Rows:
    """Rows of BOS (id 0) and ``context - 1`` consecutive tokens, from anywhere in a text.

    Raises:
        InputError: if the text is shorter than a row.
    """
    if len(ids) < context - 1:
        raise InputError(
            f"a text of {len(ids)} tokens: a row is BOS and {context - 1} more, give a longer text"
        )

    def draw(rows: int, generator: torch.Generator) -> Int[Tensor, "batch pos"]:
        starts = torch.randint(len(ids) - context + 2, (rows, 1), generator=generator)
        x_0 = ids[starts + torch.arange(context - 1)]
        return torch.cat([torch.zeros_like(starts), x_0], dim=1)

    return draw


def draw_masks(
    rows: int, context: int, block_size: int, generator: torch.Generator
) -> tuple[Tensor, Float[Tensor, "batch pos"]]:
    """Which positions are masked, and the weight ``k / m`` of each position's loss.

    Position 0 (BOS) is never masked. ``m`` is uniform on 1..k a block, stratified over all blocks.
    """
    blocks = context // block_size
    maskable = torch.full((rows, blocks), block_size)
    maskable[:, 0] -= 1
    count = rows * blocks
    strata = (
        torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    ) / count
    m = (strata.view(rows, blocks) * maskable).long().clamp(max=maskable - 1) + 1
    m = torch.where(maskable > 0, m, 0)
    order = torch.rand(rows, blocks, block_size, generator=generator)
    order[:, 0, 0] = 2.0
    masked = order.argsort(-1).argsort(-1) < m[..., None]
    weight = (maskable / m.clamp(min=1))[..., None].expand_as(masked)
    return masked.reshape(rows, context), weight.reshape(rows, context)


def nelbo_loss(
    model: BD3LM,
    x_0: Int[Tensor, "batch pos"],
    block_size: int,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """One unbiased draw of the NELBO, in nats a token (BOS not counted)."""
    rows, context = x_0.shape
    mask_id = model.config.vocab_size - 1
    masked, weight = draw_masks(rows, context, block_size, generator)
    x_t = torch.where(masked, mask_id, x_0)
    logits = model(x_t, clean=x_0, block_size=block_size, return_dict=False)
    nll = masked_nll(logits[masked], x_0[masked], mask_id)
    return (weight[masked] * nll).sum() / (rows * (context - 1))


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = min(1.0, (step - recipe.warmup) / max(1, recipe.schedule - recipe.warmup))
    return recipe.learning_rate * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * done)).item())


class Run:
    """Weights, their average, Adam's moments and the step: what a stopped run needs to go on."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.model = BD3LM(recipe.config())
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        plain = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": recipe.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.step = 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state under a flat name."""
        state = {f"ema/{name}": p for name, p in self.ema.items()}
        for name, p in self.model.named_parameters():
            state[f"model/{name}"] = p.detach()
            for key, value in self.optimizer.state[p].items():
                state[f"{key}/{name}"] = value
        return state

    def save(self, path: Path) -> None:
        """Write the state whole or not at all."""
        partial = path.with_suffix(".partial")
        metadata = {"step": str(self.step), "recipe": json.dumps(asdict(self.recipe))}
        save_file({k: v.contiguous() for k, v in self.tensors().items()}, partial, metadata)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Go on from a saved state.

        Raises:
            InputError: if it was written by another recipe, or is not whole.
        """
        try:
            self._load(path)
        except SafetensorError as error:
            raise InputError(
                f"{path} cannot be read as the state of a run ({error}): remove it to train anew"
            ) from error

    def _load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as saved:
            metadata = saved.metadata() or {}
            recipe = json.loads(metadata.get("recipe", "null"))
            if recipe != json.loads(json.dumps(asdict(self.recipe))):
                raise InputError(
                    f"{path} was written by another recipe: use another folder, or remove it"
                )
            self.step = int(metadata["step"])
            for name, p in self.model.named_parameters():
                p.data.copy_(saved.get_tensor(f"model/{name}"))
                self.ema[name].copy_(saved.get_tensor(f"ema/{name}"))
                self.optimizer.state[p] = {
                    key: saved.get_tensor(f"{key}/{name}")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }

    def advance(self, draw: Rows) -> tuple[int, float]:
        """One optimizer step; returns the block size drawn and the loss in nats a token."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)
        choice = int(torch.randint(len(recipe.block_sizes), (), generator=generator))
        block_size = recipe.block_sizes[choice]
        x_0 = draw(recipe.batch, generator)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, self.step)
        self.model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.autocast):
            loss = nelbo_loss(self.model, x_0, block_size, generator)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        for name, p in self.model.named_parameters():
            self.ema[name].lerp_(p.detach(), 1 - decay)
        return block_size, loss.item()

    @torch.no_grad()
    def validate(self, draw: Rows, block_size: int, rows: int = 64) -> float:
        """NELBO in nats a token of the averaged weights, on fixed rows and masks."""
        generator = torch.Generator().manual_seed(12345)
        own = {name: p.data for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            p.data = self.ema[name]
        self.model.eval()
        loss = nelbo_loss(self.model, draw(rows, generator), block_size, generator)
        for name, p in self.model.named_parameters():
            p.data = own[name]
        return loss.item()

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a checkpoint: float16 on disk, float32 when loaded."""
        model = BD3LM(self.recipe.config())
        model.load_state_dict(self.ema, strict=False)
        state = {
            name: (p if name.endswith("inv_freq") else p.half()).contiguous()
            for name, p in model.state_dict().items()
        }
        with whole_files(folder) as draft:
            model.config.save_pretrained(draft)
            save_file(state, draft / "model.safetensors", {"format": "pt"})


def train(
    recipe: Recipe, train_text: str, valid_text: str, out: Path
) -> Iterator[dict[str, float]]:
    """Train on a text, or go on, in ``out``; yields reports and ends with the export.

    Raises:
        InputError: if a text is too short, or ``out`` was begun with another recipe or other texts.
    """
    texts = {"training text": train_text, "validation text": valid_text}
    made_of: dict[str, Any] = {"recipe": asdict(recipe)}
    made_of |= {name: fingerprint(text.encode()) for name, text in texts.items()}
    begun = read_begun(out, made_of)
    tokenizer = train_tokenizer(train_text, recipe.vocab_size) if begun is None else begun
    ids = (torch.tensor(tokenizer(text)["input_ids"]) for text in texts.values())
    draws = [windows(each, recipe.context) for each in ids]
    if begun is None:
        begin(out, made_of, tokenizer)
    yield from go_on(recipe, *draws, out)


def train_grammar(out: Path, recipe: Recipe = GRAMMAR_RECIPE) -> Iterator[dict[str, float]]:
    """Train on the grammar, or go on, in ``out``; yields reports and ends with the export.

    Raises:
        InputError: if ``out`` was begun with something else.
    """
    made_of = {"recipe": asdict(recipe), "grammar": list(grammar.WORDS)}
    if read_begun(out, made_of) is None:
        begin(out, made_of, word_tokenizer(grammar.WORDS))
    yield from go_on(recipe, grammar.sample, grammar.sample, out)


def go_on(recipe: Recipe, draw: Rows, valid: Rows, out: Path) -> Iterator[dict[str, float]]:
    """From the state in ``out``, if there is one; yields a report every 250 steps, and exports."""
    run = Run(recipe)
    state = out / "state.safetensors"
    if state.exists():
        run.load(state)
    recent: list[float] = []
    while run.step < recipe.steps:
        _, loss = run.advance(draw)
        recent.append(loss)
        if run.step % 250 == 0 or run.step == recipe.steps:
            run.save(state)
            report = {"step": run.step, "loss": sum(recent) / len(recent)}
            if run.step % 1000 == 0 or run.step == recipe.steps:
                sizes = [size for size in (1, 4, 16) if recipe.context % size == 0]
                for size in dict.fromkeys([*sizes, recipe.context]):
                    report[f"valid_{size}"] = run.validate(valid, size)
            recent.clear()
            yield report
    run.export(out)
