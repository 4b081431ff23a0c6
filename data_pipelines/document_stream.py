"""The stream of documents that a mixture draws from its data sets, cut into segments that are packed one by one.

Every data set is a stream of its own: position p is record order(p // size)[p % size], where each pass over the data
set has a seeded order of its own. So a record comes once in each pass, whatever the mixture. A segment takes from each
data set the next records, as many as its share. How far a data set has been read is a `Cursor`, which outlives the
mixture: when weights change between two starts of a run, each data set goes on where it stood.
"""

from __future__ import annotations

import base64
import dataclasses
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.records import StoredExample, TokenDataset

SEGMENT_DOCUMENTS = 1 << 18
"""Most documents of a segment: planned in less than a second, and what a change of mixture has to remember of."""


@dataclasses.dataclass(frozen=True, eq=False)
class Cursor:
    """How far the stream of a data set has been read: every position before `next` but those in `skipped` (sorted)."""

    next: int = 0
    skipped: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def num_read(self) -> int:
        """How many records have been read."""
        return self.next - len(self.skipped)

    def positions(self, first: int, last: int) -> np.ndarray:
        """int64 positions of the records number `first` to `last` - 1 from here: what was skipped comes first."""
        late = np.arange(max(first, len(self.skipped)), max(last, len(self.skipped)))
        return np.concatenate([self.skipped[first:last], self.next - len(self.skipped) + late])

    def after(self, taken: int, unread: np.ndarray) -> Cursor:
        """The cursor once `taken` records have been taken from here, of which the positions `unread` were not read."""
        skipped = np.sort(np.concatenate([unread, self.skipped[taken:]]))
        return Cursor(self.next + max(0, taken - len(self.skipped)), skipped)

    def to_json(self) -> dict[str, Any]:
        """Two JSON values; positions as the differences between them, which compress well."""
        if not len(self.skipped):
            return {"next": self.next, "skipped": ""}
        differences = np.diff(self.skipped, prepend=0).astype("<i8").tobytes()
        return {"next": self.next, "skipped": base64.b64encode(zlib.compress(differences, 9)).decode()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Cursor:
        """Inverse of `to_json`."""
        if not fields["skipped"]:
            return cls(fields["next"])
        differences = np.frombuffer(zlib.decompress(base64.b64decode(fields["skipped"])), "<i8")
        return cls(fields["next"], np.cumsum(differences))


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a segment: data set and record of each, its place in the stream of its data set, its targets."""

    dataset_N: np.ndarray
    record_N: np.ndarray
    position_N: np.ndarray
    lengths_N: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths_N)

    def only(self, chosen_N: np.ndarray) -> Documents:
        """Those of a mask, or of an array of numbers."""
        return Documents(
            self.dataset_N[chosen_N], self.record_N[chosen_N], self.position_N[chosen_N], self.lengths_N[chosen_N]
        )


class DocumentStream:
    """What a mixture of `counts_D` documents of each data set gives, segment after segment.

    `counts_D` is one cycle; where the stream `is_finite` there is nothing after the first. `cursors` say where each
    data set stands at the beginning.
    """

    def __init__(
        self,
        datasets: Sequence[TokenDataset],
        counts_D: np.ndarray,
        cursors: Sequence[Cursor],
        *,
        seed: int,
        is_finite: bool,
    ) -> None:
        self.datasets = list(datasets)
        self.counts_D = counts_D
        self.cursors = list(cursors)
        self._seed = seed
        self.segments_per_cycle = max(1, -(-int(counts_D.sum()) // SEGMENT_DOCUMENTS))
        self.num_segments = self.segments_per_cycle if is_finite else None
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def taken(self, segment: int) -> np.ndarray:
        """int64 [D]: how many documents of each data set stand in the segments before `segment`."""
        cycle, within = divmod(segment, self.segments_per_cycle)
        return self.counts_D * cycle + self.counts_D * within // self.segments_per_cycle

    def segment(self, segment: int) -> Documents:
        """The documents of a segment, data set by data set: a pure function of its number."""
        first_D, last_D = self.taken(segment), self.taken(segment + 1)
        positions = [
            cursor.positions(int(first), int(last))
            for cursor, first, last in zip(self.cursors, first_D, last_D, strict=True)
        ]
        records = [self.records_at(d, position_N) for d, position_N in enumerate(positions)]
        return Documents(
            dataset_N=np.repeat(np.arange(len(records), dtype=np.int16), [len(part) for part in records]),
            record_N=np.concatenate(records),
            position_N=np.concatenate(positions),
            lengths_N=np.concatenate([d.lengths_N[part] - 1 for d, part in zip(self.datasets, records, strict=True)]),
        )

    def records_at(self, dataset: int, position_N: np.ndarray) -> np.ndarray:
        """int64 records of one data set that stand at positions of its stream."""
        pass_N, offset_N = np.divmod(position_N, len(self.datasets[dataset]))
        record_N = np.empty_like(offset_N)
        for number in np.unique(pass_N).tolist():
            here_N = pass_N == number
            record_N[here_N] = self._order(dataset, number)[offset_N[here_N]]
        return record_N

    def _order(self, dataset: int, pass_number: int) -> np.ndarray:
        key = dataset, pass_number
        with self._lock:
            if key not in self._orders:
                # The content of a data set names its order: in another mixture, under another name, it is the same.
                source = self.datasets[dataset]
                rng = np.random.default_rng([self._seed, int(source.fingerprint, 16), pass_number])
                for old in [k for k in self._orders if k[0] == dataset and abs(k[1] - pass_number) > 1]:
                    del self._orders[old]
                self._orders[key] = rng.permutation(np.arange(len(source), dtype=np.int32))
            return self._orders[key]

    def cursors_at(self, segment: int, unread: Documents | None = None) -> list[Cursor]:
        """Where each data set stands before `segment`; with `unread`, after it but for these documents of it."""
        taken_D = self.taken(segment if unread is None else segment + 1)
        none = np.zeros(0, np.int64)
        return [
            cursor.after(int(taken_D[d]), none if unread is None else unread.position_N[unread.dataset_N == d])
            for d, cursor in enumerate(self.cursors)
        ]

    def tokens_read(self, dataset: int, cursor: Cursor) -> int:
        """Targets of all records of a data set that have been read where it stands at `cursor`."""
        source = self.datasets[dataset]
        passes, rest = divmod(cursor.next, len(source))
        partly = self._order(dataset, passes)[:rest] if rest else np.zeros(0, np.int64)
        skipped = self.records_at(dataset, cursor.skipped)
        total, begun, left = (
            int(lengths_N.sum(dtype=np.int64)) - len(lengths_N)
            for lengths_N in (source.lengths_N, source.lengths_N[partly], source.lengths_N[skipped])
        )
        return passes * total + begun - left

    def read(self, documents: Documents, document: int) -> StoredExample:
        """The stored example of a document; ValueError naming its place when it is damaged."""
        return self.datasets[documents.dataset_N[document]][int(documents.record_N[document])]

    def where(self, documents: Documents, document: int) -> str:
        """Shard and record of a document."""
        return self.datasets[documents.dataset_N[document]].where(int(documents.record_N[document]))
