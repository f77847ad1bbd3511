"""The app: its name, its version, and the help that is printed without a command."""

from importlib.metadata import version
from typing import Annotated

import typer

app = typer.Typer(
    name="bd3lm",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    """Print the version, and end."""
    if wanted:
        typer.echo(f"bd3lm {version('transformer-lens-bd3lm')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def bd3lm(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Look inside block-diffusion language models (BD3LM), with TransformerLens.

    Try: bd3lm demo
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
