"""One function on every local device: each has a copy of the weights and works on rows of its own.

A device runs the same program on the same number of rows whatever the number of devices, and no row crosses between
them, so what becomes of a row depends neither on the machine's size nor on the rows beside it. Several processes of one
run work independently: only devices that this process addresses take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aromni_jax.arrays import Array, PyTree

Batch = tuple[tuple[np.ndarray, ...], int]
"""Arrays whose first dimension is rows, and how many of the rows count; the rest fill the shape."""

_ROWS = PartitionSpec("data")


class Replicas:
    """Weights, copied to `devices` (default: all of this process) when they are first used."""

    def __init__(self, weights: PyTree, devices: Sequence[jax.Device] | None = None) -> None:
        self._host_weights = weights
        self._devices = devices

    @cached_property
    def mesh(self) -> Mesh:
        """One axis, "data", over the devices."""
        return Mesh(np.array(self._devices or jax.local_devices()), ("data",))

    @cached_property
    def weights(self) -> PyTree:
        """The weights on every device: they are sent once, not with every call."""
        return jax.device_put(self._host_weights, NamedSharding(self.mesh, PartitionSpec()))

    @property
    def num_devices(self) -> int:
        return self.mesh.size


class ReplicatedFunction:
    """`function(weights, *rows)`, whose arguments and result have rows first, compiled once for every shape of rows."""

    def __init__(self, function: Callable[..., Array], replicas: Replicas) -> None:
        self._function = function
        self._replicas = replicas

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        def on_one_device(weights: PyTree, has_work: Array, rows: tuple[Array, ...]) -> Array:
            result = jax.eval_shape(self._function, weights, *rows)
            return jax.lax.cond(
                has_work[0], lambda: self._function(weights, *rows), lambda: jnp.zeros(result.shape, result.dtype)
            )

        mapped = jax.shard_map(
            on_one_device,
            mesh=self._replicas.mesh,
            in_specs=(PartitionSpec(), _ROWS, _ROWS),
            out_specs=_ROWS,
            check_vma=False,
        )
        rows = NamedSharding(self._replicas.mesh, _ROWS)
        return jax.jit(mapped, in_shardings=(None, rows, rows), out_shardings=rows)

    def start(self, rows: tuple[np.ndarray, ...], num_used: int) -> jax.Array:
        """The result of a batch, on its way: np.asarray waits for it.

        The number of rows is a multiple of the number of devices. Only the first `num_used` count: a device all of
        whose rows come later does nothing and returns zeros.
        """
        share = len(rows[0]) // self._replicas.num_devices
        has_work = np.arange(self._replicas.num_devices) * share < num_used
        result: jax.Array = self._compiled(self._replicas.weights, has_work, rows)
        return result

    def in_turn(self, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
        """Results of batches in order; the next batch is made while the devices work on one."""
        running: jax.Array | None = None
        for rows, num_used in batches:
            started = self.start(rows, num_used)
            if running is not None:
                yield np.asarray(running)
            running = started
        if running is not None:
            yield np.asarray(running)
