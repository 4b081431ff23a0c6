"""Where every array lives: the mesh, one rule table from logical to mesh axes, and the rows each process loads.

Modules name the axes of a parameter once, where they declare it (`logical`). Everything else about placement is read
from these names and `RULES`: parameters, optimizer moments, averages, activations and batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from aromni_jax.arrays import PyTree
from aromni_jax.config import MeshConfig

MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layer": (),
    "head_dim": (),
    "norm": (),
    "code": (),
}
"""Logical axis -> the mesh axes it is split over; none of them: a whole copy everywhere."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, context, tensor) over `devices` (default: all of the run).

    With `num_slices > 1` the data axis runs over slices first (DCN), every other axis inside a slice (ICI).

    Raises:
      ValueError: more than one -1, a size below 1, sizes whose product is not the number of devices, slices that do not
        divide the data axis or are not those that the devices have.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_sizes(config, len(devices))
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    found = len({getattr(device, "slice_index", 0) for device in devices})
    # To jax every node of GPUs is a slice, and one plain mesh goes over all of them.
    if found != config.num_slices and (config.num_slices != 1 or devices[0].platform == "tpu"):
        # As much inside a slice as asked for.
        data = -1 if config.data == -1 else config.data // math.gcd(config.data, config.num_slices) * found
        raise ValueError(
            f"mesh.num_slices = {config.num_slices}, but the devices form {found} slice(s); "
            f"set mesh.num_slices={found} and mesh.data={data}"
        )
    if shape[0] % config.num_slices:
        raise ValueError(
            f"mesh.data = {shape[0]} is not a multiple of mesh.num_slices = {config.num_slices}; "
            f"set mesh.data={math.lcm(shape[0], config.num_slices)}, for example"
        )
    # A mesh axis may be half of a physical one: tensor = 4 on a cube of 8 x 8 x 8 chips, which JAX otherwise refuses.
    if config.num_slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(array, MESH_AXES, axis_types=axis_types)
    inside = (shape[0] // config.num_slices, *shape[1:])
    array = mesh_utils.create_hybrid_device_mesh(
        inside, (config.num_slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(array, MESH_AXES, axis_types=axis_types)


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of `MESH_AXES` on that many devices; ValueError as in `make_mesh`."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    shown = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh ({shown}): sizes are at least 1, and one of them may be -1 (all remaining devices)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"mesh ({shown}) {'needs a multiple of' if free else 'asks for'} {fixed} devices, "
            f"this run has {num_devices}; set one axis to -1 to use whatever there is"
        )
    return tuple(sizes.values())


def logical(init: Callable[..., Any], *names: str) -> Callable[..., Any]:
    """Attaches logical axis names (keys of `RULES`) to a parameter's initializer."""
    return nn.with_logical_partitioning(init, names)


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of these logical axes; ValueError for an unknown name or a mesh axis used twice."""
    parts: list[Any] = []
    taken: dict[str, str] = {}
    for name in names:
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(RULES)}")
        axes = RULES[name] if name is not None else ()
        for axis in axes:
            if axis in taken:
                raise ValueError(f"mesh axis {axis!r} is wanted by both {taken[axis]!r} and {name!r} of one array")
            taken[axis] = str(name)
        parts.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*parts)


def unbox(tree: PyTree) -> PyTree:
    """Drops the logical names that Linen's initializers put around parameters."""
    return jax.tree.map(lambda x: x.value if _is_boxed(x) else x, tree, is_leaf=_is_boxed)


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, meta.AxisMetadata)


def fitting(shape: Sequence[int], names: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`spec(names)`, but a dimension that its mesh axes do not divide stays whole."""
    placed = spec(names)
    return PartitionSpec(*(axes if dim % _num_shards(mesh, axes) == 0 else None for dim, axes in zip(shape, placed)))


def shardings(boxed_tree: PyTree, mesh: Mesh, may_stay_whole: Container[str] = ()) -> PyTree:
    """A NamedSharding for every leaf of an abstract tree whose parameters are still boxed with logical names.

    Optimizer moments keep the boxes of their parameters, empty ones where another optimizer moves the parameter. A leaf
    without a box (a counter), or whose rank is not that of its names (a factored moment), is copied everywhere. The
    result has the structure of `unbox(boxed_tree)`. Logical axes in `may_stay_whole` are, where the mesh does not
    divide them.

    Raises:
      ValueError: a dimension that its mesh axes do not divide, named with its path.
    """

    def place(path: Any, leaf: Any) -> Any:
        if _is_boxed(leaf) and not jax.tree.leaves(leaf.value):
            return leaf.value
        if not _is_boxed(leaf) or len(leaf.names) != leaf.value.ndim:
            return NamedSharding(mesh, PartitionSpec())
        placed = spec(leaf.names)
        for dim, name, axes in zip(leaf.value.shape, leaf.names, placed):
            ways = _num_shards(mesh, axes)
            if dim % ways and name not in may_stay_whole:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)}: dimension {name!r} of size {dim} cannot be split {ways} ways "
                    f"over mesh axis {axes!r}; choose a mesh whose {axes!r} size divides {dim}, for example "
                    f"mesh.{axes}={math.gcd(dim, ways)} and mesh.data=-1"
                )
        return NamedSharding(mesh, fitting(leaf.value.shape, leaf.names, mesh))

    return jax.tree_util.tree_map_with_path(place, boxed_tree, is_leaf=_is_boxed)


def _num_shards(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


def check_large_arrays_are_sharded(
    tree: PyTree, tree_shardings: PyTree, mesh: Mesh, limit_bytes: int = 1 << 26
) -> None:
    """Raises ValueError naming each array above `limit_bytes` that a mesh with parameter axes leaves whole."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    whole = [
        f"{jax.tree_util.keystr(path)} {leaf.shape} ({leaf.size * leaf.dtype.itemsize >> 20} MiB)"
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(tree_shardings), strict=True)
        if leaf.size * leaf.dtype.itemsize > limit_bytes and sharding.is_fully_replicated
    ]
    if whole:
        raise ValueError(
            f"not sharded over mesh {dict(mesh.shape)}: {'; '.join(whole)}. Give these arrays logical axes"
        )


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the compiler to place `x` by its logical axes on the mesh in context; without a mesh it does nothing.

    A dimension that the mesh does not divide stays whole: a batch of one row, or KV heads fewer than devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(x.shape, names, mesh))


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function`, traced with `mesh` in context so that `constrain` inside it takes effect."""

    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def num_shards(name: str) -> int:
    """Into how many parts the mesh in context splits a logical axis (1 without a mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES[name])


def device_kind() -> str:
    """Kind of the devices of the mesh in context, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"; "" without one.

    Known while a program is traced, also for devices that are not here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else ""


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Placement of every [B, L] array of a `PackedBatch`."""
    return NamedSharding(mesh, spec(("batch", "length")))


def local_rows(mesh: Mesh, global_batch_size: int) -> np.ndarray:
    """Ascending indices of the rows of the global batch that this process must load.

    Raises:
      ValueError: the batch does not divide over the data and fsdp axes.
    """
    ways = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    if global_batch_size % ways:
        raise ValueError(
            f"global_batch_size = {global_batch_size} rows do not divide over data x fsdp = {ways}; "
            f"use a multiple of {ways}, for example --config.global_batch_size={-(-global_batch_size // ways) * ways}"
        )
    index_map = NamedSharding(mesh, spec(("batch",))).addressable_devices_indices_map((global_batch_size,))
    rows = np.arange(global_batch_size)
    return np.unique(np.concatenate([rows[index] for index in index_map.values()]))


def put_batch(local_batch: PyTree, mesh: Mesh) -> PyTree:
    """Global arrays from the rows this process loaded (`local_rows`, in that order); each leaf is [local rows, L]."""
    placement = batch_sharding(mesh)
    ways = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    local_ways = len(local_rows(mesh, ways))

    def put(local_BL: np.ndarray) -> jax.Array:
        shape = (local_BL.shape[0] * ways // local_ways, *local_BL.shape[1:])
        return jax.make_array_from_process_local_data(placement, local_BL, shape)

    return jax.tree.map(put, local_batch)
