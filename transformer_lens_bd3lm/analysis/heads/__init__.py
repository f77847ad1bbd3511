"""Score every attention head by how much of it goes where a rule says."""

from transformer_lens_bd3lm.analysis.heads.detect import detect_heads as detect_heads
from transformer_lens_bd3lm.analysis.heads.masked_text import MaskedText as MaskedText
from transformer_lens_bd3lm.analysis.heads.repetition import RepeatedTokens as RepeatedTokens
from transformer_lens_bd3lm.analysis.heads.repetition import repeated_tokens as repeated_tokens
from transformer_lens_bd3lm.analysis.heads.scores import HeadScores as HeadScores
