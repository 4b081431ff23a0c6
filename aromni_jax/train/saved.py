"""Reading the weights of a run without training it: for export (one array, one layer at a time) and for decoding."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tensorstore

from aromni_jax.train import workdir as workdirs
from aromni_jax.train.leaves import nested, of_first_process
from aromni_jax.train.saved_step import DamagedCheckpoint, RunFacts, SavedStep, list_steps

log = logging.getLogger(__name__)


class SavedParams:
    """The weights (or their moving average) of one checkpoint, read on demand.

    `shapes` maps parameter names (`layers/attention/q`) to shape and dtype.
    """

    def __init__(self, saved: SavedStep, ema: bool):
        prefix = "ema/" if ema else "params/"
        self.saved = saved
        self._prefix = prefix
        self.shapes = {name[len(prefix) :]: leaf for name, leaf in saved.leaves.items() if name.startswith(prefix)}
        if not self.shapes:
            remedy = "train with optimizer.ema_decay > 0, or leave --ema out" if ema else "it is not one of ours"
            raise ValueError(f"checkpoint {saved.path} holds no {prefix[:-1]}; {remedy}")

    @property
    def step(self) -> int:
        return self.saved.step

    @property
    def facts(self) -> RunFacts:
        return self.saved.facts

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """One parameter on the host, or only one layer of a stacked one: no other array is touched.

        Raises:
          ValueError: no such parameter, or its files are damaged.
        """
        if name not in self.shapes:
            raise ValueError(f"checkpoint {self.saved.path} has no parameter {name!r}; it has {', '.join(self.shapes)}")
        spec = {
            "driver": "zarr3",
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{self.saved.path / 'state'}/"},
                "path": (self._prefix + name).replace("/", ".") + "/",
            },
        }
        try:
            array = tensorstore.open(spec, read=True, open=True).result()
            return np.asarray((array if layer is None else array[layer]).read().result())
        except ValueError as error:
            cause = str(error).split(" [tensorstore_spec")[0]
            raise ValueError(f"checkpoint {self.saved.path} is damaged at {name}: {cause[:200]}") from error

    def load(self, wanted: dict[str, jax.ShapeDtypeStruct] | None = None) -> dict[str, Any]:
        """The parameters as a nested dict of jax arrays, checksums compared.

        `wanted` gives names, shapes, dtypes and shardings; without it everything goes to one device.

        Raises:
          ValueError: `wanted` does not fit what is saved.
          DamagedCheckpoint: the files do not hold what was saved.
        """
        if wanted is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            wanted = {name: leaf.update(sharding=device) for name, leaf in self.shapes.items()}
        arrays = self.saved.restore({self._prefix + name: leaf for name, leaf in wanted.items()})
        return nested({name.removeprefix(self._prefix): leaf for name, leaf in arrays.items()})


def _candidates(workdir: str | os.PathLike[str], step: int | None) -> tuple[pathlib.Path, list[int]]:
    directory = pathlib.Path(workdir).absolute() / workdirs.CHECKPOINTS
    steps = of_first_process(list_steps(directory))
    if not steps:
        raise ValueError(f"no checkpoint below {directory}; train first, or give the folder of another run")
    if step is None:
        return directory, steps[::-1]
    if step not in steps:
        raise ValueError(f"no checkpoint of step {step} below {directory}; there are {', '.join(map(str, steps))}")
    return directory, [step]


def available_steps(workdir: str | os.PathLike[str]) -> list[int]:
    """Steps with a finished checkpoint, oldest first."""
    return list_steps(pathlib.Path(workdir).absolute() / workdirs.CHECKPOINTS)


def open_saved(workdir: str | os.PathLike[str], step: int | None = None) -> SavedStep:
    """Opens a checkpoint (the newest whose description is whole); ValueError where there is none."""
    directory, steps = _candidates(workdir, step)
    for number in steps:
        try:
            return SavedStep.open(directory, number)
        except DamagedCheckpoint as error:
            log.error("checkpoint %d is damaged (%s)", number, error)
            cause = error
    raise ValueError(f"no checkpoint below {directory} can be read: {cause}")


def open_for_export(workdir: str | os.PathLike[str], step: int | None = None, ema: bool = False) -> SavedParams:
    """Weights of a checkpoint to be read array by array; `ema` takes the moving average instead.

    Raises:
      ValueError: nothing to read, or a model between pre-norm and Swin-Norm, which only training can compute.
    """
    return _usable(open_saved(workdir, step), ema)


def _usable(saved: SavedStep, ema: bool) -> SavedParams:
    blend_steps = saved.facts.config.get("norm_blend_steps", 0)
    if saved.step < blend_steps:
        raise ValueError(
            f"checkpoint {saved.path} is at step {saved.step} of norm_blend_steps = {blend_steps}, between pre-norm "
            f"and Swin-Norm, which only its own training computes; train on, and take a step from {blend_steps} on"
        )
    return SavedParams(saved, ema)


def read_metadata(workdir: str | os.PathLike[str], step: int | None = None) -> tuple[int, RunFacts]:
    """(step, facts) of a checkpoint without reading its arrays."""
    saved = open_saved(workdir, step)
    return saved.step, saved.facts


def load_whole(
    workdir: str | os.PathLike[str],
    wanted: Callable[[SavedParams], dict[str, jax.ShapeDtypeStruct] | None] = lambda params: None,
    step: int | None = None,
    ema: bool = False,
) -> tuple[SavedParams, dict[str, Any]]:
    """A checkpoint and its weights (`SavedParams.load` of what is `wanted` of it): the newest that is whole when `step`
    is None. All processes of a run call it, and take the same.

    Raises:
      ValueError: no checkpoint, none readable, no moving average in it, or `open_for_export` would refuse it.
    """
    directory, steps = _candidates(workdir, step)
    for number in steps:
        try:
            params = _usable(SavedStep.open_on_all(directory, number), ema)
            arrays = params.load(wanted(params))
        except DamagedCheckpoint as error:
            log.error("checkpoint %d is damaged (%s)", number, error)
            cause = error
            continue
        if number != steps[0]:
            log.error("using checkpoint %d instead of damaged %d", number, steps[0])
        return params, arrays
    raise ValueError(f"no checkpoint below {directory} can be read: {cause}")


def load_params(workdir: str | os.PathLike[str], step: int | None = None, ema: bool = False) -> dict[str, Any]:
    """`load_whole`'s weights as a nested dict on one device."""
    return load_whole(workdir, step=step, ema=ema)[1]
