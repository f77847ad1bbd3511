"""The app that every command is registered in."""

import typer

app = typer.Typer(
    name="bd3lm",
    help="Interpretability of block-diffusion language models (BD3LM), with TransformerLens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
