"""Questions over the steps of finished runs: when a token is decided, and what each layer predicts.

Each takes a run as it is: predictions and activations of every step are computed again.
"""

from transformer_lens_bd3lm.analysis.over_run.calibration import Calibration, calibration
from transformer_lens_bd3lm.analysis.over_run.commitment import Commitment, commitment
from transformer_lens_bd3lm.analysis.over_run.probe import ProbeScores, probe
from transformer_lens_bd3lm.analysis.over_run.run_lens import RunLens

__all__ = [
    "Calibration",
    "Commitment",
    "ProbeScores",
    "RunLens",
    "calibration",
    "commitment",
    "probe",
]
