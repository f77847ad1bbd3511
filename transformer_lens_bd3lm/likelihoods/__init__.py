"""How likely a model finds a text: exact sums, bounds, whole corpora."""
