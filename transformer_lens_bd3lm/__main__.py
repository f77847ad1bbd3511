"""``python -m transformer_lens_bd3lm`` is the command line."""

from transformer_lens_bd3lm.cli import main

main()
