"""A mixture of named data sets: how many documents of each stand in a cycle of the stream, and which shares that gives.

Without weights a cycle is every record of every data set once. With weights, shares of examples or of target tokens as
`data.weight_unit` says, the data set that lasts longest at its weight stands in a cycle exactly once and the others as
often as their weights ask. `data.temperature` T flattens the shares: each is raised to the power 1/T. Where the run
stops on exhaustion there is one cycle, which ends when the first data set (without weights: every one) has been read
`data.epochs` times.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from aromni_jax.config import DataConfig, from_mapping
from aromni_jax.structs import Modality, Task
from aromni_jax.vocab import JointVocab
from data_pipelines.document_stream import Cursor, DocumentStream
from data_pipelines.duplicates import open_dataset

log = logging.getLogger(__name__)

_MOST_REPEATS = 1000


@dataclasses.dataclass(frozen=True)
class MixtureEntry:
    """One data set of `data.mixture`; `weight` is its share, in any unit that the others share."""

    path: str
    weight: float | None = None


class Mixture:
    """The data sets of a config, opened and checked, and the streams that can be drawn from them.

    Raises:
      ValueError: a data set that is not there or was made with another vocabulary; weights that are not positive, given
        for some data sets only, or so far apart that one data set would be repeated more than a thousand times; the
        same data set twice.
    """

    def __init__(self, data: DataConfig, vocab: JointVocab) -> None:
        if isinstance(data.mixture, str) or not data.mixture:
            raise ValueError(
                f"config key 'data.mixture': {data.mixture!r} names no data set; give "
                '{"name": {"path": DIR, "weight": share}} or "synthetic"'
            )
        entries = {
            name: from_mapping(MixtureEntry, entry, f"data.mixture.{name}") for name, entry in data.mixture.items()
        }
        self.names = list(entries)
        self.datasets = [
            open_dataset(entry.path, vocab, duplicates=data.duplicates, verify=data.verify)
            for entry in entries.values()
        ]
        for name, dataset in zip(entries, self.datasets, strict=True):
            if not len(dataset):
                raise ValueError(f"config key 'data.mixture.{name}': the data set {dataset.directory} has no records")
        first: dict[str, str] = {}
        for name, dataset in zip(entries, self.datasets, strict=True):
            if (same := first.setdefault(dataset.fingerprint, name)) != name:
                raise ValueError(
                    f"config key 'data.mixture': {name!r} has the same records as {same!r}; give that weight"
                )
        self._data = data
        self._sizes_D = np.array([len(dataset) for dataset in self.datasets])
        self._mean_targets_D = np.array([dataset.lengths_N.mean() - 1 for dataset in self.datasets])
        weights = [entry.weight for entry in entries.values()]
        self._is_weighted = data.temperature != 1 or weights != [None] * len(weights)
        self._wanted_D = self._wanted(weights)
        fresh_D = self.counts([Cursor()] * len(self.datasets))
        repeats_D = fresh_D / self._sizes_D
        self.counts_TMR = np.round(
            sum(dataset.counts_TMR * r for dataset, r in zip(self.datasets, repeats_D, strict=True))
        ).astype(np.int64)
        tokens_D = fresh_D * self._mean_targets_D
        self.shares = {
            name: {
                "examples": float(fresh_D[i] / fresh_D.sum()),
                "tokens": float(tokens_D[i] / tokens_D.sum()),
                "repeats": float(repeats_D[i]),
            }
            for i, name in enumerate(entries)
        }
        for name, share in self.shares.items():
            log.info(
                "mixture: %s has %.1f%% of examples, %.1f%% of tokens, %.2f times a cycle",
                name,
                100 * share["examples"],
                100 * share["tokens"],
                share["repeats"],
            )

    def _wanted(self, weights: Sequence[float | None]) -> np.ndarray:
        """float64 [D]: shares of examples, not scaled."""
        in_tokens = self._data.weight_unit == "tokens"
        if all(weight is None for weight in weights):
            wanted_D = self._sizes_D * (self._mean_targets_D if in_tokens else 1.0)
        else:
            for name, weight in zip(self.names, weights, strict=True):
                if weight is None or weight <= 0:
                    raise ValueError(
                        f"config key 'data.mixture.{name}.weight': must be positive, not {weight}; give every data "
                        "set a weight or none"
                    )
            wanted_D = np.array(weights, np.float64)
        wanted_D = wanted_D ** (1 / self._data.temperature)
        return wanted_D / self._mean_targets_D if in_tokens else wanted_D

    def counts(self, cursors: Sequence[Cursor]) -> np.ndarray:
        """int64 [D]: documents of each data set in a cycle of a stream that begins at `cursors`.

        Raises:
          ValueError: nothing is left to read, or a data set would be repeated too often.
        """
        if self._data.when_exhausted == "stop":
            left_D = np.maximum(self._data.epochs * self._sizes_D - [cursor.num_read for cursor in cursors], 0)
            if not left_D.any() or (self._is_weighted and not left_D.all()):
                raise ValueError(
                    f"config key 'data.epochs': {self.names[int(left_D.argmin())]!r} has been read "
                    f"{self._data.epochs} time(s) already; raise data.epochs or set data.when_exhausted=repeat"
                )
            if not self._is_weighted:
                return left_D
            # A share that is a whole number of documents must not fall below it by rounding.
            return np.floor(self._wanted_D * (left_D / self._wanted_D).min() + 1e-6).astype(np.int64)
        counts_D = np.round(self._wanted_D * (self._sizes_D / self._wanted_D).max()).astype(np.int64)
        most = int((counts_D / self._sizes_D).argmax())
        if counts_D[most] > _MOST_REPEATS * self._sizes_D[most]:
            raise ValueError(
                f"config key 'data.mixture': at these weights {self.names[most]!r} would be repeated "
                f"{counts_D[most] / self._sizes_D[most]:.0f} times a cycle; lower its weight or give it more records"
            )
        return np.maximum(counts_D, self._sizes_D)

    def stream(self, *, seed: int, cursors: Sequence[Cursor] | None = None) -> DocumentStream:
        """The stream of this mixture from `cursors` on (None: from the beginning of every data set)."""
        cursors = [Cursor()] * len(self.datasets) if cursors is None else cursors
        is_finite = self._data.when_exhausted == "stop"
        return DocumentStream(self.datasets, self.counts(cursors), cursors, seed=seed, is_finite=is_finite)


def describe_shares(counts_TMR: np.ndarray, table_TMR: np.ndarray) -> dict[str, Any]:
    """Shares of target tokens and of loss weight, by modality and by task."""
    weights_TMR = counts_TMR * table_TMR

    def share(part: np.ndarray, whole: np.ndarray) -> float:
        return float(np.sum(part)) / max(float(np.sum(whole)), 1e-9)

    return {
        kind: {
            "modality": {m.label: share(table[:, m], table) for m in Modality},
            "task": {t.label: share(table[t], table) for t in Task if counts_TMR[t].any()},
        }
        for kind, table in (("token_share", counts_TMR), ("weight_share", weights_TMR))
    }
