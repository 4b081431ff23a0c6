"""Token shards: examples as msgpack records in ArrayRecord files, markers of whole shards, and `dataset.json`.

    DIR/shard_00000.array_record   records, one group each, so that any of them is read by itself
    DIR/shard_00000.npz            lengths_N, tasks_N, hashes_N, unigram_V: all that planning and statistics need
    DIR/shard_00000.json           the marker, written last: counts, sizes, SHA-256, fingerprints
    DIR/dataset.json  vocab.json  unigram.npy   written by `finalize`: the data set exists once the first does

A bit flipped anywhere is found before anything learns from it: markers and `dataset.json` carry a checksum over what
they say, which covers the SHA-256 of the other files; a record is guarded by ArrayRecord's hash as it is read.

A record holds facts only: ids, spans (start, length, modality, role, message, part), task, key, the source's facts.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_module

from aromni_jax.structs import Example, Modality, Role, Span, Task
from aromni_jax.vocab import JointVocab
from data_pipelines.open_shards import READER_OPTIONS, OpenShards, Shard

FORMAT_VERSION = 1
DATASET_FILE, VOCAB_FILE, TOKENIZERS_DIR = "dataset.json", "vocab.json", "tokenizers"
UNIGRAM_FILE = "unigram.npy"
_CHECKSUM = "checksum"
_WRITER_OPTIONS = "group_size:1,zstd:1"
_SHARDS = OpenShards()


@dataclasses.dataclass(frozen=True, eq=False)
class StoredExample:
    """An example as it is stored, and what its source says about it (label, voice, hold-out, ...).

    `spans_S6` has a row (start, length, modality, role, message, part) for every span; the fast path of training reads
    these columns, everyone else `example`.
    """

    tokens_L: np.ndarray
    spans_S6: np.ndarray
    task: Task
    key: str
    facts: dict[str, Any]

    @classmethod
    def of(cls, example: Example, facts: dict[str, Any] | None = None) -> StoredExample:
        """The stored form of an example in memory."""
        spans = [(s.start, s.length, s.modality, s.role, s.message, s.part) for s in example.spans]
        return cls(example.tokens_L, np.array(spans, np.int32).reshape(-1, 6), example.task, example.key, facts or {})

    @functools.cached_property
    def example(self) -> Example:
        """The example with its spans as objects."""
        spans = tuple(
            Span(start, length, _MODALITIES[modality], _ROLES[role], message, part)
            for start, length, modality, role, message, part in self.spans_S6.tolist()
        )
        return Example(self.tokens_L, spans, self.task, self.key)


_MODALITIES = tuple(Modality)
_ROLES = tuple(Role)
_TASKS = tuple(Task)


def encode_record(stored: StoredExample) -> bytes:
    """Packs an example: ids as uint16 where they fit, else uint32."""
    dtype = "<u2" if stored.tokens_L.max(initial=0) < 2**16 else "<u4"
    return msgpack.packb(
        {
            "version": FORMAT_VERSION,
            "key": stored.key,
            "task": int(stored.task),
            "dtype": dtype,
            "tokens": stored.tokens_L.astype(dtype).tobytes(),
            "spans": stored.spans_S6.astype("<i4").tobytes(),
            "facts": stored.facts,
        }
    )


def decode_record(data: bytes) -> StoredExample:
    """Inverse of `encode_record`; ValueError when the bytes are not a record or its spans do not cover its tokens."""
    try:
        fields = msgpack.unpackb(data)
        tokens_L = np.frombuffer(fields["tokens"], fields["dtype"]).astype(np.int32)
        spans_S6 = np.frombuffer(fields["spans"], "<i4").reshape(-1, 6)
        # A few lengths: Python adds them in a third of numpy's time, and this is read for every document of a batch.
        if sum(spans_S6[:, 1].tolist()) != len(tokens_L):
            raise ValueError("its spans do not cover its tokens")
        return StoredExample(tokens_L, spans_S6, _TASKS[fields["task"]], fields["key"], fields["facts"])
    except (KeyError, TypeError, IndexError, ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"damaged record: {error}") from error


@dataclasses.dataclass(frozen=True)
class ShardMarker:
    """What is true of a finished shard. `run` identifies the source, tokenizers, templates and settings behind it."""

    name: str
    records: int
    tokens: int
    bytes: int
    sha256: str
    index_sha256: str
    run: str
    quarantined: dict[str, int]
    counts_TMR: list[list[list[int]]]
    """Target tokens by task, modality and role."""


def target_counts_MR(stored: StoredExample) -> np.ndarray:
    """int64 number of targets (tokens but the first) by modality and role."""
    counts_MR = np.zeros((len(Modality), len(Role)), np.int64)
    lengths, modalities, roles = stored.spans_S6[:, 1], stored.spans_S6[:, 2], stored.spans_S6[:, 3]
    np.add.at(counts_MR, (modalities, roles), lengths)
    if len(stored.tokens_L):
        first = int(np.flatnonzero(lengths)[0])
        counts_MR[modalities[first], roles[first]] -= 1
    return counts_MR


def content_hash(stored: StoredExample) -> int:
    """64 bits of what a record teaches: its task and the parts of its turns, not the template's words around them.

    A caption and a picture made from one item differ in task; another wording of an instruction makes no difference.
    """
    spans_S6 = stored.spans_S6
    counts_S = spans_S6[:, 5] >= 0
    counts_S = counts_S if counts_S.any() else ~counts_S
    digest = hashlib.blake2b(bytes([stored.task]), digest_size=8)
    digest.update(spans_S6[counts_S, 1:5].astype("<i4").tobytes())
    digest.update(stored.tokens_L[np.repeat(counts_S, spans_S6[:, 1])].astype("<u4").tobytes())
    return int.from_bytes(digest.digest(), "little")


def shard_name(index: int) -> str:
    """Stem of the files of one shard."""
    return f"shard_{index:05d}"


@contextlib.contextmanager
def _record_writer(path: pathlib.Path) -> Iterator[Callable[[bytes], None]]:
    """Writes records to a new ArrayRecord file; OSError naming it where the disk takes no more."""
    try:
        writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        try:
            yield writer.write
        finally:
            writer.close()
    except RuntimeError as error:  # ArrayRecord makes one of whatever the system answered, whose words it keeps
        code = next((code for code in errno.errorcode if os.strerror(code) in str(error)), None)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def write_shard(
    directory: pathlib.Path,
    index: int,
    examples: Iterable[StoredExample],
    *,
    vocab_size: int,
    run: str,
    quarantined: dict[str, int],
    suffix: str,
) -> ShardMarker:
    """Writes one shard so that it is there whole or not at all: read back, hashed, renamed, marker last.

    `suffix` makes the temporary names of this process its own.
    """
    name = shard_name(index)
    data_temporary, index_temporary = (
        directory / f".tmp-{name}-data-{suffix}",
        directory / f".tmp-{name}-index-{suffix}",
    )
    counts_TMR = np.zeros((len(Task), len(Modality), len(Role)), np.int64)
    unigram_V = np.zeros(vocab_size, np.int64)
    lengths, tasks, hashes = [], [], []
    with _record_writer(data_temporary) as write:
        for stored in examples:
            write(encode_record(stored))
            lengths.append(len(stored.tokens_L))
            tasks.append(int(stored.task))
            hashes.append(content_hash(stored))
            counts_TMR[stored.task] += target_counts_MR(stored)
            np.add.at(unigram_V, stored.tokens_L[1:], 1)
    with index_temporary.open("wb") as file:
        np.savez(
            file,
            lengths_N=np.array(lengths, np.int32),
            tasks_N=np.array(tasks, np.int8),
            hashes_N=np.array(hashes, np.uint64),
            unigram_V=unigram_V,
            allow_pickle=False,
        )
    if lengths:
        reader = array_record_module.ArrayRecordReader(str(data_temporary), READER_OPTIONS)
        if reader.num_records() != len(lengths):
            raise ValueError(
                f"{name}: wrote {len(lengths)} records and read back {reader.num_records()}; is the disk full?"
            )
        reader.close()
    marker = ShardMarker(
        name=name,
        records=len(lengths),
        tokens=int(sum(lengths)),
        bytes=data_temporary.stat().st_size,
        sha256=_sha256(data_temporary),
        index_sha256=_sha256(index_temporary),
        run=run,
        quarantined=dict(sorted(quarantined.items())),
        counts_TMR=counts_TMR.tolist(),
    )
    for temporary, final in ((data_temporary, f"{name}.array_record"), (index_temporary, f"{name}.npz")):
        _flush_to_disk(temporary)
        os.replace(temporary, directory / final)
    write_atomically(directory / f"{name}.json", sealed(dataclasses.asdict(marker)), suffix)
    return marker


def read_marker(directory: pathlib.Path, index: int) -> ShardMarker | None:
    """The marker of shard `index`, or None when the shard is not finished."""
    path = directory / f"{shard_name(index)}.json"
    if not path.exists():
        return None
    try:
        return ShardMarker(**unsealed(path.read_bytes()))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole shard marker ({error}); delete it and pre-tokenize that shard again"
        ) from error


def sealed(facts: dict[str, Any]) -> str:
    """JSON text of `facts` with a checksum over them."""
    return json.dumps(facts | {_CHECKSUM: _checksum(facts)}, indent=1) + "\n"


def unsealed(data: bytes) -> dict[str, Any]:
    """Inverse of `sealed`; ValueError when anything that the text says was changed."""
    facts = json.loads(data)
    if not isinstance(facts, dict) or facts.pop(_CHECKSUM, None) != _checksum(facts):
        raise ValueError("its checksum is missing or not that of its content")
    return facts


def _checksum(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_atomically(path: pathlib.Path, text: str, suffix: str) -> None:
    """Writes `text` under a temporary name, flushes it to disk and renames it to `path`."""
    temporary = path.with_name(f".tmp-{path.name}-{suffix}")
    temporary.write_text(text)
    _flush_to_disk(temporary)
    os.replace(temporary, path)


def _flush_to_disk(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_vocab(directory: pathlib.Path) -> JointVocab:
    """The vocabulary a data set was made with; ValueError naming the file when it is not there or not one."""
    path = directory / VOCAB_FILE
    if not path.is_file():
        raise ValueError(f"{directory} is not a finished data set: it has no {VOCAB_FILE}")
    try:
        return JointVocab.from_json(path.read_bytes().decode())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run `aromni pretokenize` again to write it anew") from error


class TokenDataset:
    """A finished data set, by record index across shards; opening it checks that every shard is there and whole.

    `lengths_N` (tokens per record), `tasks_N` and `hashes_N` (`content_hash`) are arrays; `dataset` is the content of
    `dataset.json`. `verify` reads every shard and compares SHA-256, which finds any flipped bit; otherwise sizes are
    compared and ArrayRecord's own hashes guard each record as it is read.

    Raises:
      ValueError: not a data set, made with another vocabulary, or a shard is missing, empty, truncated or changed.
    """

    def __init__(
        self, directory: str | os.PathLike[str], vocab: JointVocab | None = None, *, verify: bool = False
    ) -> None:
        self.directory = pathlib.Path(directory)
        path = self.directory / DATASET_FILE
        if not path.is_file():
            raise ValueError(
                f"{self.directory} is not a finished data set (it has no {DATASET_FILE}); "
                "run `aromni pretokenize` to its end"
            )
        try:
            self.dataset: dict[str, Any] = unsealed(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); run `aromni pretokenize` again to write it anew") from error
        if vocab is not None:
            vocab.check_fingerprint(self.dataset["vocab_fingerprint"], f"the data set {self.directory}")
        self.markers = [ShardMarker(**marker) for marker in self.dataset["shards"]]
        indices = [self._check_shard(marker, verify) for marker in self.markers]
        self.lengths_N = np.concatenate([index["lengths_N"] for index in indices])
        self.tasks_N = np.concatenate([index["tasks_N"] for index in indices])
        self.hashes_N = np.concatenate([index["hashes_N"] for index in indices])
        self._shards = [
            Shard(str(self.directory / f"{marker.name}.array_record"), marker.sha256, marker.records)
            for marker in self.markers
        ]
        self._first_records = list(itertools.accumulate((marker.records for marker in self.markers), initial=0))

    @property
    def fingerprint(self) -> str:
        """Equal exactly when the records are the same."""
        return self.dataset["fingerprint"]

    @functools.cached_property
    def unigram_V(self) -> np.ndarray:
        """int64: how often each vocabulary row is a target; ValueError when the file that says so was changed."""
        path = self.directory / UNIGRAM_FILE
        if not path.is_file() or _sha256(path) != self.dataset["unigram_sha256"]:
            raise ValueError(f"{path} is missing or damaged; run `aromni pretokenize` again to write it anew")
        return np.load(path)

    @functools.cached_property
    def counts_TMR(self) -> np.ndarray:
        """int64: target tokens by task, modality and role."""
        return np.sum([marker.counts_TMR for marker in self.markers], axis=0)

    def _check_shard(self, marker: ShardMarker, verify: bool) -> dict[str, np.ndarray]:
        path = self.directory / f"{marker.name}.array_record"
        remedy = f"delete {marker.name}.json and run `aromni pretokenize` again to remake that shard"
        if not path.exists():
            raise ValueError(f"shard {path} is missing; {remedy}")
        size = path.stat().st_size
        if size != marker.bytes:
            state = "empty" if size == 0 else "truncated" if size < marker.bytes else "changed"
            raise ValueError(f"shard {path} is {state}: it has {size} bytes, its marker says {marker.bytes}; {remedy}")
        if verify and _sha256(path) != marker.sha256:
            raise ValueError(f"shard {path} is damaged: its SHA-256 is not the one of its marker; {remedy}")
        index_path = self.directory / f"{marker.name}.npz"
        if not index_path.exists() or _sha256(index_path) != marker.index_sha256:
            raise ValueError(f"the index {index_path} is missing or damaged; {remedy}")
        with np.load(index_path) as index:
            return {name: index[name] for name in ("lengths_N", "tasks_N", "hashes_N")}

    def __len__(self) -> int:
        return self._first_records[-1]

    def where(self, index: int) -> str:
        """`DIR/shard_00002 record 17`."""
        shard = bisect.bisect_right(self._first_records, index) - 1
        return f"{self.directory / self.markers[shard].name} record {index - self._first_records[shard]}"

    def __getitem__(self, index: int) -> StoredExample:
        """Record `index`.

        Raises:
          ValueError: it is damaged; shard and record by name.
          OSError: its shard cannot be opened now.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self._first_records, index) - 1
        try:
            stored = decode_record(_SHARDS.read(self._shards[shard], index - self._first_records[shard]))
        except ValueError as error:
            raise ValueError(f"{self.where(index)} does not read: {error}") from error
        if len(stored.tokens_L) != self.lengths_N[index]:
            raise ValueError(f"{self.where(index)} has {len(stored.tokens_L)} tokens, not {self.lengths_N[index]}")
        return stored

    def __iter__(self) -> Iterator[StoredExample]:
        return (self[index] for index in range(len(self)))


def finalize(
    directory: pathlib.Path, num_shards: int, *, run: str, vocab: JointVocab, description: dict[str, Any], suffix: str
) -> dict[str, Any]:
    """Writes `dataset.json`, `vocab.json` and `unigram.npy` once every shard is finished, and returns the former.

    Raises:
      ValueError: a shard is missing or was made by another run.
    """
    markers = [read_marker(directory, index) for index in range(num_shards)]
    missing = [shard_name(i) for i, marker in enumerate(markers) if marker is None or marker.run != run]
    if missing:
        raise ValueError(
            f"{directory} lacks {len(missing)} of {num_shards} shards of this run: {', '.join(missing[:8])}"
        )
    present = [marker for marker in markers if marker is not None]
    unigram_V = np.zeros(vocab.size, np.int64)
    hashes = []
    for marker in present:
        with np.load(directory / f"{marker.name}.npz") as index:
            unigram_V += index["unigram_V"]
            hashes.append(index["hashes_N"])
    temporary = directory / f".tmp-unigram-{suffix}"
    with temporary.open("wb") as file:
        np.save(file, unigram_V)
    unigram_sha256 = _sha256(temporary)
    _flush_to_disk(temporary)
    os.replace(temporary, directory / UNIGRAM_FILE)
    content = hashlib.sha256("".join(marker.sha256 for marker in present).encode()).hexdigest()[:16]
    dataset = {
        "format_version": FORMAT_VERSION,
        "fingerprint": content,
        "vocab_fingerprint": vocab.fingerprint,
        "run": run,
        "unigram_sha256": unigram_sha256,
        **description,
        "statistics": {
            **statistics(np.sum([m.counts_TMR for m in present], axis=0), present),
            "duplicates": sum(marker.records for marker in present) - len(np.unique(np.concatenate(hashes))),
        },
        "shards": [dataclasses.asdict(marker) for marker in present],
    }
    write_atomically(directory / VOCAB_FILE, vocab.to_json(), suffix)
    write_atomically(directory / DATASET_FILE, sealed(dataset), suffix)
    return dataset


def statistics(counts_TMR: np.ndarray, markers: list[ShardMarker]) -> dict[str, Any]:
    """Records, tokens, and target tokens by task, modality and role, for people and for the statistics page."""
    quarantined: dict[str, int] = {}
    for marker in markers:
        for reason, count in marker.quarantined.items():
            quarantined[reason] = quarantined.get(reason, 0) + count
    return {
        "records": sum(marker.records for marker in markers),
        "tokens": sum(marker.tokens for marker in markers),
        "quarantined": quarantined,
        "target_tokens": {
            task.label: {
                modality.label: {role.name.lower(): int(counts_TMR[task, modality, role]) for role in Role}
                for modality in Modality
                if counts_TMR[task, modality].any()
            }
            for task in Task
            if counts_TMR[task].any()
        },
    }
