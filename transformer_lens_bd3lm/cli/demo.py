"""``bd3lm demo``: the main job in half a minute."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from transformer_lens_bd3lm.cli.app import MOST, ModelOption, app, boot
from transformer_lens_bd3lm.show.terminal import Canvases, console, hook_tree


@app.command()
def demo(
    model: ModelOption = None,
    prompt: Annotated[str, typer.Option(help="What the model goes on from.")] = "O Romeo, Romeo",
    masked: Annotated[
        str, typer.Option(help="A text with one [MASK], for the single forward.")
    ] = "To be, or not to [MASK]",
    tokens: Annotated[int, typer.Option(help="Tokens to write.", min=1, max=MOST)] = 32,
    layer: Annotated[
        int | None, typer.Option(help="Layer of the edit; the middle by default.")
    ] = None,
    toward: Annotated[str, typer.Option(help="The token that the edit pushes to.")] = " king",
    seed: Annotated[
        int, typer.Option(help="Of the noise that both runs share.", min=0, max=2**64 - 1)
    ] = 0,
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
        Text(Path(cfg.model_name).name, "bold"),
        f": {bridge.n_params_total / 1e6:.1f} M parameters, "
        f"{cfg.n_layers} "
        f"layers, context {cfg.n_ctx}, block size {cfg.block_size} on the dial 1..{cfg.n_ctx}; "
        f"adapter {type(bridge.adapter).__module__.split('.')[0]}",
        sep="",
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
        Text("\nOne forward", "bold"),
        f"   logits, cache = bridge.run_with_cache({text!r}, pad_block=True)",
        sep="",
    )
    console.print(hook_tree(bridge, cache))
    shape = tuple(cache["blocks.0.attn.hook_pattern"].shape)
    console.print(f'cache["blocks.0.attn.hook_pattern"]: {shape}, batch x head x query x key')

    title = Text(f"what each layer would put at [MASK] in {text!r}", "table.title")
    table = Table(title=title, title_justify="left")
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
        Text("\nDenoising", "bold"),
        f'   StepHooks().add("{name}", push, step=0): at the first step of every block, the '
        f"residual is pushed toward {bridge.tokenizer.decode([target])!r}",
        sep="",
    )
    how = {"max_new_tokens": tokens, "noise": bd3lm.Noise(seed), "progress": False}
    with Canvases(bridge, "without the hook", tokens) as canvases:
        run = bd3lm.denoise(bridge, prompt, on_step=canvases.show, **how)
    console.print(
        Text("Replay", "bold"), '      bd3lm.replay(run, hooks, "coupled"): the same noise', sep=""
    )
    console.print(bd3lm.replay(run, hooks, "coupled").table())
