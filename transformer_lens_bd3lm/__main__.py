"""``python -m transformer_lens_bd3lm`` is the command line, the package ``bd3lm_cli``."""

from runpy import run_module

run_module("bd3lm_cli", run_name="__main__")
