"""The network itself, as plain modules: config, masks, inputs, forward, SUBS."""
