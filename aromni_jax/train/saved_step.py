"""One finished checkpoint on disk: what it says of its run, how its arrays are laid out, and reading them checked.

On disk every array has the name of its path in the state (`params/layers/attention/q`), whatever Python containers hold
it, so that optimizer classes may move without touching old checkpoints. Beside the arrays a step records the facts
about the run (config, vocabulary and data fingerprints, data position) and one checksum per array: Orbax notices a file
that was cut short, but reads flipped bits as numbers.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from aromni_jax.train.leaves import any_process, checksums, key_name, named_leaves, nested

STACKED = "layers"
"""Arrays below a key of this name carry the layer on their first axis. Each layer is stored in chunks of its own, so
that reading one layer of a large model reads no other."""

_SEEN_AFTER_SECONDS = 60
"""So long a host may go on believing that a folder another host has made is not there (network file systems)."""

ONE_BEGINS = threading.Lock()
"""Held while Orbax begins to save or to load. It numbers what it does in one variable of the process: two that begin at
once take each other's signals for their own, and wait for ever or write into a folder that is not there yet."""


class DamagedCheckpoint(Exception):
    """A checkpoint that exists but cannot be read as what was written."""


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What a checkpoint says about its run, beside the arrays. Everything is JSON.

    `data_position` is the state of the batch iterator after the last trained step, `metrics_window` the sums since the
    last logged line (`train.metrics`): with both, the resumed run writes the lines an uninterrupted one would have.
    """

    config: dict[str, Any]
    vocab_fingerprint: str
    data_fingerprint: str
    data_position: dict[str, Any]
    metrics_window: dict[str, Any]


def context(partial: bool = False, between: Callable[[], None] = lambda: None) -> ocp.Context:
    """Orbax options for everything here: a chunk per layer, not compressed; `partial` restores only what is wanted.
    Saving calls `between` twice for each array, before it is written."""
    made = ocp.Context()
    saving = made.array_options.saving
    # Trained floats shrink by a tenth at most, for more of the processors' time than all the rest of a save.
    saving.use_compression = False
    # Whoever restores says where arrays go; the file with the old places costs a fifth of a small save.
    saving.enable_write_sharding_file = False

    def storage(path: Any, leaf: Any) -> Any:
        between()
        stacked = STACKED in map(key_name, path) and getattr(leaf, "ndim", 0) > 1
        return type(saving).StorageOptions(shard_axes=(0,)) if stacked else None

    saving.scoped_storage_options_creator = storage
    made.pytree_options.loading.partial_load = partial
    return made


def describe_differences(saved: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Readable differences between two {name: array-like} maps in names, shapes and dtypes; "" where there are none."""
    lines = [f"{name} is saved but not expected" for name in saved if name not in wanted]
    lines += [f"{name} is expected but not saved" for name in wanted if name not in saved]
    for name in (name for name in wanted if name in saved):
        old, new = saved[name], wanted[name]
        if tuple(old.shape) != tuple(new.shape):
            lines.append(f"{name} has shape {tuple(old.shape)}, expected {tuple(new.shape)}")
        elif old.dtype != new.dtype:
            lines.append(f"{name} has dtype {old.dtype}, expected {new.dtype}: values are never cast silently")
    shown = lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else [])
    return "; ".join(shown)


def list_steps(directory: pathlib.Path) -> list[int]:
    """Steps of the finished checkpoints below a `checkpoints/` folder, oldest first (Orbax renames what is whole)."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit() and entry.is_dir())


@dataclasses.dataclass(frozen=True)
class SavedStep:
    """One finished checkpoint, opened for reading: the facts, and name -> shape and dtype of every array."""

    path: pathlib.Path
    step: int
    facts: RunFacts
    leaves: dict[str, jax.ShapeDtypeStruct]
    checksums: dict[str, int]

    @classmethod
    def open(cls, directory: pathlib.Path, step: int) -> SavedStep:
        """Reads what describes the arrays, not the arrays; raises DamagedCheckpoint where that is not whole."""
        path = directory / str(step)
        try:
            with _quiet():
                found = ocp.checkpointables_metadata(path)
            custom = found.custom_metadata
            if not custom or not isinstance(found.metadata.get("state"), dict):
                raise DamagedCheckpoint(f"{path}: its description is missing or cut short")
            leaves = named_leaves(found.metadata["state"])
            structs = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
            facts = RunFacts(**custom["facts"])
            return cls(path, step, facts, structs, custom["checksums"])
        except DamagedCheckpoint:
            raise
        except Exception as error:
            raise DamagedCheckpoint(f"{path}: {root_cause(error)}") from error

    @classmethod
    def open_on_all(cls, directory: pathlib.Path, step: int) -> SavedStep:
        """`open` on every process of a run.

        Raises:
          DamagedCheckpoint: on all of them; none can read what describes the arrays.
          OSError: on all of them; some can.
        """
        path, failure = directory / str(step), None
        if jax.process_count() > 1:
            _wait_for(path)
        try:
            saved = cls.open(directory, step)
        except DamagedCheckpoint as error:
            failure = error
        if not any_process(failure is not None):
            return saved
        if any_process(failure is None):
            # Not damaged, so it must not be set aside; a launcher starts again, perhaps when the host reads again.
            cause = f"here: {failure}" if failure else "here it reads"
            raise OSError(f"not every process can read {path} ({cause}); all hosts need the same folder there")
        assert failure
        raise failure

    def restore(self, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Reads the named arrays onto the shardings of `wanted` (any mesh) and compares their checksums.

        Raises:
          ValueError: `wanted` names arrays that are not there, or with another shape or dtype.
          DamagedCheckpoint: the files do not hold what was saved.
        """
        differences = describe_differences({n: leaf for n, leaf in self.leaves.items() if n in wanted}, wanted)
        if differences:
            raise ValueError(f"checkpoint {self.path} does not fit: {differences}")
        failure: Exception | None = None
        arrays: dict[str, jax.Array] = {}
        try:
            with _quiet(), ONE_BEGINS, context(partial=True):
                arrays = named_leaves(ocp.load_checkpointables(self.path, {"state": nested(wanted)})["state"])
        except Exception as error:
            failure = error
        if any_process(failure is not None):
            cause = root_cause(failure) if failure else "another process could not read its part"
            raise DamagedCheckpoint(f"{self.path}: {cause}") from failure
        arrays = {name: arrays[name] for name in wanted}
        found = checksums(arrays)
        wrong = [name for name in wanted if found[name] != self.checksums.get(name)]
        if wrong:
            raise DamagedCheckpoint(f"{self.path}: contents changed since they were saved in {', '.join(wrong[:4])}")
        return arrays


def _wait_for(path: pathlib.Path) -> None:
    """Until this host sees a folder that another one has made."""
    give_up = time.monotonic() + _SEEN_AFTER_SECONDS
    while not path.is_dir() and time.monotonic() < give_up:
        time.sleep(1)


def root_cause(error: BaseException) -> str:
    """First line of what really happened: Orbax reports most failures as a wrong handler and keeps the cause below."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).split("\n")[0].split(" [tensorstore_spec")[0].split(". See full TensorStore")[0]
    return f"{type(error).__name__}: {text}"[:300]


class _quiet:
    """Keeps Orbax and asyncio from printing pages about a file that we report in one line."""

    def __enter__(self) -> None:
        self._levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in ("absl", "asyncio")]
        for logger, _ in self._levels:
            logger.setLevel(logging.CRITICAL + 1)

    def __exit__(self, *_: object) -> None:
        for logger, level in self._levels:
            logger.setLevel(level)
