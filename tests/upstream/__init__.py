"""The adapter as a part of TransformerLens, and TransformerLens's own tests of it."""
