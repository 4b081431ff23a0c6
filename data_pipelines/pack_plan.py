"""The pack plan: which documents stand in which row, computed from lengths alone, so that a row is random access.

Documents are taken in a seeded shuffle, window by window, and packed best fit decreasing: the longest first, each into
the fullest row it still fits. Rows that stay clearly unfilled give their documents back to the next window. No document
is ever split.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

ALGORITHM_VERSION = 1
WINDOW = 4096
_UNFILLED = 1 / 32
"""A row with more than this share of free space gives its documents back ..."""
_CARRIED = 1 / 8
"""... unless they are more than this share of a window (data whose lengths cannot fill rows must not pile up)."""


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


def make_plan(lengths_N: np.ndarray, row_length: int, *, seed: int, window: int = WINDOW) -> PackPlan:
    """Packs documents of `lengths_N` targets into rows of `row_length`; a pure function of its arguments.

    Raises:
      ValueError: a document does not fit an empty row (`.args[0]` names its index; see `check_lengths`).
    """
    too_long = np.flatnonzero(lengths_N > row_length)
    if len(too_long):
        raise ValueError(
            f"document {too_long[0]} has {lengths_N[too_long[0]]} targets, a row has room for {row_length}"
        )
    order = np.random.default_rng([seed, len(lengths_N)]).permutation(len(lengths_N))
    rows: list[list[int]] = []
    waiting: list[int] = []
    for start in range(0, len(order), window):
        is_last = start + window >= len(order)
        offered = np.concatenate([np.array(waiting, np.int64), order[start : start + window]])
        packed, spaces = _best_fit_decreasing(offered, lengths_N[offered], row_length)
        waiting = []
        if not is_last:
            loosest_first = sorted(range(len(packed)), key=lambda i: -spaces[i])
            for i in loosest_first:
                if spaces[i] <= row_length * _UNFILLED or len(waiting) + len(packed[i]) > window * _CARRIED:
                    break
                waiting += packed[i]
                packed[i] = []
        rows += [row for row in packed if row]
    return PackPlan(
        documents_N=np.array([document for row in rows for document in row], np.int32),
        starts_R=np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64),
        row_length=row_length,
        num_tokens=int(lengths_N.sum()),
    )


def _best_fit_decreasing(
    documents: np.ndarray, lengths: np.ndarray, row_length: int
) -> tuple[list[list[int]], list[int]]:
    """Rows of document indices, and the free space of each.

    Open rows are kept by their free space, with an integer that has one bit per space at which there is a row: the
    fullest row that fits is its lowest set bit from the wanted length on.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    spaces: list[int] = []
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]
    occupied = 0
    for document, length in zip(documents[longest_first].tolist(), lengths[longest_first].tolist(), strict=True):
        fitting = occupied >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                occupied ^= 1 << space
            rows[row].append(document)
        else:
            row, space = len(rows), row_length
            rows.append([document])
            spaces.append(space)
        space -= length
        spaces[row] = space
        if not open_rows[space]:
            occupied |= 1 << space
        open_rows[space].append(row)
    return rows, spaces


def plan_hash(*, data_fingerprint: str, row_length: int, seed: int) -> str:
    """16 hex digits over all a plan depends on: equal exactly when the plans are."""
    text = f"{ALGORITHM_VERSION} {data_fingerprint} {row_length} {seed} {WINDOW}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
