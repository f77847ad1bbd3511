"""Settings of a corpus's likelihood, checked before anything is run."""

from dataclasses import dataclass
from typing import Any

from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.mask_draws import Clip
from transformer_lens_bd3lm.likelihoods.mask_patterns import too_many_patterns
from transformer_lens_bd3lm.likelihoods.nelbo import check_choices


@dataclass(frozen=True)
class LikelihoodSettings:
    """What decides the likelihood of a window, beside the weights; as in :func:`likelihood`."""

    block_size: int
    method: str
    replicates: int
    seed: int
    strata: str
    clip: Clip | None
    scope: str
    stride: int | None
    max_states: int
    rows: int

    @property
    def kind(self) -> Any:
        """Kind of the bound: ``"exact"``, ``"estimate"`` or ``"biased"``."""
        if self.method == "exact":
            return "exact"
        return "biased" if self.clip is not None or self.strata == "public" else "estimate"


def read_settings(
    bridge: Bridge, block_size: Any, method: str | None, **options: Any
) -> LikelihoodSettings:
    """Check the settings; the method is exact for few mask patterns, else Monte Carlo, by default.

    Raises:
        InputError: for a block size, method or option that does not fit.
    """
    size, longest = block_size_of(bridge, block_size), bridge.cfg.n_ctx - 1
    for name in ("replicates", "max_states", "rows"):
        check_int(name, options[name], 1)
    if options["stride"] is not None:
        rule = f"give 1..{longest}, the context less BOS"
        check_int("stride", options["stride"], 1, longest, rule)
    if method is None:
        method = "exact" if 2**size <= options["max_states"] else "monte_carlo"
    check_choices(
        method, options["strata"], options["clip"], options["replicates"], options["seed"]
    )
    if method == "exact" and 2**size > options["max_states"]:
        raise InputError(too_many_patterns(size, options["max_states"]))
    return LikelihoodSettings(size, method, **options)
