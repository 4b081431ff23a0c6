"""A second tier of checkpoints on the local disk of every process: written often, read only by the same processes.

Each process writes the shards its devices hold, once each, with the facts of the run and the checksums of the whole
arrays, to one safetensors file per step, whole or not at all. A restart takes the newest step that every process has,
if it is newer than the newest shared checkpoint; when a process lacks it (another host, another mesh, a damaged file),
all of them take the shared one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open

from aromni_jax.train import workdir as workdirs
from aromni_jax.train.leaves import any_process, checksums

log = logging.getLogger(__name__)

KEEP = 2
"""Steps kept: a process that is killed while others finish a step still has the one before in common with them."""


class LocalTier:
    """The local checkpoints of one process of one run, below `directory/RUN/PROCESS`.

    `run` is what the workdir is called in `workdir.run_id`: files of another run, or of an earlier one in a folder of
    the same name, are not read.
    """

    def __init__(self, directory: str, run: str):
        self.folder = pathlib.Path(directory).absolute() / run / f"{jax.process_index():05d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"checkpoint.local_directory {directory} cannot be written: {error.strerror}; give a folder on a "
                "disk of every host, or '' for none"
            ) from error

    def steps(self) -> list[int]:
        """Steps with a file, oldest first."""
        return sorted(int(path.stem) for path in self.folder.glob("*.safetensors") if path.stem.isdigit())

    def write(self, step: int, named: dict[str, jax.Array], facts: dict[str, Any], sums: dict[str, int]) -> None:
        """Writes what this process holds of `named`; keeps the newest `KEEP` steps.

        A disk that is full or gone costs this tier, not the run: it is logged.
        """
        try:
            tensors: dict[str, np.ndarray] = {}
            for name, array in named.items():
                # Bytes: any dtype of jax, also those that NumPy lacks.
                for number, shard in enumerate(_own_shards(array)):
                    tensors[f"{name}@{number}"] = np.asarray(shard.data).reshape(-1).view(np.uint8)
            said = {"facts": facts, "checksums": sums, "layout": _layout(named)}
            with workdirs.replacing(self._path(step)) as temporary:
                safetensors.numpy.save_file(tensors, temporary, metadata={"checkpoint": json.dumps(said)})
            self._discard([old for old in self.steps() if old <= step][:-KEEP])
        except (OSError, SafetensorError) as error:
            log.error("local checkpoint of step %d not written: %s", step, error)

    def restore(
        self, wanted: dict[str, jax.ShapeDtypeStruct], check: Callable[[dict[str, Any]], None], newer_than: int
    ) -> tuple[int, dict[str, jax.Array], dict[str, Any]] | None:
        """The newest step that all processes hold, if it is newer than the shared `newer_than`; else None, for all.

        Raises:
          ValueError: `check` refused.
        """
        said = {step: found for step in self.steps() if (found := self._read_description(step, wanted))}
        step = self._newest_in_common(list(said), newer_than)
        if step is None:
            return None
        failure: Exception | None = None
        arrays: dict[str, jax.Array] = {}
        try:
            arrays = self._read(step, wanted)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            failure = error
        cause = str(failure) if failure else "another process could not read its part"
        if not any_process(failure is not None):
            found = checksums(arrays)
            wrong = [name for name in wanted if found[name] != said[step]["checksums"].get(name)]
            if not wrong:
                facts = said[step]["facts"]
                check(facts)
                return step, arrays, facts
            cause = f"contents changed since they were saved in {', '.join(wrong[:4])}"
        log.error("local checkpoint %d is damaged (%s): using the shared one", step, cause)
        return None

    def discard_after(self, step: int) -> None:
        """Removes steps after the one the run goes on from: it will make them anew, perhaps on another mesh."""
        self._discard([newer for newer in self.steps() if newer > step])

    def _path(self, step: int) -> pathlib.Path:
        return self.folder / f"{step}.safetensors"

    def _discard(self, steps: list[int]) -> None:
        for step in steps:
            self._path(step).unlink(missing_ok=True)

    def _read_description(self, step: int, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """What a file says of itself, or None where it cannot be used: damaged, or of another mesh or model."""
        try:
            with safe_open(str(self._path(step)), framework="numpy") as file:
                said = json.loads(file.metadata()["checkpoint"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.error("local checkpoint %d is damaged (%s)", step, error)
            return None
        if said["layout"] != _layout(wanted):
            log.info("local checkpoint %d is of another mesh or model: not used", step)
            return None
        return said

    def _newest_in_common(self, steps: list[int], newer_than: int) -> int | None:
        mine = np.full(KEEP + 1, -1, np.int64)
        newest = sorted(steps)[-KEEP:]
        mine[: len(newest)], mine[KEEP] = newest, newer_than
        rows = mine[None]
        if jax.process_count() > 1:
            rows = np.asarray(multihost_utils.process_allgather(mine.astype(np.int32))).reshape(-1, KEEP + 1)
        common = set.intersection(*({int(step) for step in row[:KEEP] if step >= 0} for row in rows))
        best = max(common, default=-1)
        return best if best > np.max(rows[:, KEEP]) else None

    def _read(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        arrays: dict[str, jax.Array] = {}
        with safe_open(str(self._path(step)), framework="numpy") as file:
            for name, leaf in wanted.items():
                places = _places(leaf)
                numbers = {index: number for number, index in enumerate(dict.fromkeys(places.values()))}
                parts = []
                for device, index in places.items():
                    shape = tuple(stop - start for start, stop in index)
                    part = file.get_tensor(f"{name}@{numbers[index]}").view(leaf.dtype).reshape(shape)
                    parts.append(jax.device_put(part, device))
                arrays[name] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
        return arrays


Index = tuple[tuple[int, int], ...]
"""Which part of an array: (start, stop) on every axis."""


def _places(array: Any) -> dict[jax.Device, Index]:
    """Device of this process -> the part of `array` (or ShapeDtypeStruct) it holds, in the order of the devices."""
    indices = array.sharding.addressable_devices_indices_map(tuple(array.shape))
    spans = {
        device: tuple(s.indices(length)[:2] for s, length in zip(index, array.shape))
        for device, index in indices.items()
    }
    return dict(sorted(spans.items(), key=lambda item: item[0].id))


def _own_shards(array: jax.Array) -> list[Any]:
    """Addressable shards, one for each different part, in the order of `_places`."""
    shards = {shard.device: shard for shard in array.addressable_shards}
    unique: dict[Index, Any] = {}
    for device, index in _places(array).items():
        unique.setdefault(index, shards[device])
    return list(unique.values())


def _layout(named: dict[str, Any]) -> str:
    """What must be equal for a file to be read: which process of how many, and which part of every array is where."""
    parts = {name: [list(x.shape), str(x.dtype), list(_places(x).values())] for name, x in named.items()}
    said = [jax.process_index(), jax.process_count(), parts]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
