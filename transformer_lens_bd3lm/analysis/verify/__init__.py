"""Verify that a bridge computes what its checkpoint computes, hook point by hook point."""

from transformer_lens_bd3lm.analysis.verify.compare import verify as verify
from transformer_lens_bd3lm.analysis.verify.report import Row as Row
from transformer_lens_bd3lm.analysis.verify.report import Verification as Verification
