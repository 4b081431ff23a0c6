"""A mixture of named data sets as one list of documents: what an epoch holds, and the shares it really has.

Without weights every record of every data set stands in an epoch once. With weights, shares of examples or of target
tokens as `data.weight_unit` says, the data set that lasts longest at its weight stands in the epoch exactly once and
the others as often as their weights ask: whole repeats, then a seeded draw without replacement for the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import zipfile
from typing import Any

import numpy as np

from aromni_jax.config import DataConfig, from_mapping
from aromni_jax.structs import Modality, Task
from aromni_jax.vocab import JointVocab
from data_pipelines import pack_plan
from data_pipelines.pack_plan import PackPlan
from data_pipelines.records import StoredExample, TokenDataset

log = logging.getLogger(__name__)

_MOST_REPEATS = 1000


@dataclasses.dataclass(frozen=True)
class MixtureEntry:
    """One data set of `data.mixture`; `weight` is its share, in any unit that the others share."""

    path: str
    weight: float | None = None


class Mixture:
    """The documents of one epoch, by index: `lengths_N` (targets), `tasks_N`, and the stored examples behind them.

    `counts_TMR` counts the targets of an epoch by task, modality and role, repeats included; `shares` says what share
    of examples and tokens each data set has, and how often an epoch repeats it.

    Raises:
      ValueError: a data set that is not there or was made with another vocabulary; weights that are not positive, given
        for some data sets only, or so far apart that one data set would be repeated more than a thousand times.
    """

    def __init__(self, data: DataConfig, vocab: JointVocab, *, seed: int) -> None:
        if isinstance(data.mixture, str) or not data.mixture:
            raise ValueError(
                f"config key 'data.mixture': {data.mixture!r} names no data set; give "
                '{"name": {"path": DIR, "weight": share}} or "synthetic"'
            )
        entries = {
            name: from_mapping(MixtureEntry, entry, f"data.mixture.{name}") for name, entry in data.mixture.items()
        }
        self.datasets = [TokenDataset(entry.path, vocab) for entry in entries.values()]
        for name, dataset in zip(entries, self.datasets, strict=True):
            if not len(dataset):
                raise ValueError(f"config key 'data.mixture.{name}': the data set {dataset.directory} has no records")
        sizes = np.array([len(dataset) for dataset in self.datasets])
        counts = self._documents_of_each(entries, sizes, data.weight_unit)
        parts = [
            _repeat(int(size), int(count), seed, i) for i, (size, count) in enumerate(zip(sizes, counts, strict=True))
        ]
        self._dataset_N = np.repeat(np.arange(len(parts), dtype=np.int16), [len(part) for part in parts])
        self._index_N = np.concatenate(parts)
        self.lengths_N = np.concatenate([d.lengths_N[p] - 1 for d, p in zip(self.datasets, parts, strict=True)])
        self.tasks_N = np.concatenate([d.tasks_N[p] for d, p in zip(self.datasets, parts, strict=True)])
        repeats = counts / sizes
        self.counts_TMR = np.round(sum(d.counts_TMR * r for d, r in zip(self.datasets, repeats, strict=True))).astype(
            np.int64
        )
        tokens = np.array([self.lengths_N[self._dataset_N == i].sum() for i in range(len(parts))])
        self.shares = {
            name: {
                "examples": float(counts[i] / counts.sum()),
                "tokens": float(tokens[i] / tokens.sum()),
                "repeats": float(repeats[i]),
            }
            for i, name in enumerate(entries)
        }
        identity = [[d.fingerprint for d in self.datasets], counts.tolist(), seed if (counts > sizes).any() else 0]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        for name, share in self.shares.items():
            log.info(
                "mixture: %s has %.1f%% of examples, %.1f%% of tokens, %.2f times an epoch",
                name,
                100 * share["examples"],
                100 * share["tokens"],
                share["repeats"],
            )

    def _documents_of_each(self, entries: dict[str, MixtureEntry], sizes: np.ndarray, unit: str) -> np.ndarray:
        weights = [entry.weight for entry in entries.values()]
        if all(weight is None for weight in weights) or len(weights) == 1:
            return sizes
        for name, weight in zip(entries, weights, strict=True):
            if weight is None or weight <= 0:
                raise ValueError(
                    f"config key 'data.mixture.{name}.weight': must be positive, not {weight}; give every data set a "
                    "weight or none"
                )
        wanted = np.array(weights, np.float64)
        if unit == "tokens":
            wanted /= [dataset.lengths_N.mean() - 1 for dataset in self.datasets]
        counts = np.round(wanted * (sizes / wanted).max()).astype(np.int64)
        most = int((counts / sizes).argmax())
        if counts[most] > _MOST_REPEATS * sizes[most]:
            raise ValueError(
                f"config key 'data.mixture': at these weights {list(entries)[most]!r} would be repeated "
                f"{counts[most] / sizes[most]:.0f} times an epoch; lower its weight or give it more records"
            )
        return np.maximum(counts, sizes)

    def __len__(self) -> int:
        return len(self._index_N)

    def __getitem__(self, document: int) -> StoredExample:
        """The stored example of document `document`; ValueError naming its place when it is damaged."""
        return self.datasets[self._dataset_N[document]][int(self._index_N[document])]

    def where(self, document: int) -> str:
        """Shard and record of a document."""
        return self.datasets[self._dataset_N[document]].where(int(self._index_N[document]))

    def plan(self, row_length: int, *, seed: int) -> tuple[PackPlan, str]:
        """The pack plan of an epoch and its hash, read from beside the shards or made and stored there.

        Raises:
          ValueError: a record longer than a row, by name.
        """
        longest = int(self.lengths_N.argmax())
        num_tokens = int(self.lengths_N[longest]) + 1
        if num_tokens > row_length + 1:
            num_long = int((self.lengths_N > row_length).sum())
            raise ValueError(
                f"record {self[longest].key!r} ({self.where(longest)}) has {num_tokens} tokens, "
                f"a row of sequence_length {row_length} holds {row_length + 1}; {num_long} record(s) are too long. "
                "Raise sequence_length, or pre-tokenize again with max_tokens"
            )
        digest = pack_plan.plan_hash(data_fingerprint=self.fingerprint, row_length=row_length, seed=seed)
        path = self.datasets[0].directory / "plans" / f"{digest}.npz"
        plan = _read_plan(path, row_length)
        if plan is None:
            plan = pack_plan.make_plan(self.lengths_N, row_length, seed=seed)
            _write_plan(path, plan)
        return plan, digest


def _repeat(size: int, count: int, seed: int, index: int) -> np.ndarray:
    """`count` record indices out of `size`: whole repeats, and a seeded draw without replacement for the rest."""
    rest = np.random.default_rng([seed, index, size]).permutation(size)[: count % size]
    return np.concatenate([np.tile(np.arange(size), count // size), np.sort(rest)]).astype(np.int64)


def _read_plan(path: pathlib.Path, row_length: int) -> PackPlan | None:
    try:
        with np.load(path) as arrays:
            return PackPlan(arrays["documents_N"], arrays["starts_R"], row_length, int(arrays["num_tokens"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # not there, or cut short by a crash: a plan is made again in seconds


def _write_plan(path: pathlib.Path, plan: PackPlan) -> None:
    """Stores a plan for the next start; on a read-only data set it is made anew each time."""
    temporary = path.with_name(f".tmp-{path.stem}-{os.getpid()}.npz")
    try:
        path.parent.mkdir(exist_ok=True)
        np.savez(temporary, documents_N=plan.documents_N, starts_R=plan.starts_R, num_tokens=np.int64(plan.num_tokens))
        os.replace(temporary, path)
    except OSError as error:
        log.info("the pack plan is not stored beside the shards (%s); it will be made again at the next start", error)


def describe_shares(counts_TMR: np.ndarray, table_TMR: np.ndarray) -> dict[str, Any]:
    """Shares of target tokens and of loss weight, by modality and by task."""
    weights_TMR = counts_TMR * table_TMR
    return {
        kind: {
            "modality": {m.label: float(table[:, m].sum() / max(table.sum(), 1e-9)) for m in Modality},
            "task": {t.label: float(table[t].sum() / max(table.sum(), 1e-9)) for t in Task if counts_TMR[t].any()},
        }
        for kind, table in (("token_share", counts_TMR), ("weight_share", weights_TMR))
    }
