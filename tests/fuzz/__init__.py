"""Fuzzing of every reader of files: an error of the package or the right object, nothing else.

One module a reader; ``engine`` says what must hold of a reading, ``mutate`` makes inputs, and
``python -m tests.fuzz READER`` runs them, guided by coverage. ``test_replay`` reads what was kept.
"""

READERS = (
    "sae",
    "conllu",
    "corpus",
    "run",
    "ledger",
    "harvest",
    "lightning",
    "training",
    "weights",
    "config",
    "tokenizer",
    "pairs",
)
