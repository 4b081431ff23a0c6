"""A tree of arrays as {name: array}, one checksum for each, and how processes agree on what they found.

An array has the name of its path (`params/layers/attention/q`), whatever Python containers hold it, so that optimizer
classes may move without touching old checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from aromni_jax.arrays import PyTree


def key_name(entry: Any) -> str:
    """What one entry of a path of `jax.tree_util` is called."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise TypeError(f"no name for tree entry {entry!r}")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """{"params/layers/attention/q": leaf, ...} in tree order; `None` has no leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {"/".join(map(key_name, path)): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves of the state have one name"
    return named


def nested(named: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": 1} -> {"a": {"b": 1}}: the tree that Orbax stores."""
    return dict(traverse_util.unflatten_dict(named, sep="/"))


def _checksum(array: jax.Array) -> jax.Array:
    """Sum over the bits of every element times an odd number that depends on its place, modulo 2**32.

    Integer addition has no order: the same on every mesh. An odd factor keeps any single flipped bit visible.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        place = place * jnp.uint32(2654435761) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    terms = bits * (2 * place + 1)
    if terms.ndim > 1:
        # XLA's CPU backend sums a whole array in one thread, and in twice the time; the barrier keeps it from doing so.
        terms = jax.lax.optimization_barrier(jnp.sum(terms, axis=-1, dtype=jnp.uint32))
    return jnp.sum(terms, dtype=jnp.uint32)


@jax.jit
def array_checksums(arrays: list[jax.Array]) -> jax.Array:
    """One uint32 per array [number of arrays], on the devices."""
    return jnp.stack([_checksum(on_device(array)) for array in arrays])


def array_checksums_in_turn(arrays: list[jax.Array]) -> np.ndarray:
    """The same numbers, one array after the other: for arrays that would not fit into memory together."""
    return np.array([int(array_checksums([array])[0]) for array in arrays], np.uint32)


def on_device(array: jax.Array) -> jax.Array:
    """Inside jit: `array` on the device, also where it lives in the memory of the host (`optimizer.offload`)."""
    return jax.device_put(array, jax.memory.Space.Device)


def checksums(named: dict[str, Any]) -> dict[str, int]:
    """One uint32 per array, equal for equal contents on any mesh, in any process."""
    values = np.asarray(array_checksums(list(named.values())))
    return {name: int(value) for name, value in zip(named, values)}


def any_process(flag: bool) -> bool:
    """True where `flag` is true on any process: all of them take the same way."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def of_first_process(numbers: Sequence[int]) -> list[int]:
    """The whole numbers that process 0 gives, on every process: folders of a network need not look the same to all."""
    if jax.process_count() == 1:
        return list(numbers)
    first = np.zeros(int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers)))), np.int32)
    if jax.process_index() == 0:
        first[:] = numbers
    return np.asarray(multihost_utils.broadcast_one_to_all(first)).tolist() if len(first) else []
