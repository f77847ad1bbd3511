"""The command line: ``bd3lm demo``, ``generate``, ``info``, ``likelihood`` and ``train``.

Every command is a few calls of the public surface and a table; nothing is computed here.
"""

import contextlib
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from transformer_lens_bd3lm.errors import BD3LMError
from transformer_lens_bd3lm.terminal import Canvases, compare, console, hook_tree

app = typer.Typer(
    help="Block-diffusion language models, opened up for interpretability.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ModelOption = Annotated[
    str | None, typer.Option(help="Hub id or folder; the embedded default if not given.")
]
ModelArgument = Annotated[
    str, typer.Argument(help='Hub id or folder; "tiny" is the embedded default.')
]


def boot(model: str | None, device: str | None = None) -> Any:
    """The bridge of a Hub id or folder; the embedded default for None and ``"tiny"``."""
    from transformer_lens.model_bridge import TransformerBridge

    import transformer_lens_bd3lm as bd3lm

    name = bd3lm.TINY if model in (None, "tiny") else model
    with console.status("loading ..."), quiet():
        return TransformerBridge.boot_transformers(name, device=device)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own progress bar out of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@app.command()
def demo(
    model: ModelOption = None,
    prompt: Annotated[str, typer.Option(help="What the model goes on from.")] = "O Romeo, Romeo",
    masked: Annotated[
        str, typer.Option(help="A text with one [MASK], for the single forward.")
    ] = "To be, or not to [MASK]",
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 32,
    layer: Annotated[
        int | None, typer.Option(help="Layer of the edit; the middle by default.")
    ] = None,
    toward: Annotated[str, typer.Option(help="The token that the edit pushes to.")] = " king",
    seed: Annotated[int, typer.Option(help="Of the noise that both runs share.")] = 0,
) -> None:
    """One forward with every hook, then denoising with an edit at chosen steps, against none."""
    bridge = boot(model)
    show_model(bridge)
    show_forward(bridge, masked)
    show_denoising(bridge, prompt, tokens, layer, toward, seed)


def show_model(bridge: Any) -> None:
    """One line about what was booted, and by whose adapter."""
    cfg = bridge.cfg
    console.print(
        f"[bold]{Path(cfg.model_name).name}[/]: {bridge.n_params_total / 1e6:.1f} M parameters, "
        f"{cfg.n_layers} "
        f"layers, context {cfg.n_ctx}, block size {cfg.block_size} on the dial 1..{cfg.n_ctx}; "
        f"adapter {type(bridge.adapter).__module__.split('.')[0]}"
    )


def show_forward(bridge: Any, text: str) -> None:
    """The hook tree of a cached forward, a pattern's shape, and a lens on the masked token."""
    from transformer_lens_bd3lm.analysis.lens import logit_lens

    ids = bridge.to_tokens(text)
    at = (ids[0] == bridge.cfg.mask_token_id).nonzero()[:, 0].tolist()
    if len(at) != 1:
        raise typer.BadParameter(f"{text!r} has {len(at)} masks: give one [MASK]")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids, pad_block=True)
    ids = torch.cat(
        [
            ids,
            ids.new_full(
                (1, cache["hook_embed"].shape[1] - ids.shape[1]), bridge.cfg.mask_token_id
            ),
        ],
        1,
    )
    console.print(
        f'\n[bold]One forward[/]   logits, cache = bridge.run_with_cache("{text}", pad_block=True)'
    )
    console.print(hook_tree(bridge, cache))
    shape = tuple(cache["blocks.0.attn.hook_pattern"].shape)
    console.print(f'cache["blocks.0.attn.hook_pattern"]: {shape}, batch x head x query x key')

    table = Table(title=f"what each layer would put at [MASK] in {text!r}", title_justify="left")
    table.add_column("after", justify="right")
    for rank in range(1, 4):
        table.add_column(f"top {rank}")
    for index, log_p in enumerate(logit_lens(bridge, cache, ids, at[0])[:, 0]):
        top = log_p.exp().topk(3)
        words = [
            f"{bridge.tokenizer.decode([i])!r} {p:.2f}"
            for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        table.add_row("embedding" if index == 0 else f"layer {index - 1}", *words)
    console.print(table)


def show_denoising(
    bridge: Any, prompt: str, tokens: int, layer: int | None, toward: str, seed: int
) -> None:
    """Write with an edit at the first step of each block and without, under the same noise."""
    import transformer_lens_bd3lm as bd3lm

    layer = bridge.cfg.n_layers // 2 if layer is None else layer
    target = bridge.tokenizer(toward, add_special_tokens=False)["input_ids"][0]
    direction = bridge.unembed.W_U[:, target].detach()
    direction = direction / direction.norm()

    def push(resid: Any, hook: Any, step: Any) -> Any:
        return resid + 0.75 * resid.norm(dim=-1, keepdim=True) * direction

    name = f"blocks.{layer}.hook_resid_post"
    hooks = bd3lm.StepHooks().add(name, push, step=0)
    console.print(
        f'\n[bold]Denoising[/]   StepHooks().add("{name}", push, step=0): at the first step of '
        "every block, the "
        f"residual is pushed toward {bridge.tokenizer.decode([target])!r}"
    )
    how = {"max_new_tokens": tokens, "noise": bd3lm.Noise(seed), "progress": False}
    with Canvases(bridge, "without the hook", tokens) as canvases:
        run = bd3lm.denoise(bridge, prompt, on_step=canvases.show, **how)
    console.print('[bold]Replay[/]      bd3lm.replay(run, hooks, "coupled"): the same noise')
    compare(bd3lm.replay(run, hooks, "coupled"))


class Order(str, Enum):
    """Names of the samplers on the command line."""

    first_hitting = "first-hitting"
    ancestral = "ancestral"
    confidence = "confidence"


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[list[str] | None, typer.Argument(help="One or more; BOS if none.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    block_size: Annotated[
        str | None, typer.Option(help='The dial: tokens a block, or "full".')
    ] = None,
    sampler: Annotated[Order, typer.Option(help="Who is revealed next.")] = Order.first_hitting,
    steps: Annotated[int, typer.Option(help="Steps a block, for ancestral.")] = 64,
    temperature: Annotated[float, typer.Option(help="1 is the model's own; 0 the argmax.")] = 1.0,
    nucleus_p: Annotated[float, typer.Option(help="Mass of the (usual) nucleus.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    stop: Annotated[bool, typer.Option(help="End a row at its end-of-text token.")] = False,
    stream: Annotated[bool, typer.Option(help="Show the canvas filling in.")] = False,
    save: Annotated[Path | None, typer.Option(help="A new folder for the run.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps.")] = None,
) -> None:
    """Write text by denoising, block after block."""
    import transformer_lens_bd3lm as bd3lm

    if sampler is Order.ancestral:
        how = bd3lm.Ancestral(steps=steps, temperature=temperature, nucleus_p=nucleus_p)
    else:
        kind = bd3lm.FirstHitting if sampler is Order.first_hitting else bd3lm.Confidence
        how = kind(temperature=temperature, nucleus_p=nucleus_p)
    dial = int(block_size) if block_size and block_size.isdigit() else block_size
    bridge = boot(model, device)
    shown = Canvases(bridge, "denoising", tokens) if stream else contextlib.nullcontext()
    with shown as canvases:
        run = bd3lm.denoise(
            bridge,
            prompt or None,
            max_new_tokens=tokens,
            block_size=dial,
            sampler=how,
            noise=bd3lm.Noise(seed),
            stop=bd3lm.EndOfText() if stop else None,
            progress=False if stream else None,
            on_step=canvases.show if canvases else None,
        )
    for text in run.text:
        console.print(text, markup=False, soft_wrap=True)
    console.print(f"[dim]{escape(repr(run))}[/]")
    if save is not None:
        run.save(save)
        console.print(f"saved in {save}")


@app.command()
def info(model: ModelArgument) -> None:
    """What a checkpoint is, from its config and file headers: nothing loaded, no code run."""
    from transformers import AutoConfig, AutoTokenizer

    import transformer_lens_bd3lm as bd3lm
    from transformer_lens_bd3lm.checkpoint.weights import check_weights, weight_shapes

    name = bd3lm.TINY if model == "tiny" else model
    try:
        config = AutoConfig.from_pretrained(name)
    except BD3LMError:
        raise
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{model} could not be read: {str(error).splitlines()[0]}"
        ) from error
    if config.model_type != "bd3lm":
        raise typer.BadParameter(f"{model} is a {config.model_type!r} checkpoint, not BD3LM")
    check_weights(name, config)
    shapes = weight_shapes(name)
    parameters = sum(
        torch.Size(shape).numel() for key, shape in shapes.items() if "inv_freq" not in key
    )
    kind = (
        "block diffusion"
        if config.cross_attn
        else "autoregressive"
        if config.causal
        else "full diffusion"
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        mask = tokenizer.mask_token or "added when booted"
        spoken = f"{len(tokenizer)} tokens, mask {mask}"
    except BD3LMError as error:
        spoken = f"none: {error}"
    table = Table(title=str(model), title_justify="left", show_header=False)
    rows = {
        "kind": kind,
        "parameters": f"{parameters / 1e6:.1f} M, names and shapes as the config calls for",
        "layers x heads x width": f"{config.n_blocks} x {config.n_heads} x {config.hidden_dim}",
        "context": f"{config.model_length} tokens",
        "block size": f"{config.block_size} (trained); the dial goes from 1 to "
        f"{config.model_length}"
        if config.cross_attn
        else "no blocks",
        "vocabulary": f"{config.vocab_size}",
        "tokenizer": spoken,
        "adaLN": f"yes, conditioning {config.cond_dim} wide" if config.adaln else "no",
        "sees t": "yes: no cache, nothing folds"
        if config.time_conditioning
        else "no: cached denoising is exact",
    }
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table)


@app.command()
def likelihood(
    model: ModelArgument,
    text: Annotated[Path, typer.Argument(help="A text file.", exists=True, dir_okay=False)],
    block_size: Annotated[
        list[int] | None, typer.Option(help="Settings of the dial; repeat. Powers of 2 by default.")
    ] = None,
    replicates: Annotated[int, typer.Option(help="Independent draws beyond block size 1.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """NELBO of a text over the dial: exact NLL at block size 1, an estimated bound beyond."""
    from transformer_lens_bd3lm.diffusion.likelihood import over_the_dial

    bridge = boot(model)
    context = bridge.cfg.n_ctx
    sizes = block_size or [2**k for k in range(context.bit_length()) if context % 2**k == 0]
    table = Table(
        title=f"{text.name} under {Path(bridge.cfg.model_name).name}", title_justify="left"
    )
    for column in ("block size", "nats/token", "± s.e.", "bits/character", "what it is"):
        table.add_column(column, justify="left" if column == "what it is" else "right")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("likelihood", total=len(sizes))
        for row in over_the_dial(bridge, text.read_text(), sizes, replicates=replicates, seed=seed):
            what = "exact NLL" if row.exact else f"NELBO (a bound), {replicates} draws"
            error = "0" if row.exact else f"{row.standard_error:.4f}"
            table.add_row(
                str(row.block_size),
                f"{row.nats_per_token:.4f}",
                error,
                f"{row.bits_per_character:.4f}",
                what,
            )
            progress.advance(task)
    console.print(table)
    console.print(f"{row.tokens} tokens counted; BOS never is")


@app.command()
def train(
    train_file: Annotated[
        Path, typer.Argument(help="Text to train on.", exists=True, dir_okay=False)
    ],
    valid_file: Annotated[
        Path, typer.Argument(help="Text to validate on.", exists=True, dir_okay=False)
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the checkpoint; a stopped run goes on.")],
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, other than the recipe's.")
    ] = None,
) -> None:
    """Train the embedded default's recipe on a text; stopped, it goes on where it was."""
    from transformer_lens_bd3lm.diffusion.train import Recipe
    from transformer_lens_bd3lm.diffusion.train import train as run

    recipe = Recipe() if steps is None else Recipe(steps=steps, schedule=steps)
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=recipe.steps)
        for report in run(recipe, train_file.read_text(), valid_file.read_text(), out):
            told = "  ".join(f"{key} {value:.4g}" for key, value in report.items())
            progress.update(task, completed=report["step"])
            progress.console.print(told)


def main() -> None:
    """Run the command line; an error of ours is one message, not a traceback."""
    try:
        app()
    except BD3LMError as error:
        console.print(f"[bold red]error:[/] {error}", soft_wrap=True)
        sys.exit(1)
