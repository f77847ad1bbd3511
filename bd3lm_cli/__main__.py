"""``python -m bd3lm_cli`` is the command ``bd3lm``."""

from bd3lm_cli import main

main()
