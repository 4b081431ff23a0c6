"""Saving the train state, the data position and the identity of a run in one Orbax step, and finding it again.

Nothing is restored unchecked: what a step holds and how it is read is in `train.saved_step`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import sys
import threading
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
    array_checksums,
    array_checksums_in_turn,
    named_leaves,
    nested,
    of_first_process,
    on_device,
)
from aromni_jax.train.local_tier import LocalTier
from aromni_jax.train.pieces import Pieces, is_possible, piece_bytes
from aromni_jax.train.saved_step import (
    ONE_BEGINS,
    DamagedCheckpoint,
    RunFacts,
    SavedStep,
    context,
    describe_differences,
    list_steps,
    root_cause,
)
from aromni_jax.train.watchdog import TryAgain

log = logging.getLogger(__name__)

_UNFINISHED = ".orbax-checkpoint-tmp"
"""How Orbax calls a step's folder, after the step, until it is whole."""

_SWITCH_SECONDS = 0.0005
"""After this long a thread of Python gives way to another that waits (5 ms is usual)."""


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

    A save goes to the host and is written in pieces (`train.pieces`). Where the processors are the devices, with rests
    between them, until somebody waits for it: the next save, or the end of the run.
    """

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig):
        self.directory = workdir / workdirs.CHECKPOINTS
        self._config = config
        self._local = LocalTier(config.local_directory, _run_id(workdir)) if config.local_directory else None
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint", _step_back)
        self._writing: list[Any] = []
        self._pieces = Pieces()
        # An accelerator's host has processors to spare.
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
        if self._config.asynchronous and is_possible():
            saving.memory_options.transfer_concurrent_bytes = piece_bytes(jax.default_backend())
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
            with ONE_BEGINS:
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
                f"a checkpoint could not be written below {self.directory} ({root_cause(error)}): is there space, is "
                "the folder still mounted? The same command goes on from the last one that is whole"
            ) from error

    def close(self) -> None:
        """Waits and releases; call it before the process ends."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()


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
