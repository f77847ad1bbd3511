"""A corpus as jobs: ``JOB`` windows in a row, numbered.

A job depends on nothing but the corpus and the stride: not on how many processes share the work,
nor on where a stopped run was resumed.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.likelihoods.corpus import CorpusText, Window, text_windows

JOB = 32  # windows


@dataclass
class CorpusReader:
    """One reading of a corpus: yields its jobs, and keeps the sizes of the texts read.

    Attributes:
        bridge: bridge whose tokenizer and context are used.
        stride: number of tokens that windows slide by; None wraps.
        names: names of the texts read.
        characters: number of characters of each; None for a row of ids.
        tokens: number of tokens counted in each.
    """

    bridge: Bridge
    stride: int | None
    names: list[str] = field(default_factory=list)
    characters: list[int | None] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def jobs(self, texts: Iterable[CorpusText]) -> Iterator[list[Window]]:
        """Yield jobs of ``JOB`` windows in a row; the last may have fewer."""
        stream = self._windows(texts)
        while job := list(itertools.islice(stream, JOB)):
            yield job

    def _windows(self, texts: Iterable[CorpusText]) -> Iterator[Window]:
        """Yield every window of every text."""
        for number, text in enumerate(texts):
            self.names.append(text.name)
            self.characters.append(len(text.text) if isinstance(text.text, str) else None)
            self.tokens.append(0)
            for window in text_windows(text, number, self.bridge, self.stride):
                self.tokens[number] += len(window.ids) - window.given
                yield window


def batches(job: list[Window], rows: int) -> Iterator[list[int]]:
    """Yield numbers of windows of one shape, as many as a pass of ``rows`` positions holds."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, window in enumerate(job):
        shapes.setdefault((len(window.ids), window.given), []).append(i)
    for (length, _), members in shapes.items():
        at_once = max(rows // length, 1)
        for start in range(0, len(members), at_once):
            yield members[start : start + at_once]
