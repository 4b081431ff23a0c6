"""Packed batches: a pure function from (seed, step) to rows, read ahead by Grain, resumed exactly from a few bytes.

Row r of the stream belongs to epoch r // R and is row permutation(seed, epoch)[r % R] of the pack plan. Batch n takes
rows [n * B, (n + 1) * B) of the stream, and a process reads those of its devices. So the global batches are the same
for any number of processes and reading threads, and a change of batch size goes on where the stream stood.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from aromni_jax.config import DataConfig, LossConfig
from aromni_jax.structs import Example, PackedBatch, Task
from aromni_jax.vocab import JointVocab
from data_pipelines.mixing import Mixture, describe_shares
from data_pipelines.pack_plan import make_plan
from data_pipelines.records import StoredExample, TokenDataset
from data_pipelines.synthetic import SyntheticRows
from data_pipelines.weighting import UNIFORM_TMR, to_document, weight_table

log = logging.getLogger(__name__)

MAX_DAMAGED_SHARE = 0.01
_DAMAGED_ALLOWED_AT_ONCE = 8
"""Damaged records become padding; a run stops at more than this many and more than that share of all it read."""

_ENDLESS = 2**60


class Rows(Protocol):
    """Rows by index: `num_rows` of an epoch, or None where there is no end."""

    @property
    def num_rows(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def fill(self) -> float: ...

    @property
    def counts_TMR(self) -> np.ndarray: ...

    def documents(self, row: int) -> Sequence[StoredExample | None]:
        """What stands in a row, in order; None stands for a damaged record."""
        ...

    def keys(self, row: int) -> list[str]: ...


class PlannedRows:
    """The rows of a mixture's pack plan."""

    def __init__(self, mixture: Mixture, row_length: int, *, seed: int) -> None:
        self._mixture = mixture
        self._plan, self.fingerprint = mixture.plan(row_length, seed=seed)
        self.num_rows = self._plan.num_rows
        self.fill = self._plan.fill
        self.counts_TMR = mixture.counts_TMR
        self.damaged: set[str] = set()
        self._num_read = 0
        self._lock = threading.Lock()

    def documents(self, row: int) -> list[StoredExample | None]:
        """Reads the documents of `row`; ValueError when too many records have turned out to be damaged."""
        return [self._read(int(document)) for document in self._plan[row]]

    def _read(self, document: int) -> StoredExample | None:
        self._num_read += 1
        try:
            return self._mixture[document]
        except ValueError as error:
            with self._lock:
                if (where := self._mixture.where(document)) not in self.damaged:
                    log.warning("%s; it becomes padding", error)
                self.damaged.add(where)
                if len(self.damaged) > max(_DAMAGED_ALLOWED_AT_ONCE, MAX_DAMAGED_SHARE * self._num_read):
                    raise ValueError(
                        f"{len(self.damaged)} of {self._num_read} records read are damaged, the last: {error}; "
                        "make the damaged shards again with `aromni pretokenize`"
                    ) from error
            return None

    def keys(self, row: int) -> list[str]:
        """Keys of the documents of `row`; a damaged one is named by its place."""
        found = []
        for document in self._plan[row]:
            stored = self._read(int(document))
            found.append(stored.key if stored else self._mixture.where(int(document)))
        return found


class Batcher:
    """Writes rows into the arrays of a PackedBatch."""

    def __init__(self, rows: Rows, table_TMR: np.ndarray, vocab: JointVocab, row_length: int) -> None:
        self._rows = rows
        self._table_TMR = table_TMR
        self._pad = vocab.pad
        self._row_length = row_length

    def batch(self, rows: Sequence[int | None]) -> PackedBatch:
        """The rows by index as numpy arrays [len(rows), row_length]; None is a row of padding only."""
        shape = (len(rows), self._row_length)
        inputs_BL, targets_BL = np.full(shape, self._pad, np.int32), np.full(shape, self._pad, np.int32)
        segment_ids_BL, positions_BL = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        modality_BL, task_BL = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        loss_weights_BL, perceptual_mask_BL = np.zeros(shape, np.float32), np.zeros(shape, bool)
        for b, row in enumerate(rows):
            start = 0
            for segment, stored in enumerate(self._rows.documents(row) if row is not None else (), 1):
                if stored is None:
                    continue  # what follows moves up, and the end of the row stays padding
                document = to_document(stored, self._table_TMR)
                place = b, slice(start, start + len(document.inputs_L))
                inputs_BL[place], targets_BL[place] = document.inputs_L, document.targets_L
                segment_ids_BL[place] = segment
                positions_BL[place] = np.arange(len(document.inputs_L))
                loss_weights_BL[place] = document.loss_weights_L
                modality_BL[place] = document.modality_L
                task_BL[place] = document.task
                perceptual_mask_BL[place] = document.perceptual_mask_L
                start += len(document.inputs_L)
        return PackedBatch(
            inputs_BL=inputs_BL,
            targets_BL=targets_BL,
            segment_ids_BL=segment_ids_BL,
            positions_BL=positions_BL,
            loss_weights_BL=loss_weights_BL,
            modality_BL=modality_BL,
            task_BL=task_BL,
            perceptual_mask_BL=perceptual_mask_BL,
        )


class BatchIterator:
    """Endless iterator of this process's rows of each global batch, as a PackedBatch of numpy arrays.

    `fingerprint` identifies the stream's rows (data, packing and seed); `statistics` is for logs and reports.
    """

    def __init__(
        self,
        rows: Rows,
        batcher: Batcher,
        *,
        seed: int,
        shuffle: bool,
        global_batch_size: int,
        local_rows: np.ndarray,
        num_workers: int,
        prefetch_batches: int,
        statistics: dict[str, Any],
    ) -> None:
        local_rows = np.asarray(local_rows, np.int64)
        if local_rows.size and (local_rows.min() < 0 or local_rows.max() >= global_batch_size):
            raise ValueError(f"local rows {local_rows.tolist()} lie outside a global batch of {global_batch_size} rows")
        self._rows = rows
        self._batcher = batcher
        self._seed = seed
        self._shuffle = shuffle
        self._global_batch_size = global_batch_size
        self._local_rows = local_rows
        self._num_workers = num_workers
        self._prefetch_batches = prefetch_batches
        self.fingerprint = rows.fingerprint
        self.statistics = statistics
        self._permutation = functools.lru_cache(maxsize=3)(self._make_permutation)
        self._base_step = self._base_row = self._num_drawn = 0
        self._reader: Iterator[PackedBatch] | None = None

    def _make_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._rows.num_rows or 0)

    def row_at(self, position: int) -> int:
        """Row of the plan at `position` of the stream: the one place where order is decided."""
        if self._rows.num_rows is None:
            return position
        epoch, offset = divmod(position, self._rows.num_rows)
        return int(self._permutation(epoch)[offset]) if self._shuffle else offset

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> PackedBatch:
        if self._reader is None:
            self._reader = self._open_reader()
        batch = next(self._reader)
        self._num_drawn += 1
        return batch

    def _open_reader(self) -> Iterator[PackedBatch]:
        """Reads ahead in `num_workers` threads (none: in the caller's), which never changes the order."""
        base_row = self._base_row + self._num_drawn * self._global_batch_size
        source = _Steps(lambda n: self._local_batch(base_row + n * self._global_batch_size))
        options = grain.ReadOptions(
            num_threads=self._num_workers, prefetch_buffer_size=max(self._prefetch_batches, self._num_workers)
        )
        return iter(grain.MapDataset.source(source).to_iter_dataset(options))

    def _local_batch(self, first_row: int) -> PackedBatch:
        return self._batcher.batch([self.row_at(first_row + int(row)) for row in self._local_rows])

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the batches drawn so far: the next step, the next row, the plan."""
        return {
            "next_step": self._base_step + self._num_drawn,
            "next_row": self._base_row + self._num_drawn * self._global_batch_size,
            "plan": self.fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`, whatever the numbers of processes, threads and rows per batch were then.

        Raises:
          ValueError: the state belongs to other data, another seed or another sequence length.
        """
        if state["plan"] != self.fingerprint:
            raise ValueError(
                f"the checkpoint was trained on rows of plan {state['plan']}, this run reads plan {self.fingerprint}: "
                "data set, mixture, seed or sequence_length changed. Go on with the old ones, or start a new workdir "
                "with init_from"
            )
        self._base_step, self._base_row = int(state["next_step"]), int(state["next_row"])
        self._num_drawn = 0
        self._reader = None

    def describe_batch(self, step: int) -> list[str]:
        """Keys of the records that step `step` trains on; the first step of a run is step 1."""
        first_row = self._base_row + (step - 1 - self._base_step) * self._global_batch_size
        positions = range(max(first_row, 0), first_row + self._global_batch_size)
        return [key for position in positions for key in self._rows.keys(self.row_at(position))]


class _Steps:
    """Grain's random-access protocol over a function of the step."""

    def __init__(self, batch_at: Any) -> None:
        self._batch_at = batch_at

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> PackedBatch:
        return self._batch_at(step)

    def __repr__(self) -> str:
        return "PackedBatches"


def make_train_iterator(
    data: DataConfig,
    vocab: JointVocab,
    *,
    loss: LossConfig,
    seed: int,
    sequence_length: int,
    global_batch_size: int,
    local_rows: np.ndarray | None = None,
) -> BatchIterator:
    """The training rows of a config. `local_rows` are the rows of the global batch this process reads (None: all).

    Raises:
      ValueError: a data set that cannot be used (see `Mixture`), or a record longer than `sequence_length`.
    """
    rows: Rows
    if data.mixture == "synthetic":
        rows, shares = SyntheticRows(vocab, sequence_length, seed=seed), {}
    else:
        mixture = Mixture(data, vocab, seed=seed)
        rows, shares = PlannedRows(mixture, sequence_length, seed=seed), mixture.shares
    table_TMR = weight_table(loss, rows.counts_TMR)
    statistics = {
        "rows": rows.num_rows,
        "fill": rows.fill,
        "target_tokens": int(rows.counts_TMR.sum()),
        "mixture": shares,
        **describe_shares(rows.counts_TMR, table_TMR),
    }
    log.info("rows of %d are %.2f%% full", sequence_length, 100 * rows.fill)
    return BatchIterator(
        rows,
        Batcher(rows, table_TMR, vocab, sequence_length),
        seed=seed,
        shuffle=data.shuffle,
        global_batch_size=global_batch_size,
        local_rows=np.arange(global_batch_size) if local_rows is None else local_rows,
        num_workers=data.num_workers,
        prefetch_batches=data.prefetch_batches,
        statistics=statistics,
    )


class _ListedRows:
    """Rows packed from examples in memory."""

    def __init__(self, examples: Sequence[Example], row_length: int) -> None:
        lengths_N = np.array([len(example.tokens_L) - 1 for example in examples], np.int64)
        for example, length in zip(examples, lengths_N.tolist(), strict=True):
            if length > row_length:
                raise ValueError(f"record {example.key!r} has {length + 1} tokens, a row holds {row_length + 1}")
        self._stored = [StoredExample.of(example) for example in examples]
        self._plan = make_plan(lengths_N, row_length, seed=0)
        self.num_rows = self._plan.num_rows
        self.fingerprint, self.fill = "", self._plan.fill
        self.counts_TMR = np.zeros(0)

    def documents(self, row: int) -> list[StoredExample | None]:
        return [self._stored[document] for document in self._plan[row]]

    def keys(self, row: int) -> list[str]:
        return [self._stored[document].key for document in self._plan[row]]


def load_examples(
    dataset_dir: str | os.PathLike[str],
    vocab: JointVocab | None = None,
    *,
    tasks: Sequence[Task] | None = None,
    holdout: str | None = None,
    limit: int | None = None,
) -> list[StoredExample]:
    """Records of a data set with their facts, in stored order: those of `tasks`, and of one hold-out where it is named.

    `limit` takes that many, spread evenly over what matches.
    """
    dataset = TokenDataset(dataset_dir, vocab)
    wanted: Sequence[int] = range(len(dataset))
    if tasks is not None:
        wanted = np.flatnonzero(np.isin(dataset.tasks_N, [int(task) for task in tasks])).tolist()
    found = [dataset[index] for index in wanted]
    if holdout is not None:
        found = [stored for stored in found if stored.facts.get("holdout") == holdout]
    if limit is not None and len(found) > limit:
        found = [found[i] for i in np.linspace(0, len(found) - 1, limit).round().astype(int)]
    return found


def evaluation_batches(
    examples: Sequence[Example],
    vocab: JointVocab,
    *,
    sequence_length: int,
    batch_size: int,
    table_TMR: np.ndarray | None = None,
    local_rows: np.ndarray | None = None,
) -> Iterator[PackedBatch]:
    """One ordered pass over `examples` in packed rows; the last batch is filled up with rows of padding.

    `table_TMR` gives loss weights (None: every target counts 1, so that sums are plain negative log-likelihoods).
    """
    rows = _ListedRows(examples, sequence_length)
    batcher = Batcher(rows, UNIFORM_TMR if table_TMR is None else table_TMR, vocab, sequence_length)
    local = np.arange(batch_size) if local_rows is None else np.asarray(local_rows)
    for start in range(0, rows.num_rows, batch_size):
        positions = [start + int(row) for row in local]
        yield batcher.batch([position if position < rows.num_rows else None for position in positions])
