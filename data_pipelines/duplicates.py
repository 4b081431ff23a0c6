"""Which records say what an earlier one has said: decided from stored hashes when data sets are opened.

Shards hold the hash of every record and every copy; what becomes of copies is a choice of the run that reads them. So
no process that pre-tokenizes waits for another, and the first copy is the first in order, whoever made it.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np

from aromni_jax.vocab import JointVocab
from data_pipelines.records import StoredExample, TokenDataset, target_counts_MR

Duplicates = Literal["keep", "drop"]


def open_dataset(
    directory: str | os.PathLike[str],
    vocab: JointVocab | None = None,
    *,
    duplicates: Duplicates = "keep",
    verify: bool = False,
) -> TokenDataset:
    """A finished data set, with all its records or (`drop`) with the first copy of each alone.

    Copies are looked for within the data set: what it holds does not depend on which others it is mixed with.

    Raises:
      ValueError: see `TokenDataset`.
    """
    dataset = TokenDataset(directory, vocab, verify=verify)
    if duplicates == "keep":
        return dataset
    (kept_N,) = first_copies([dataset.hashes_N])
    return dataset if kept_N.all() else FirstCopies(dataset, kept_N)


def kept_of(dataset: TokenDataset) -> Duplicates:
    """With which choice `open_dataset` opens the same records again."""
    return "drop" if isinstance(dataset, FirstCopies) else "keep"


def first_copies(hashes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each data set bool [N], true where no record before it, in its own or an earlier data set, is its equal.

    Args:
      hashes: uint64 [N] content hashes (`TokenDataset.hashes_N`) of each data set, in the order that decides.
    """
    if not hashes:
        return []
    everything_N = np.concatenate(hashes)
    is_first_N = np.zeros(len(everything_N), bool)
    is_first_N[np.unique(everything_N, return_index=True)[1]] = True
    return np.split(is_first_N, np.cumsum([len(own) for own in hashes])[:-1])


class FirstCopies(TokenDataset):
    """The records of `whole` where `kept_N`, as a data set of their own: numbered without gaps, with counts to match.

    What is left out is read once, when counts are first asked for. `dataset` and `markers` stay those of the whole.
    """

    def __init__(self, whole: TokenDataset, kept_N: np.ndarray) -> None:
        self._whole = whole
        self._kept = np.flatnonzero(kept_N)
        self._left_out = np.flatnonzero(~kept_N)
        self.directory, self.dataset, self.markers = whole.directory, whole.dataset, whole.markers
        self.lengths_N, self.tasks_N, self.hashes_N = (
            values_N[self._kept] for values_N in (whole.lengths_N, whole.tasks_N, whole.hashes_N)
        )

    @functools.cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Equal exactly when the records are the same."""
        left_out = self._left_out.astype("<i8").tobytes()
        return hashlib.sha256(self._whole.fingerprint.encode() + left_out).hexdigest()[:16]

    @functools.cached_property
    def unigram_V(self) -> np.ndarray:
        """int64: how often each vocabulary row is a target."""
        unigram_V = self._whole.unigram_V.copy()
        for index in self._left_out.tolist():
            np.subtract.at(unigram_V, self._whole[index].tokens_L[1:], 1)
        return unigram_V

    @functools.cached_property
    def counts_TMR(self) -> np.ndarray:
        """int64: target tokens by task, modality and role."""
        counts_TMR = self._whole.counts_TMR.copy()
        for index in self._left_out.tolist():
            stored = self._whole[index]
            counts_TMR[stored.task] -= target_counts_MR(stored)
        return counts_TMR

    def __len__(self) -> int:
        return len(self._kept)

    def where(self, index: int) -> str:
        """`DIR/shard_00002 record 17`: its place among all records."""
        return self._whole.where(int(self._kept[index]))

    def __getitem__(self, index: int) -> StoredExample:
        """Record `index` of those kept; ValueError naming shard and record when it is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._whole[int(self._kept[index])]
