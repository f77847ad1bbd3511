"""Names of the hook points that tests read and edit, from the table of hook points."""

from transformer_lens_bd3lm.bridge.hook_points import HOOK_POINTS, expand

LAYERS = range(2)
# TransformerLens's linears fire where another hook point has just fired, on the same tensor.
PLUMBING = ("mlp.in.hook_in", "mlp.out.hook_out")


def names_of(has_adaln):
    """List the main name of each hook point that always fires and holds numbers to edit."""
    names = []
    for spec in HOOK_POINTS:
        only_adaln = spec.kind in ("conditioning", "modulation")
        if spec.kind == "ids" or spec.flag is not None or (only_adaln and not has_adaln):
            continue
        for name in expand(spec.pattern):
            if name.removeprefix("blocks.{i}.") in PLUMBING:
                continue
            layers = LAYERS if "{i}" in name else (0,)
            names += [name.replace("{i}", str(i)) for i in layers]
    return names
