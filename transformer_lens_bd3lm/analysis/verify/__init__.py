"""Whether a bridge computes what its checkpoint computes, hook point by hook point."""

from transformer_lens_bd3lm.analysis.verify.compare import Verification as Verification
from transformer_lens_bd3lm.analysis.verify.compare import verify as verify
