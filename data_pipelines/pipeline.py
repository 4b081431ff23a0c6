"""Packed batches: a pure function from (seed, step) to rows, read ahead by Grain, resumed exactly from a few bytes.

The stream of rows is cut into segments; a place in it is a segment and a row. Batch n takes the B rows after those of
batch n - 1, and a process reads those of its devices. So the global batches are the same for any number of processes
and reading threads, and a change of batch size or of the mixture goes on where the stream stood.
"""

from __future__ import annotations

import bisect
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from aromni_jax.config import DataConfig, LossConfig
from aromni_jax.structs import Example, PackedBatch, Task
from aromni_jax.vocab import JointVocab
from data_pipelines.mixing import Mixture, describe_shares
from data_pipelines.pack_plan import make_plan
from data_pipelines.planned_rows import PlannedRows
from data_pipelines.records import StoredExample, TokenDataset
from data_pipelines.synthetic import SyntheticRows
from data_pipelines.weighting import UNIFORM_TMR, to_targets, weight_table

log = logging.getLogger(__name__)

_ENDLESS = 2**60


class Rows(Protocol):
    """Rows by segment and number; `description` is what a later start needs to know of them."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def description(self) -> dict[str, Any]: ...

    def num_rows(self, segment: int) -> int:
        """Rows of a segment; 0 past the end."""
        ...

    def documents(self, segment: int, row: int) -> Sequence[StoredExample | None]:
        """What stands in a row, in order; None stands for a damaged record."""
        ...

    def keys(self, segment: int, row: int) -> list[str]: ...

    def shares(self, segment: int, row: int) -> dict[str, float]:
        """Share of each data set in the targets of all rows before this one."""
        ...


Place = tuple[int, int]
"""Segment, row."""


class Batcher:
    """Writes rows into the arrays of a PackedBatch, documents from the left, padding at the end."""

    def __init__(self, table_TMR: np.ndarray, vocab: JointVocab, row_length: int) -> None:
        self._table_TMR = table_TMR
        self._pad = vocab.pad
        self._row_length = row_length

    def batch(self, rows: Sequence[Sequence[StoredExample | None]]) -> PackedBatch:
        """The documents of each row as numpy arrays [len(rows), row_length].

        A None among them is skipped and what follows moves up; a row without documents is padding.
        """
        shape = (len(rows), self._row_length)
        arrays = {
            "inputs": np.full(shape, self._pad, np.int32),
            "targets": np.full(shape, self._pad, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "loss_weights": np.zeros(shape, np.float32),
            "modality": np.zeros(shape, np.int32),
            "task": np.zeros(shape, np.int32),
            "perceptual_mask": np.zeros(shape, bool),
        }
        held = [[(segment, each) for segment, each in enumerate(row, 1) if each is not None] for row in rows]
        examples = [each for row in held for _, each in row]
        if examples:
            flat = to_targets(examples, self._table_TMR)
            segments = np.array([segment for row in held for segment, _ in row], np.int32)
            values = {
                "inputs": flat.inputs_L,
                "targets": flat.targets_L,
                "segment_ids": np.repeat(segments, flat.lengths_N),
                "positions": flat.positions_L,
                "loss_weights": flat.loss_weights_L,
                "modality": flat.modality_L,
                "task": flat.task_L,
                "perceptual_mask": flat.perceptual_mask_L,
            }
            ends = np.concatenate([[0], np.cumsum(flat.lengths_N)])[np.cumsum([0, *(len(row) for row in held)])]
            for name, array in arrays.items():
                for b, (start, stop) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
                    array[b, : stop - start] = values[name][start:stop]
        return PackedBatch(**{f"{name}_BL": array for name, array in arrays.items()})


class BatchIterator:
    """Iterator of this process's rows of each global batch, as a PackedBatch of numpy arrays.

    It ends where the rows do; the last global batch is then filled up with rows of padding. `fingerprint` identifies
    the stream's rows (data, mixture, packing and seed); `statistics` is for logs and reports. `mixture` is what a
    checkpoint of another mixture goes on with, None for rows that are no mixture.
    """

    def __init__(
        self,
        rows: Rows,
        batcher: Batcher,
        *,
        mixture: Mixture | None = None,
        global_batch_size: int,
        local_rows: np.ndarray,
        num_workers: int,
        prefetch_batches: int,
        statistics: dict[str, Any],
    ) -> None:
        local_rows = np.asarray(local_rows, np.int64)
        if local_rows.size and (local_rows.min() < 0 or local_rows.max() >= global_batch_size):
            raise ValueError(f"local rows {local_rows.tolist()} lie outside a global batch of {global_batch_size} rows")
        self._batcher = batcher
        self._mixture = mixture
        self._global_batch_size = global_batch_size
        self._local_rows = local_rows
        self._num_workers = num_workers
        self._prefetch_batches = prefetch_batches
        self.statistics = statistics
        self._lock = threading.Lock()
        self._start_from(rows, (0, 0), step=0, num_rows=0)

    def _start_from(self, rows: Rows, place: Place, *, step: int, num_rows: int) -> None:
        self._rows, self._base = rows, place
        self._base_step, self._base_row, self._num_drawn = step, num_rows, 0
        self._ends: list[int] = []
        self._reader: Iterator[PackedBatch] | None = None

    @property
    def fingerprint(self) -> str:
        return self._rows.fingerprint

    def place(self, index: int) -> Place | None:
        """Where row `index` from the start or the last restore stands, None past the end: what decides the order."""
        segment, skipped = self._base
        with self._lock:
            while not self._ends or index >= self._ends[-1]:
                number = segment + len(self._ends)
                num_rows = self._rows.num_rows(number)
                if not num_rows:
                    return None
                self._ends.append(self._ends[-1] + num_rows if self._ends else num_rows - skipped)
            which = bisect.bisect_right(self._ends, index)
        return segment + which, index - (self._ends[which - 1] if which else -skipped)

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> PackedBatch:
        """The next batch; StopIteration when every row has been drawn."""
        if self.place(self._num_drawn * self._global_batch_size) is None:
            raise StopIteration
        if self._reader is None:
            self._reader = self._open_reader()
        batch = next(self._reader)
        self._num_drawn += 1
        return batch

    def _open_reader(self) -> Iterator[PackedBatch]:
        """Reads ahead in `num_workers` threads (none: in the caller's), which never changes the order."""
        first = self._num_drawn
        source = _Steps(lambda n: self._local_batch((first + n) * self._global_batch_size))
        options = grain.ReadOptions(
            num_threads=self._num_workers, prefetch_buffer_size=max(self._prefetch_batches, self._num_workers)
        )
        return iter(grain.MapDataset.source(source).to_iter_dataset(options))

    def _local_batch(self, first_row: int) -> PackedBatch:
        places = [self.place(first_row + row) for row in self._local_rows.tolist()]
        return self._batcher.batch([self._rows.documents(*place) if place else () for place in places])

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the batches drawn so far: the next step, segment and row, and what rows they
        are of."""
        num_rows = self._num_drawn * self._global_batch_size
        segment, row = self.place(num_rows) or (self._base[0] + len(self._ends), 0)
        return {
            "next_step": self._base_step + self._num_drawn,
            "next_row": self._base_row + num_rows,
            "segment": segment,
            "row": row,
            "plan": self.fingerprint,
            "rows": self._rows.description,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`, whatever the numbers of processes, threads and rows per batch were then.

        A state of another mixture is gone on from too: its data sets go on where each of them stood.

        Raises:
          ValueError: the state belongs to other data, another seed or another sequence length.
        """
        rows = self._rows
        if state["plan"] == self.fingerprint:
            segment, row = int(state["segment"]), int(state["row"])
        elif isinstance(rows, PlannedRows) and self._mixture and state.get("rows"):
            rows, segment, row = rows.going_on(state, self._mixture)
        else:
            raise ValueError(
                f"the checkpoint was trained on rows of plan {state['plan']}, this run reads plan {self.fingerprint}: "
                "data, seed or sequence_length changed. Set them back, or start a new workdir with init_from"
            )
        self._start_from(rows, (segment, row), step=int(state["next_step"]), num_rows=int(state["next_row"]))

    def shares(self, state: Mapping[str, Any]) -> dict[str, float]:
        """Share of each data set in the targets drawn up to `state`, since the present mixture began."""
        return self._rows.shares(int(state["segment"]), int(state["row"]))

    def describe_batch(self, step: int) -> list[str]:
        """Keys of the records that step `step` trains on; the first step of a run is step 1."""
        first_row = (step - 1 - self._base_step) * self._global_batch_size
        places = [self.place(row) for row in range(max(first_row, 0), first_row + self._global_batch_size)]
        return [key for place in places if place for key in self._rows.keys(*place)]


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
    mixture = None if data.mixture == "synthetic" else Mixture(data, vocab)
    rows: SyntheticRows | PlannedRows
    if mixture is None:
        rows = SyntheticRows(vocab, sequence_length, seed=seed)
    else:
        rows = PlannedRows.of(mixture, sequence_length, seed=seed, shuffle=data.shuffle)
    counts_TMR = (mixture or rows).counts_TMR  # type: ignore[union-attr]
    table_TMR = weight_table(loss, counts_TMR)
    statistics = {
        "fill": rows.fill(),
        "target_tokens": int(counts_TMR.sum()),
        "mixture": mixture.shares if mixture else {},
        **describe_shares(counts_TMR, table_TMR),
    }
    log.info("rows of %d are %.2f%% full", sequence_length, 100 * statistics["fill"])
    return BatchIterator(
        rows,
        Batcher(table_TMR, vocab, sequence_length),
        mixture=mixture,
        global_batch_size=global_batch_size,
        local_rows=np.arange(global_batch_size) if local_rows is None else local_rows,
        num_workers=data.num_workers,
        prefetch_batches=data.prefetch_batches,
        statistics=statistics,
    )


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
    if holdout is None:
        # Only what is kept is read. A hold-out is a fact of the record itself, which reading alone tells.
        return [dataset[index] for index in _spread(wanted, limit)]
    stored = (dataset[index] for index in wanted)
    return _spread([each for each in stored if each.facts.get("holdout") == holdout], limit)


def _spread(items: Sequence[Any], limit: int | None) -> list[Any]:
    """`limit` of `items`, evenly, the first and the last among them; all where there are no more."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


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
    lengths_N = np.array([len(example.tokens_L) - 1 for example in examples], np.int64)
    for example, length in zip(examples, lengths_N.tolist(), strict=True):
        if length > sequence_length:
            raise ValueError(f"record {example.key!r} has {length + 1} tokens, a row holds {sequence_length + 1}")
    stored = [StoredExample.of(example) for example in examples]
    plan = make_plan(lengths_N, sequence_length, seed=0)
    batcher = Batcher(UNIFORM_TMR if table_TMR is None else table_TMR, vocab, sequence_length)
    local = range(batch_size) if local_rows is None else np.asarray(local_rows).tolist()
    for start in range(0, plan.num_rows, batch_size):
        rows = [plan[start + row] if start + row < plan.num_rows else () for row in local]
        yield batcher.batch([[stored[document] for document in row] for row in rows])
