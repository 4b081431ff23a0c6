"""Which records say what an earlier one has said: decided from stored hashes when data sets are opened.

Shards hold the hash of every record and every copy; what becomes of copies is a choice of the run that reads them. So
no process that pre-tokenizes waits for another, and the first copy is the first in order, whoever made it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.records import TokenDataset, target_counts_MR


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


def counts_of_kept(dataset: TokenDataset, kept_N: np.ndarray) -> np.ndarray:
    """int64 targets by task, modality and role of the records where `kept_N`: reads those left out, and no others.

    Raises:
      ValueError: a record that is left out does not read.
    """
    counts_TMR = dataset.counts_TMR.copy()
    for index in np.flatnonzero(~kept_N).tolist():
        stored = dataset[index]
        counts_TMR[stored.task] -= target_counts_MR(stored)
    return counts_TMR
