"""``bd3lm demo``: every hook of one pass, and an edit at chosen denoising steps."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from bd3lm_cli import typed
from bd3lm_cli.models import boot
from bd3lm_cli.options import DefaultModel, Device, MaxNewTokens, Seed
from bd3lm_cli.terminal import LiveCanvas, console
from bd3lm_cli.typed import text as check_text

if TYPE_CHECKING:
    from transformer_lens_bd3lm.bridge.host import Bridge


def demo(
    model: DefaultModel = "tiny",
    prompt: Annotated[
        str, typer.Option(help="Text that the model continues.", callback=check_text)
    ] = "O Romeo, Romeo",
    masked: Annotated[
        str, typer.Option(help="Text with one [MASK], for the single pass.", callback=check_text)
    ] = "To be, or not to [MASK]",
    max_new_tokens: MaxNewTokens = 32,
    layer: Annotated[
        int | None,
        typer.Option(
            help="Layer of the edit; by default the middle one.", parser=typed.whole(0), metavar="N"
        ),
    ] = None,
    toward: Annotated[
        str, typer.Option(help="Token that the edit pushes toward.", callback=check_text)
    ] = " king",
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Show every hook point of a pass, then denoising with and without an edit at some steps.

    Try: bd3lm demo
    """
    bridge = boot(model, device)
    _show_model(bridge)
    _show_pass(bridge, masked)
    _show_denoising(bridge, prompt, max_new_tokens, layer, toward, seed)


def _show_model(bridge: "Bridge") -> None:
    """Print a line about the model and its adapter."""
    cfg = bridge.cfg
    console.print(
        Text(Path(cfg.model_name).name, "bold"),
        f": {bridge.n_params_total / 1e6:.1f} M parameters, "
        f"{cfg.n_layers} "
        f"layers, context {cfg.n_ctx}, block size {cfg.block_size} of 1..{cfg.n_ctx}; "
        f"adapter {type(bridge.adapter).__module__.split('.')[0]}",
        sep="",
    )


def _show_pass(bridge: "Bridge", text: str) -> None:
    """Print the hook tree of a cached pass, a pattern's shape, and a lens on the masked token."""
    import torch

    import transformer_lens_bd3lm as bd3lm
    from transformer_lens_bd3lm.show.hook_tree import hook_tree
    from transformer_lens_bd3lm.show.tables import new_table

    ids = bridge.to_tokens(text)
    masks = (ids[0] == bridge.cfg.mask_token_id).nonzero()[:, 0].tolist()
    if len(masks) != 1:
        raise typer.BadParameter(f"{text!r} has {len(masks)} masks: give one [MASK]")
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

    title = f"what each layer would put at [MASK] in {text!r}"
    ranks = [f"top {rank}" for rank in range(1, 4)]
    table = new_table(title, ["after", *ranks], ["after", *ranks], "")
    for index, log_p in enumerate(bd3lm.logit_lens(bridge, cache, ids, masks[0])[:, 0]):
        top = log_p.exp().topk(3)
        words = [
            f"{bridge.tokenizer.decode([i])!r} {p:.2f}"
            for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        table.add_row("embedding" if index == 0 else f"layer {index - 1}", *words)
    console.print(table)


def _show_denoising(
    bridge: "Bridge", prompt: str, tokens: int, layer: int | None, toward: str, seed: int
) -> None:
    """Write without an edit, and with one at the first step of each block, under the same noise."""
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
    options = {"max_new_tokens": tokens, "noise": bd3lm.Noise(seed), "progress": False}
    with LiveCanvas(bridge, "without the hook", tokens, console) as canvas:
        run = bd3lm.denoise(bridge, prompt, on_step=canvas.show, **options)
    console.print(
        Text("Replay", "bold"), '      bd3lm.replay(run, hooks, "coupled"): the same noise', sep=""
    )
    console.print(bd3lm.replay(run, hooks, "coupled").table())
