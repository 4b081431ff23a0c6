"""Checkpoints: train state, data position and the identity of a run in one Orbax step, and nothing restored unchecked.

On disk every array has the name of its path in the state (`params/layers/attention/q`), whatever Python containers hold
it, so that optimizer classes may move without touching old checkpoints. Beside the arrays a step records the facts
about the run (config, vocabulary and data fingerprints, data position) and one checksum per array: Orbax notices a file
that was cut short, but reads flipped bits as numbers.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from aromni_jax.arrays import PyTree
from aromni_jax.config import CheckpointConfig
from aromni_jax.train import workdir as workdirs
from aromni_jax.train.leaves import (
    any_process,
    array_checksums,
    array_checksums_in_turn,
    checksums,
    key_name,
    named_leaves,
    nested,
    of_first_process,
    on_device,
)
from aromni_jax.train.local_tier import LocalTier
from aromni_jax.train.pieces import PIECE_BYTES, Pieces, is_possible
from aromni_jax.train.watchdog import TryAgain

log = logging.getLogger(__name__)

STACKED = "layers"
"""Arrays below a key of this name carry the layer on their first axis. Each layer is stored in chunks of its own, so
that reading one layer of a large model reads no other."""

_UNFINISHED = ".orbax-checkpoint-tmp"
"""How Orbax calls a step's folder, after the step, until it is whole."""

_SWITCH_SECONDS = 0.0005
"""After this long a thread of Python gives way to another that waits (5 ms is usual)."""

_SEEN_AFTER_SECONDS = 60
"""So long a host may go on believing that a folder another host has made is not there (network file systems)."""

_ONE_BEGINS = threading.Lock()
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
            raise DamagedCheckpoint(f"{path}: {_root_cause(error)}") from error

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
            with _quiet(), _ONE_BEGINS, context(partial=True):
                arrays = named_leaves(ocp.load_checkpointables(self.path, {"state": nested(wanted)})["state"])
        except Exception as error:
            failure = error
        if any_process(failure is not None):
            cause = _root_cause(failure) if failure else "another process could not read its part"
            raise DamagedCheckpoint(f"{self.path}: {cause}") from failure
        arrays = {name: arrays[name] for name in wanted}
        found = checksums(arrays)
        wrong = [name for name in wanted if found[name] != self.checksums.get(name)]
        if wrong:
            raise DamagedCheckpoint(f"{self.path}: contents changed since they were saved in {', '.join(wrong[:4])}")
        return arrays


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A state as it was when `Checkpointer.snapshot` was called: arrays by name, which nobody overwrites, and one
    checksum each [number of arrays]. Devices may still be computing both."""

    named: dict[str, jax.Array]
    checksums: Any


class Checkpointer:
    """Saves and restores one run below `workdir/checkpoints`; the same calls on every process.

    The loop does not wait for a save: `snapshot` asks the devices for a copy and `write` hands it to Orbax, which
    brings it to the host and to the files while the next steps run. With one process a thread of our own calls Orbax;
    with several the caller's thread does, for about the time of the copy to the host, because Orbax then talks to the
    other processes about preemption, in the order of the loop. A failed write is raised by the next `snapshot`,
    `write`, `wait` or `close`. Opening removes what a killed save left behind.

    Where the processors are the devices, a save is written in pieces with rests between (`train.pieces`), until
    somebody waits for it: the next save, or the end of the run.
    """

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig):
        self.directory = workdir / workdirs.CHECKPOINTS
        self._config = config
        self._local = LocalTier(config.local_directory, _run_id(workdir)) if config.local_directory else None
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint", _step_back)
        self._writing: list[Any] = []
        self._pieces = Pieces()
        # An accelerator's host has processors to spare, and writes faster all at once.
        self._is_resting = config.asynchronous and jax.default_backend() == "cpu"
        self._copy: Any = None
        self._sums: Any = None
        self._sums_of_copy = True
        self._open()

    def _open(self) -> None:
        _meet_over_the_network()
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(self._config.keep_last)]
        if self._config.keep_every_steps:
            keep.append(policies.EveryNSteps(self._config.keep_every_steps))
        saving = context(between=self._pieces.pause)
        if self._is_resting and is_possible():
            saving.memory_options.transfer_concurrent_bytes = PIECE_BYTES
            saving.memory_options.serialization_status_callback = self._pieces
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            context=saving,
            # The loop decides when to save; Orbax is never asked twice.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, oldest first."""
        return list_steps(self.directory)

    def prepare(self, state: PyTree, has_room: bool = True) -> None:
        """Compiles what the first `snapshot` of such a state needs; `has_room` says whether devices can hold a second
        state beside what a step needs. Where they cannot, copies go to the memory of the host, and the next step waits
        for them."""
        arrays = list(named_leaves(state).values())
        places = [x.sharding if has_room else x.sharding.with_memory_kind("pinned_host") for x in arrays]
        copy = jax.jit(lambda arrays: [jnp.copy(on_device(x)) for x in arrays], out_shardings=places)
        self._copy = copy.lower(arrays).compile()
        self._sums = array_checksums.lower(arrays).compile()
        self._sums_of_copy = has_room

    def snapshot(self, state: PyTree) -> Snapshot:
        """Asks the devices for a copy of `state`, which may be donated at once. Waits for the previous save first."""
        self.wait()
        if self._copy is None:
            self.prepare(state)
        named = named_leaves(state)
        arrays = list(named.values())
        copies = self._copy(arrays)
        return Snapshot(dict(zip(named, copies)), self._sums(copies if self._sums_of_copy else arrays))

    def write(
        self,
        step: int,
        snapshot: Snapshot,
        facts: RunFacts,
        before: Callable[[], None] = lambda: None,
        *,
        is_shared: bool = True,
        is_local: bool = False,
    ) -> None:
        """Writes a snapshot and `facts` as `step`, to the shared folder or the local disk or both; `before` runs first,
        in the thread that writes."""
        self.wait()
        self._pieces.start(self.directory / f"{step}{_UNFINISHED}", is_awaited=not self._is_resting)
        said = dataclasses.asdict(facts)

        def sums() -> dict[str, int]:
            return {name: int(value) for name, value in zip(snapshot.named, np.asarray(snapshot.checksums))}

        def write_local(local: LocalTier) -> None:
            local.write(step, snapshot.named, said, sums())

        def begin_shared() -> Any:
            metadata = {"facts": said, "checksums": sums()}
            # The step that saves has already computed the copy.
            self._pieces.rest()
            with _ONE_BEGINS:
                begun = self._orbax.save_checkpointables_async(
                    step, {"state": nested(snapshot.named)}, custom_metadata=metadata
                )
            if not begun:
                raise RuntimeError(f"Orbax did not save step {step} below {self.directory}, after {self._orbax.latest}")
            return begun

        self._writing.append(self._thread.submit(before))
        if not self._config.asynchronous or jax.process_count() > 1:
            self._writing.pop().result()
        if is_local and self._local:
            self._writing.append(self._thread.submit(write_local, self._local))
        if is_shared and self._config.asynchronous and jax.process_count() == 1:
            self._writing.append(self._thread.submit(lambda: begin_shared().result()))
        elif is_shared:
            self._writing.append(begin_shared())
        if not self._config.asynchronous:
            self.wait()

    def save(self, step: int, state: PyTree, facts: RunFacts) -> None:
        """Saves `state` and `facts` as `step` in the shared folder; waits for the previous save first."""
        if self._config.asynchronous:
            snapshot = self.snapshot(state)
        else:
            named = named_leaves(state)
            snapshot = Snapshot(named, array_checksums_in_turn(list(named.values())))
        self.write(step, snapshot, facts)

    def restore_latest(
        self, abstract_state: PyTree, check: Callable[[RunFacts], None]
    ) -> tuple[int, PyTree, RunFacts] | None:
        """Newest readable checkpoint as (step, state, facts), or None where none was ever finished. It comes from
        the local disks where every process has a newer one there.

        `abstract_state` has the tree, shapes, dtypes and shardings wanted; `check` raises ValueError when the facts
        belong to another run. A damaged checkpoint is set aside as `STEP.damaged`, the one before it is used, and both
        are named in the log.

        Raises:
          ValueError: `check` refused, arrays do not fit, or every checkpoint is damaged.
        """
        wanted = named_leaves(abstract_state)
        steps = of_first_process(self.steps())
        found = None
        if self._local:
            local = self._local.restore(wanted, lambda said: check(RunFacts(**said)), steps[-1] if steps else -1)
            if local:
                found = (local[0], local[1], RunFacts(**local[2]))
                log.info("using the local checkpoint of step %d below %s", local[0], self._local.folder)
        found = found or self._restore_shared(steps, wanted, check)
        if self._local:
            self._local.discard_after(found[0] if found else -1)
        if not found:
            return None
        step, arrays, facts = found
        return step, jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in wanted]), facts

    def _restore_shared(
        self, steps: list[int], wanted: dict[str, jax.ShapeDtypeStruct], check: Callable[[RunFacts], None]
    ) -> tuple[int, dict[str, jax.Array], RunFacts] | None:
        damaged: list[tuple[int, DamagedCheckpoint]] = []
        for step in reversed(steps):
            try:
                saved = SavedStep.open_on_all(self.directory, step)
                check(saved.facts)
                differences = describe_differences(saved.leaves, wanted)
                if differences:
                    raise ValueError(f"checkpoint {saved.path} is of another model or optimizer: {differences}")
                arrays = saved.restore(wanted)
            except DamagedCheckpoint as error:
                log.error("checkpoint %d is damaged (%s)", step, error)
                damaged.append((step, error))
                continue
            if damaged:
                names = ", ".join(str(number) for number, _ in damaged)
                log.error("using checkpoint %d instead of damaged %s (set aside as STEP.damaged)", step, names)
                self._set_aside([number for number, _ in damaged])
            return step, arrays, saved.facts
        if damaged:
            raise ValueError(
                f"no checkpoint below {self.directory} can be read ({damaged[0][1]}); start in another --workdir"
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged steps, so that the run can save these steps again."""
        self._orbax.close()
        if jax.process_index() == 0:
            for step in steps:
                free = next(
                    name
                    for number in range(len(steps) + 1000)
                    if not (name := self.directory / f"{step}.damaged{number or ''}").exists()
                )
                (self.directory / str(step)).rename(free)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("aromni damaged checkpoints set aside")
        self._open()

    def wait(self) -> None:
        """Blocks until the last save is on disk; TryAgain with what went wrong with it."""
        self._pieces.hurry()
        try:
            while self._writing:
                self._writing.pop(0).result()
            self._orbax.wait()
        except Exception as error:
            raise TryAgain(
                f"a checkpoint could not be written below {self.directory} ({_root_cause(error)}): is there space, is "
                "the folder still mounted? The same command goes on from the last one that is whole"
            ) from error

    def close(self) -> None:
        """Waits and releases; call it before the process ends."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()


def _wait_for(path: pathlib.Path) -> None:
    """Until this host sees a folder that another one has made."""
    give_up = time.monotonic() + _SEEN_AFTER_SECONDS
    while not path.is_dir() and time.monotonic() < give_up:
        time.sleep(1)


def _step_back() -> None:
    """Lets threads that compute go before this one and those it starts (Linux).

    Where the processors are the devices, it gets little more than they leave idle, so that a save spreads over several
    steps instead of holding up one; when the loop waits for it, that is everything. Beside an accelerator it gets a
    third of the weight of others, which may belong to somebody else's work.
    """
    is_cpu = jax.default_backend() == "cpu"
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(
            os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + (19 if is_cpu else 5))
        )
    if is_cpu:
        # While this thread waits for a processor it may hold the interpreter, which the loop needs between two steps.
        sys.setswitchinterval(_SWITCH_SECONDS)


def _meet_over_the_network() -> None:
    """Lets Orbax's processes wait for each other in jax's coordination service, not in a program on the devices: that
    would queue behind the running step, and so would the loop."""
    name = "experimental_orbax_use_distributed_barrier"
    if jax.process_count() > 1 and name in flags.FLAGS:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        flags.FLAGS[name].value = True


def _run_id(workdir: pathlib.Path) -> str:
    """The same name of the run on every process: process 0 reads it, or makes it for a new workdir."""
    name = np.zeros(workdirs.RUN_ID_BYTES, np.uint8)
    if jax.process_index() == 0:
        name = np.frombuffer(bytes.fromhex(workdirs.run_id(workdir)), np.uint8)
    if jax.process_count() > 1:
        name = np.asarray(multihost_utils.broadcast_one_to_all(name)).astype(np.uint8)
    return name.tobytes().hex()


def _root_cause(error: BaseException) -> str:
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
