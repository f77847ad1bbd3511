"""Likelihood, order of reveal and linear probes by dependency depth."""

from transformer_lens_bd3lm.analysis.by_depth.measure import DependencyDepths as DependencyDepths
from transformer_lens_bd3lm.analysis.by_depth.measure import (
    by_dependency_depth as by_dependency_depth,
)
