"""Measure likelihood, order of reveal and linear probes by dependency depth."""

from transformer_lens_bd3lm.analysis.by_depth.depths import DependencyDepths as DependencyDepths
from transformer_lens_bd3lm.analysis.by_depth.measure import (
    by_dependency_depth as by_dependency_depth,
)
from transformer_lens_bd3lm.analysis.by_depth.parses import parse as parse
from transformer_lens_bd3lm.analysis.by_depth.parses import read_conllu as read_conllu
