"""The pack plan: which documents stand in which row, computed from lengths alone, so that a row is random access.

Rows are made one after the other, each from the longest document left: what is left of the row is filled by one
document or by two that fit it exactly where there are such, else by the longest that fits. No document is ever split.
A row found is repeated as often as there are documents of its lengths, so that planning costs by the number of
different lengths rather than of documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

ALGORITHM_VERSION = 2


@dataclasses.dataclass(frozen=True, eq=False)
class PackPlan:
    """Row r holds documents `documents_N[starts_R[r] : starts_R[r + 1]]`; rows have room for `row_length` targets."""

    documents_N: np.ndarray
    starts_R: np.ndarray
    row_length: int
    num_tokens: int

    @property
    def num_rows(self) -> int:
        return len(self.starts_R) - 1

    @property
    def fill(self) -> float:
        """Share of row positions that hold a token."""
        return self.num_tokens / max(self.num_rows * self.row_length, 1)

    def __getitem__(self, row: int) -> np.ndarray:
        """Document indices of row `row`, in the order they stand."""
        return self.documents_N[self.starts_R[row] : self.starts_R[row + 1]]


def make_plan(lengths_N: np.ndarray, row_length: int, *, seed: int) -> PackPlan:
    """Packs documents of `lengths_N` targets into rows of `row_length`; a pure function of its arguments.

    `seed` decides which of the documents of one length stand where. Rows come in no useful order: shuffle them.

    Raises:
      ValueError: a document does not fit an empty row.
    """
    too_long = np.flatnonzero(lengths_N > row_length)
    if len(too_long):
        raise ValueError(
            f"document {too_long[0]} has {lengths_N[too_long[0]]} targets, a row has room for {row_length}"
        )
    shuffled = np.random.default_rng([seed, len(lengths_N)]).permutation(np.arange(len(lengths_N), dtype=np.int32))
    # A document of one token has no target; it takes a place all the same, so that rows stay finite.
    needs_N = np.maximum(lengths_N[shuffled], 1)
    by_length = shuffled[np.argsort(needs_N, kind="stable")]
    counts_L = np.bincount(needs_N, minlength=row_length + 1)
    next_L = np.cumsum(counts_L) - counts_L
    documents, num_documents = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    for lengths, num_rows in _patterns(counts_L.tolist(), row_length):
        columns = []
        for length, times in lengths.items():
            first = next_L[length]
            next_L[length] += times * num_rows
            columns.append(by_length[first : next_L[length]].reshape(num_rows, times))
        rows = np.concatenate(columns, axis=1)
        documents.append(rows.ravel())
        num_documents.append(np.full(num_rows, rows.shape[1]))
    return PackPlan(
        documents_N=np.concatenate(documents),
        starts_R=np.concatenate([[0], np.cumsum(np.concatenate(num_documents))]),
        row_length=row_length,
        num_tokens=int(lengths_N.sum(dtype=np.int64)),
    )


def _patterns(counts_L: list[int], row_length: int) -> Iterator[tuple[dict[int, int], int]]:
    """Rows that use up `counts_L` documents of each length: {length: times} of a row, and how many rows are like it.

    Lengths that are left are the set bits of one integer. Read backwards from `space` and laid over itself, it shows
    the pairs that fill `space` exactly:

        lengths left   .  1  2  .  .  5  6          space 7
        7 - length     .  1  2  .  .  5  6    ->    pairs 1 + 6 and 2 + 5
    """
    lengths_left = sum(1 << length for length, count in enumerate(counts_L) if count)
    reversed_left = sum(1 << (row_length - length) for length, count in enumerate(counts_L) if count)
    while lengths_left:
        row: dict[int, int] = {}
        available, backwards, space = lengths_left, reversed_left, row_length
        while fitting := available & ((1 << (space + 1)) - 1):
            pairs = fitting & (backwards >> (row_length - space))
            if space % 2 == 0 and pairs >> (space // 2) & 1 and counts_L[space // 2] - row.get(space // 2, 0) < 2:
                pairs ^= 1 << (space // 2)  # there is one of half the space, not two
            exact = fitting >> space & 1
            length = space if exact else (pairs if row and pairs else fitting).bit_length() - 1
            row[length] = row.get(length, 0) + 1
            space -= length
            if row[length] == counts_L[length]:
                available ^= 1 << length
                backwards ^= 1 << (row_length - length)
        num_rows = min(counts_L[length] // times for length, times in row.items())
        yield row, num_rows
        for length, times in row.items():
            counts_L[length] -= times * num_rows
            if not counts_L[length]:
                lengths_left ^= 1 << length
                reversed_left ^= 1 << (row_length - length)
