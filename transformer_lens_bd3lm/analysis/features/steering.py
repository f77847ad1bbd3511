"""Arms of an experiment that steer with a feature, each beside as large a change at random."""

from typing import Any

from transformer_lens_bd3lm.analysis.features.ablation import RandomChange
from transformer_lens_bd3lm.analysis.sae.splice import Splice
from transformer_lens_bd3lm.checks import check_int, read_several
from transformer_lens_bd3lm.errors import InputError


def feature_arms(
    sae: Any, name: str, number: int, values: Any, *, seed: int = 0, **selectors: Any
) -> dict[str, Any]:
    """Return arms of :func:`experiment` that set a feature, and their controls.

    At every row that a step hook sees, the feature is set to a value, with the SAE's error kept.
    The control changes the same rows by as much, along one random direction.

    Args:
        sae: anything with ``encode(x)`` and ``decode(features)``; see :func:`load_sae`.
        name: the hook point.
        number: number of the feature.
        values: values that it is set to; 0 ablates it.
        seed: random seed of the direction of the controls.
        selectors: steps and scope, as of :meth:`StepHooks.add`: ``t``, ``masks_left``, ``block``,
            ``step``, ``scope``, ...

    Returns:
        Arms by name: ``"base"``, then ``"feature 7 = 4"`` and ``"random, as 7 = 4"`` for each
        value.

    Raises:
        InputError: for an object that is no SAE, values that are not different finite numbers, or
            selectors that do not fit.
    """
    check_int("number", number, 0)
    several = read_several("values", values, "give different numbers, as [0, 4, 8]")
    if not several or len(set(several)) < len(several):
        raise InputError(f"values={values!r}: give different numbers, as [0, 4, 8]")
    arms: dict[str, Any] = {"base": None}
    for value in several:
        splice = Splice(sae, name, error="kept", set_to={number: value})
        arms[f"feature {number} = {value:g}"] = splice.at(**selectors)
        control = RandomChange(splice, seed)
        arms[f"random, as {number} = {value:g}"] = control.at(**selectors)
    return arms
