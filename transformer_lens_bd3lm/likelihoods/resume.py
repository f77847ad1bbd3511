"""Identify a corpus's likelihood and its jobs, so that a stopped run can be resumed.

``ledger.py`` keeps the jobs on disk.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.made_with import identity_of
from transformer_lens_bd3lm.likelihoods.corpus import Window


@dataclass(frozen=True)
class Job:
    """Likelihoods of a job's windows, nats.

    Attributes:
        number: number of the job.
        mark: fingerprint of its windows.
        texts: number of each window's text ``[window]``.
        nelbo: NELBO of each window ``[window, replicate]``.
        nll: exact NLL of each window ``[window]``; None if it was not summed.
    """

    number: int
    mark: str
    texts: list[int]
    nelbo: list[list[float]]
    nll: list[float] | None


def fingerprint(windows: Iterable[Window]) -> str:
    """Return a short hash of windows: their texts, tokens and given positions."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(f"{window.text} {window.given} {window.ids.tolist()};".encode())
    return digest.hexdigest()[:16]


def identity(bridge: Bridge, settings: Any) -> dict[str, Any]:
    """Return the settings and the weights of a likelihood as plain values."""
    kept = asdict(settings)
    del kept["max_states"]
    if settings.method == "exact":
        del kept["rows"]
    return identity_of(bridge) | {"settings": kept}
