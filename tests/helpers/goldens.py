"""The goldens as tests use them: their names and views, their inputs, and what must come out."""

NAMES = ("bd3lm", "time_conditioned", "no_adaln", "full_diffusion", "autoregressive")
WITH_BLOCKS = ("bd3lm", "time_conditioned", "no_adaln")
VIEWS = [(name, view) for name in WITH_BLOCKS for view in ("dual", "sample16", "sample12")] + [
    ("full_diffusion", "single"),
    ("autoregressive", "single"),
    ("autoregressive", "clean"),
]
WITHIN = 1e-5


def inputs(g, view, device):
    """What the view was computed from, as arguments of a bridge."""
    x_t, x_0 = g["in/xt"].to(device), g["in/x0"].to(device)
    ids = {"dual": x_t, "sample16": x_t, "sample12": x_t[:, :12], "single": x_t, "clean": x_0}[view]
    clean = {"clean": x_0} if view == "dual" else {}
    return ids, {"timesteps": g["in/timesteps"].to(device)} | clean


def wanted(g, view):
    """A view's arrays by hook name; the dual view's readout is of the noisy half alone."""
    arrays = {}
    for key in g.keys(f"{view}/"):
        name = key.removeprefix(f"{view}/")
        array = g[key]
        if view == "dual" and name.startswith(("ln_final", "unembed")):
            array = array[:, : array.shape[1] // 2]
        arrays[name] = array
    return arrays


def found(bridge, g, view, device):
    ids, kwargs = inputs(g, view, device)
    logits, cache = bridge.run_with_cache(ids, **kwargs)
    return lambda name: logits if name == "logits" else cache[name]
