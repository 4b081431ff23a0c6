"""Rows of a mixture by segment and number: every segment of the stream is packed by a plan from lengths alone.

A plan is a pure function of what `fingerprint` covers and is stored beside the shards of the first data set; one that
is missing, cut short or of another fingerprint is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import threading
import types
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import document_stream, pack_plan
from data_pipelines.document_stream import Cursor, Documents, DocumentStream
from data_pipelines.duplicates import kept_of, open_dataset
from data_pipelines.mixing import Mixture
from data_pipelines.pack_plan import PackPlan
from data_pipelines.records import StoredExample, TokenDataset

log = logging.getLogger(__name__)

MAX_DAMAGED_SHARE = 0.01
_DAMAGED_ALLOWED_AT_ONCE = 8
"""Damaged records become padding; a run stops at more than this many and more than that share of all it read."""

_KEPT_PLANS = 4
"""How many segments' plans of one stream stay on disk: the ones before are not read again."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Segment:
    """`tokens_RD` has the targets of each data set in the rows before each row, in the order they come."""

    documents: Documents
    plan: PackPlan
    order_R: np.ndarray
    tokens_RD: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:
        return self.plan[int(self.order_R[row])]


class PlannedRows:
    """The rows of a stream of documents, each of room for `row_length` targets.

    `names` are those of its data sets in the config, `resting` the cursors of data sets that earlier mixtures of the
    run read from, by fingerprint. Rows of a segment come in a seeded order, or as planned where `shuffle` is off.
    `fingerprint` is equal exactly when all rows are; `description` is what `going_on` needs to know of them later.

    Raises:
      ValueError: a record longer than a row, by name.
    """

    def __init__(
        self,
        stream: DocumentStream,
        names: Sequence[str],
        row_length: int,
        *,
        seed: int,
        shuffle: bool,
        resting: Mapping[str, Cursor] = types.MappingProxyType({}),
    ) -> None:
        self._stream, self._names, self._resting = stream, list(names), dict(resting)
        self._row_length, self._seed, self._shuffle = row_length, seed, shuffle
        for dataset in stream.datasets:
            _check_lengths(dataset, row_length)
        packing = [pack_plan.ALGORITHM_VERSION, document_stream.SEGMENT_DOCUMENTS]
        settings = {"packing": packing, "row_length": row_length, "seed": seed, "shuffle": shuffle}
        read = [
            {"fingerprint": dataset.fingerprint, "count": count, "cursor": cursor.to_json()}
            for dataset, count, cursor in zip(stream.datasets, stream.counts_D.tolist(), stream.cursors, strict=True)
        ]
        identity = [settings, stream.num_segments is None, read]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.description: dict[str, Any] = {
            "settings": settings,
            "is_finite": stream.num_segments is not None,
            "datasets": [
                entry | {"name": name, "path": str(dataset.directory), "duplicates": kept_of(dataset)}
                for entry, name, dataset in zip(read, self._names, stream.datasets, strict=True)
            ],
            "resting": {fingerprint: cursor.to_json() for fingerprint, cursor in self._resting.items()},
        }
        self.damaged: set[str] = set()
        self._num_read = 0
        self._newest = -1
        self._lock = threading.Lock()
        self._planned = functools.lru_cache(maxsize=3)(self._plan)
        self._tokens_before = functools.lru_cache(maxsize=3)(self._count_tokens_before)

    @classmethod
    def of(cls, mixture: Mixture, row_length: int, *, seed: int, shuffle: bool = True) -> PlannedRows:
        """The rows of a mixture from the beginning of its data sets."""
        return cls(mixture.stream(seed=seed), mixture.names, row_length, seed=seed, shuffle=shuffle)

    def _plan(self, number: int) -> _Segment:
        documents = self._stream.segment(number)
        path = self._stream.datasets[0].directory / "plans" / self.fingerprint / f"{number:06d}.npz"
        plan = _read_plan(path, self._row_length)
        if plan is None:
            # Other numbers than those that order the records of data set and the rows of a segment.
            (seed,) = np.random.SeedSequence([self._seed, number, 1]).generate_state(1)
            plan = pack_plan.make_plan(documents.lengths_N, self._row_length, seed=int(seed))
            # Rows of small segments are asked for when later ones have long been planned to find their places.
            if number > self._newest - _KEPT_PLANS:
                _write_plan(path, plan)
        self._newest = max(self._newest, number)
        with contextlib.suppress(OSError):  # a read-only data set
            path.with_name(f"{number - _KEPT_PLANS:06d}.npz").unlink(missing_ok=True)
        order_R = np.arange(plan.num_rows)
        if self._shuffle:
            order_R = np.random.default_rng([self._seed, number, 2]).permutation(order_R)
        place_R = np.empty_like(order_R)
        place_R[order_R] = np.arange(plan.num_rows)
        place_N = np.repeat(place_R, np.diff(plan.starts_R))
        tokens_RD = np.zeros((plan.num_rows + 1, len(self._names)), np.int64)
        held = documents.only(plan.documents_N)
        np.add.at(tokens_RD, (place_N + 1, held.dataset_N), held.lengths_N)
        return _Segment(documents, plan, order_R, np.cumsum(tokens_RD, axis=0))

    def _segment(self, number: int) -> _Segment:
        with self._lock:  # several threads ask for a new segment at once, and one plans it
            return self._planned(number)

    def num_rows(self, segment: int) -> int:
        """Rows of a segment; 0 past the end of the stream."""
        if self._stream.num_segments is not None and segment >= self._stream.num_segments:
            return 0
        return self._segment(segment).plan.num_rows

    def fill(self, segment: int = 0) -> float:
        """Share of the positions of a segment's rows that hold a token."""
        return self._segment(segment).plan.fill

    def documents(self, segment: int, row: int) -> list[StoredExample | None]:
        """What stands in a row, in order; None stands for a damaged record.

        Raises:
          ValueError: too many records have turned out to be damaged.
        """
        held = self._segment(segment)
        return [self._read(held.documents, document) for document in held[row].tolist()]

    def _read(self, documents: Documents, document: int) -> StoredExample | None:
        self._num_read += 1
        try:
            return self._stream.read(documents, document)
        except ValueError as error:
            with self._lock:
                if (where := self._stream.where(documents, document)) not in self.damaged:
                    log.warning("%s; it becomes padding", error)
                self.damaged.add(where)
                if len(self.damaged) > max(_DAMAGED_ALLOWED_AT_ONCE, MAX_DAMAGED_SHARE * self._num_read):
                    raise ValueError(
                        f"{len(self.damaged)} of {self._num_read} records read are damaged, the last: {error}; "
                        "make the damaged shards again with `aromni pretokenize`"
                    ) from error
            return None

    def keys(self, segment: int, row: int) -> list[str]:
        """Keys of the documents of a row; a damaged one is named by its place."""
        held = self._segment(segment)
        found = []
        for document in held[row].tolist():
            stored = self._read(held.documents, document)
            found.append(stored.key if stored else self._stream.where(held.documents, document))
        return found

    def shares(self, segment: int, row: int) -> dict[str, float]:
        """Share of each data set in the targets of all rows before this one, since this mixture began."""
        tokens_D = self._tokens_before(segment)
        if row:
            tokens_D = tokens_D + self._segment(segment).tokens_RD[row]
        shares_D = tokens_D / max(int(tokens_D.sum()), 1)
        return dict(zip(self._names, shares_D.tolist(), strict=True))

    def _count_tokens_before(self, segment: int) -> np.ndarray:
        """int64 [D] targets of each data set in all segments before this one, since this mixture began."""
        now = self._stream.cursors_at(segment)
        return np.array(
            [
                self._stream.tokens_read(d, now[d]) - self._stream.tokens_read(d, begun)
                for d, begun in enumerate(self._stream.cursors)
            ]
        )

    def _cursors_at(self, segment: int, row: int) -> list[Cursor]:
        if not row:
            return self._stream.cursors_at(segment)
        held = self._segment(segment)
        unread_N = np.ones(len(held.documents), bool)
        for before in range(row):
            unread_N[held[before]] = False
        return self._stream.cursors_at(segment, held.documents.only(unread_N))

    def going_on(self, state: Mapping[str, Any], mixture: Mixture) -> tuple[PlannedRows, int, int]:
        """The rows of `mixture`, segment and row at which a run goes on whose data stood at `state`.

        Where the mixture is another than then, its data sets begin with what has not been read of them.

        Raises:
          ValueError: the state belongs to other data, another seed or another sequence length.
        """
        old, segment, row = state["rows"], int(state["segment"]), int(state["row"])
        self._check_settings(old)
        begun = _cursors({e["fingerprint"]: e["cursor"] for e in old["datasets"]} | old["resting"])
        rows = self._from(mixture, begun)
        if rows.fingerprint == state["plan"]:
            return rows, segment, row
        before = self._as_described(old, state["plan"])
        read = zip(before._stream.datasets, before._cursors_at(segment, row), strict=True)
        log.info("the mixture is another than at the last start: every data set goes on where it stood")
        return self._from(mixture, before._resting | {d.fingerprint: cursor for d, cursor in read}), 0, 0

    def _from(self, mixture: Mixture, cursors: Mapping[str, Cursor]) -> PlannedRows:
        prints = [dataset.fingerprint for dataset in mixture.datasets]
        stream = mixture.stream(seed=self._seed, cursors=[cursors.get(each, Cursor()) for each in prints])
        resting = {each: cursor for each, cursor in cursors.items() if each not in prints}
        return PlannedRows(
            stream, mixture.names, self._row_length, seed=self._seed, shuffle=self._shuffle, resting=resting
        )

    def _check_settings(self, old: Mapping[str, Any]) -> None:
        settings = self.description["settings"]
        changed = [name for name in settings if old["settings"].get(name) != settings[name]]
        if changed:
            raise ValueError(
                f"the rows of the checkpoint's plan had another {', '.join(changed)}: "
                f"{[old['settings'].get(name) for name in changed]}, now {[settings[name] for name in changed]}. "
                "Set it back, or start a new workdir with init_from"
            )
        was = {entry["name"]: entry["fingerprint"] for entry in old["datasets"]}
        for name, dataset in zip(self._names, self._stream.datasets, strict=True):
            if was.get(name, dataset.fingerprint) != dataset.fingerprint:
                raise ValueError(
                    f"the data set {name!r} in {dataset.directory} is not the one the checkpoint's plan was made from: "
                    "it was made again. Give the new one a name of its own beside the old one, or start a new workdir "
                    "with init_from"
                )

    def _as_described(self, old: Mapping[str, Any], plan: str) -> PlannedRows:
        """The rows of an earlier start, whose data sets may have left the mixture since."""
        here = {dataset.fingerprint: dataset for dataset in self._stream.datasets}
        datasets = [
            here.get(entry["fingerprint"]) or open_dataset(entry["path"], duplicates=entry["duplicates"])
            for entry in old["datasets"]
        ]
        rows = PlannedRows(
            DocumentStream(
                datasets,
                np.array([entry["count"] for entry in old["datasets"]]),
                [Cursor.from_json(entry["cursor"]) for entry in old["datasets"]],
                seed=self._seed,
                is_finite=old["is_finite"],
            ),
            [entry["name"] for entry in old["datasets"]],
            self._row_length,
            seed=self._seed,
            shuffle=self._shuffle,
            resting=_cursors(old["resting"]),
        )
        if rows.fingerprint != plan:
            raise ValueError(
                f"the checkpoint was trained on rows of plan {plan}, and the data sets of then give "
                f"{rows.fingerprint}: one of them was made again. Start a new workdir with init_from"
            )
        return rows


def _cursors(described: Mapping[str, Any]) -> dict[str, Cursor]:
    return {fingerprint: Cursor.from_json(fields) for fingerprint, fields in described.items()}


def _check_lengths(dataset: TokenDataset, row_length: int) -> None:
    longest = int(np.argmax(dataset.lengths_N))
    num_tokens = int(dataset.lengths_N[longest])
    if num_tokens > row_length + 1:
        num_long = int((dataset.lengths_N > row_length + 1).sum())
        raise ValueError(
            f"record {dataset[longest].key!r} ({dataset.where(longest)}) has {num_tokens} tokens, "
            f"a row of sequence_length {row_length} holds {row_length + 1}; {num_long} record(s) are too long. "
            "Raise sequence_length, or pre-tokenize again with max_tokens"
        )


def _read_plan(path: pathlib.Path, row_length: int) -> PackPlan | None:
    try:
        with np.load(path) as arrays:
            return PackPlan(arrays["documents_N"], arrays["starts_R"], row_length, int(arrays["num_tokens"]))
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None  # not there, cut short by a crash or damaged: a plan is made again in a second


def _write_plan(path: pathlib.Path, plan: PackPlan) -> None:
    """Stores a plan for the next start; on a read-only data set it is made anew each time."""
    temporary = path.with_name(f".tmp-{path.stem}-{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, documents_N=plan.documents_N, starts_R=plan.starts_R, num_tokens=np.int64(plan.num_tokens))
        os.replace(temporary, path)
    except OSError as error:
        log.info("the pack plan is not stored beside the shards (%s); it will be made again at the next start", error)
