"""Word error rate over a corpus: (substitutions + deletions + insertions) / reference words (METHOD section 9)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

_NOT_WORDS = re.compile(r"[^\w\s']")


@dataclasses.dataclass(frozen=True)
class WordErrors:
    """Counts that add up over utterances; the one division is `rate`."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    num_words: int = 0

    def __add__(self, other: WordErrors) -> WordErrors:
        return WordErrors(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def rate(self) -> float:
        """Errors per reference word; 0 without errors, infinity for words where there should be none."""
        errors = self.substitutions + self.deletions + self.insertions
        return errors / self.num_words if self.num_words else (float("inf") if errors else 0.0)


def words_of(text: str) -> list[str]:
    """Lower case, punctuation apart from apostrophes dropped, split at white space."""
    return _NOT_WORDS.sub(" ", text.lower()).split()


def word_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> WordErrors:
    """Errors of a least-cost alignment (Levenshtein, all costs 1) of `hypothesis` to `reference`."""
    # Each cell holds (cost, substitutions, deletions, insertions) of the best alignment of two prefixes.
    row = [(j, 0, 0, j) for j in range(len(hypothesis) + 1)]
    for i, wanted in enumerate(reference, 1):
        previous, row = row, [(i, 0, i, 0)]
        for j, found in enumerate(hypothesis, 1):
            cost, subs, dels, ins = previous[j - 1]
            best = (cost, subs, dels, ins) if wanted == found else (cost + 1, subs + 1, dels, ins)
            cost, subs, dels, ins = previous[j]
            best = min(best, (cost + 1, subs, dels + 1, ins))
            cost, subs, dels, ins = row[j - 1]
            row.append(min(best, (cost + 1, subs, dels, ins + 1)))
    _, subs, dels, ins = row[-1]
    return WordErrors(subs, dels, ins, len(reference))


def corpus_errors(pairs: Iterable[tuple[str, str]]) -> WordErrors:
    """Summed errors of (reference, hypothesis) texts, both through `words_of`."""
    return sum((word_errors(words_of(truth), words_of(told)) for truth, told in pairs), WordErrors())
