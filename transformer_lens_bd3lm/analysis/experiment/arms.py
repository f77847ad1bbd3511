"""Read the arms of an experiment: hooks, or other settings of the loop."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformer_lens_bd3lm.analysis.experiment.described import described
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.denoise import from_keywords
from transformer_lens_bd3lm.denoising.denoise_many import read_canvases, read_hooks
from transformer_lens_bd3lm.denoising.step_hooks import (
    StepHook,
    StepHooks,
    WithoutStep,
    read_once,
)
from transformer_lens_bd3lm.errors import InputError

SETTINGS = ("max_new_tokens", "block_size", "sampler", "kv_cache", "stop", "pad_block")
"""Settings of ``denoise`` that an experiment has, and that an arm may have of its own."""


@dataclass(frozen=True)
class Arm:
    """Hooks and settings of one arm.

    Attributes:
        hooks: step hooks; none in an arm that only has other settings.
        settings: settings of ``denoise_many`` by name.
        own: names of those that were given for this arm.
    """

    hooks: StepHooks
    settings: dict[str, Any]
    own: tuple[str, ...]

    def identity(self) -> list[str]:
        """Return hooks and own settings as texts by which two arms are compared."""
        return [*map(described, self.hooks.hooks)] + [
            f"{name}={described(self.settings[name])}" for name in self.own
        ]

    def describe(self) -> str:
        """Return the edits and the arm's own settings in words."""
        parts = [f"{_function(each.fn)} at {each.name}{_steps(each)}" for each in self.hooks.hooks]
        parts += [f"{name}={self.settings[name]!r}" for name in self.own]
        return "; ".join(parts) or "nothing"


def _function(fn: Any) -> str:
    """Return a hook's function by its name."""
    fn = fn.fn if isinstance(fn, WithoutStep) else fn
    return getattr(fn, "__qualname__", "") or described(fn)


def _steps(hook: StepHook) -> str:
    """Return the steps that a hook selects and its scope, where they are not all and active."""
    given = {name: getattr(hook.selectors, name) for name in hook.selectors.given()}
    given |= {} if hook.scope == "active" else {"scope": hook.scope}
    named = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return f" ({named})" if named else ""


def read_arms(bridge: Bridge, prompts: Any, arms: Any, settings: dict[str, Any]) -> dict[str, Arm]:
    """Return the arms by name, with everything checked and nothing run.

    Args:
        bridge: a BD3LM bridge.
        prompts: the prompts, as :func:`denoise_many` takes them.
        arms: None, hooks, or a mapping of settings, by name.
        settings: settings of the arms that have no others.

    Raises:
        InputError: for fewer than two arms, settings that an experiment does not have, and prompts
            or settings that do not fit.
        HookNameError: for a hook name that the bridge does not have.
    """
    if not isinstance(arms, Mapping) or len(arms) < 2:
        raise InputError(
            f"arms={arms!r}: give two arms or more by name, as "
            '{"base": None, "ablate": [(name, fn)]}'
        )
    read: dict[str, Arm] = {}
    for name, given in arms.items():
        if not isinstance(name, str):
            raise InputError(f"arms has the name {name!r}: give strings")
        own = dict(given) if isinstance(given, Mapping) else {"hooks": given}
        hooks = read_once(own.pop("hooks", None))
        drawing = {key: own.pop(key, None) for key in ("temperature", "nucleus_p")}
        if unknown := sorted(own.keys() - set(SETTINGS)):
            raise InputError(
                f"arms[{name!r}] has {', '.join(unknown)}: give hooks, temperature, nucleus_p, "
                + ", ".join(SETTINGS)
            )
        sampler = own.get("sampler")
        if any(value is not None for value in drawing.values()):
            own["sampler"], _ = from_keywords(
                sampler, None, drawing["temperature"], drawing["nucleus_p"], None
            )
        arm = Arm(read_hooks(bridge, hooks), settings | own, tuple(own))
        read_canvases(
            bridge,
            prompts,
            *(arm.settings[key] for key in ("max_new_tokens", "block_size", "pad_block")),
        )
        read[name] = arm
    return read
