"""The decoder for decoding: parameters and cache of every layer apart, instead of one stack of all layers.

A stack is what training scans over. Token by token it would be cut anew for every layer, which costs as much as reading
it: decoding waits for little else than reading weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aromni_jax import partitioning
from aromni_jax.arrays import IntArray, PyTree
from aromni_jax.models.config import ModelConfig
from aromni_jax.models.decoder import Decoder
from aromni_jax.models.embedding_lookup import embedding_lookup
from aromni_jax.models.int8 import INPUT_DIMS, SCALES, quantised
from aromni_jax.models.kv_cache import KVCache
from aromni_jax.models.layers import DecoderLayer, RMSNorm
from aromni_jax.models.rope import rotation

Caches = tuple[KVCache, ...]
"""A cache of one layer for each layer."""

Read = Callable[[str, int | None], Any]
"""Gives the parameter of a path ("layers/attention/q"): all of it, or one layer of a stack; of numpy or of jax."""

_STACK = "layers/"
_CACHE = KVCache(*2 * [("layer", "batch", "length", "kv_heads", "head_dim")], lengths_B=("batch",))  # type: ignore[arg-type]
_MAY_STAY_WHOLE = ("kv_heads",)
"""More devices than KV heads share the heads of queries; each then has all keys and values, the weights of both too."""


def stacked_params(config: ModelConfig, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape of each parameter as training and files have it; with a mesh, by the rules, where it lives.

    Raises:
      ValueError: a dimension that the mesh does not divide, KV heads excepted.
    """
    decoder, ids = Decoder(dataclasses.replace(config, remat="none")), np.zeros((1, 2), np.int32)
    boxed = jax.eval_shape(lambda: decoder.init(jax.random.key(0), ids, ids, ids)["params"])
    found = traverse_util.flatten_dict(partitioning.unbox(boxed), sep="/")
    if mesh is None:
        return found
    placement = partitioning.shardings(boxed, mesh, _MAY_STAY_WHOLE)
    return {
        path: found[path].update(sharding=sharding)
        for path, sharding in traverse_util.flatten_dict(placement, sep="/").items()
    }


def _assemble(
    config: ModelConfig,
    mesh: Mesh | None,
    is_int8: bool,
    make: Callable[[str, int | None, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct | None], tuple[Any, Any]],
) -> PyTree:
    """The tree of parameters for decoding, of what `make` returns: an array and its scale.

    `make` is given the path, the layer, what is wanted of the array, and of its scale if it is to have one.
    """
    # One flat tree for what is not in layers, one for each layer; and the same of scales.
    rest: dict[str, Any] = {}
    rest_scales: dict[str, Any] = {}
    layers: list[dict[str, Any]] = [{} for _ in range(config.num_layers)]
    layer_scales: list[dict[str, Any]] = [{} for _ in range(config.num_layers)]

    def describe(whole: jax.ShapeDtypeStruct, dims: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        sharding = mesh and NamedSharding(mesh, PartitionSpec(*(whole.sharding.spec[dim] for dim in dims)))
        return jax.ShapeDtypeStruct(tuple(whole.shape[dim] for dim in dims), dtype, sharding=sharding)

    for path, whole in stacked_params(config, mesh).items():
        is_stack = path.startswith(_STACK)
        dims = range(is_stack, whole.ndim)
        dtype, scale = jnp.dtype(config.dtype), None
        if path.endswith(("scale", "bias")):
            dtype = whole.dtype
        elif is_int8 and path in INPUT_DIMS:
            outputs = [dim for dim in dims if dim - is_stack not in INPUT_DIMS[path]]
            dtype, scale = jnp.dtype(jnp.int8), describe(whole, outputs, jnp.float32)
        wanted, name = describe(whole, dims, dtype), path.removeprefix(_STACK)
        for number, (own, own_scales) in enumerate(
            zip(layers, layer_scales, strict=True) if is_stack else [(rest, rest_scales)]
        ):
            own[name], found = make(path, number if is_stack else None, wanted, scale)
            if scale is not None:
                own_scales[name] = found

    def nested(rest: dict[str, Any], layers: list[dict[str, Any]]) -> PyTree:
        apart = tuple(traverse_util.unflatten_dict(own, sep="/") for own in layers)
        return traverse_util.unflatten_dict(rest, sep="/") | {"layers": apart}

    return nested(rest, layers) | ({SCALES: nested(rest_scales, layer_scales)} if is_int8 else {})


def abstract_params(config: ModelConfig, *, mesh: Mesh | None = None, is_int8: bool = False) -> PyTree:
    """What `load` makes, as `jax.ShapeDtypeStruct`s: for compiling without weights. Errors as `stacked_params`."""
    return _assemble(config, mesh, is_int8, lambda path, layer, wanted, scale: (wanted, scale))


def load(config: ModelConfig, read: Read, *, mesh: Mesh | None = None, is_int8: bool = False) -> PyTree:
    """Parameters with a tuple of trees, one a layer, for `layers`, and all matrices in the compute type.

    One array at a time is read, once; with a mesh each device is given its own part of it and no more. With `is_int8`
    the matrices of `int8.INPUT_DIMS` have 8 bits, and "scales" holds a tree of their scales. Errors as
    `stacked_params`.
    """

    def place(value: Any, wanted: jax.ShapeDtypeStruct, dtype: Any) -> jax.Array:
        if mesh is None:
            return jnp.asarray(value, dtype)
        if isinstance(value, jax.Array):
            return jax.device_put(value.astype(dtype), wanted.sharding)
        return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda part: np.asarray(value[part], dtype))

    def make(
        path: str, layer: int | None, wanted: jax.ShapeDtypeStruct, scale: jax.ShapeDtypeStruct | None
    ) -> tuple[jax.Array, jax.Array | None]:
        value = read(path, layer)
        if scale is None:
            return place(value, wanted, wanted.dtype), None
        # Rounded once, from what is stored, where it will live.
        values, found = quantised(place(value, wanted, value.dtype), INPUT_DIMS[path])
        return (values, found) if mesh is None else jax.device_put((values, found), (wanted.sharding, scale.sharding))

    return _assemble(config, mesh, is_int8, make)


def unstack(config: ModelConfig, params: PyTree, *, mesh: Mesh | None = None, is_int8: bool = False) -> PyTree:
    """`load` from a tree as training has it.

    A stack of jax arrays is freed as soon as its layers are copied, so that a model never lies in memory twice.
    """
    leaves = traverse_util.flatten_dict(params, sep="/")

    def read(path: str, layer: int | None) -> Any:
        leaf = leaves[path]
        if layer is None:
            return leaf
        own = leaf[layer]
        if layer == config.num_layers - 1 and isinstance(leaf, jax.Array):
            jax.block_until_ready(own)
            leaf.delete()
        return own

    return load(config, read, mesh=mesh, is_int8=is_int8)


def make_caches(config: ModelConfig, num_rows: int, max_length: int, mesh: Mesh | None = None) -> Caches:
    """Empty caches for `num_rows` rows of at most `max_length` tokens; with a mesh each device makes its own part."""
    return _maker(config, num_rows, max_length, mesh)()


@functools.lru_cache(maxsize=64)
def _maker(config: ModelConfig, num_rows: int, max_length: int, mesh: Mesh | None) -> Callable[[], Caches]:
    def make() -> Caches:
        return tuple(KVCache.create(config, num_rows, max_length, num_layers=1) for _ in range(config.num_layers))

    if mesh is None:
        return make
    placement = jax.tree.map(
        lambda x, names: NamedSharding(mesh, partitioning.fitting(x.shape, names, mesh)),
        jax.eval_shape(make)[0],
        _CACHE,
    )
    return jax.jit(make, out_shardings=(placement,) * config.num_layers)


def forward(
    config: ModelConfig,
    params: PyTree,
    tokens_BL: IntArray,
    positions_BL: IntArray,
    segment_ids_BL: IntArray,
    caches: Caches = (),
) -> tuple[jax.Array, Caches]:
    """`Decoder.__call__` over unstacked parameters: hidden states [B, L, D], and the caches it was given, filled.

    Without caches rows are packed, as in training.
    """
    x_BLD = embedding_lookup(params["embedding"], tokens_BL, config.dtype)
    x_BLD = partitioning.constrain(x_BLD, "batch", "length", None)
    turn = rotation(positions_BL, config.head_dim, config.rope_theta)
    layer = DecoderLayer(config)
    scales = params[SCALES]["layers"] if SCALES in params else ({},) * config.num_layers
    filled = []
    for number, own in enumerate(params["layers"]):
        cache = caches[number] if caches else None
        (x_BLD, cache), _ = layer.apply(
            {"params": own, SCALES: scales[number]}, (x_BLD, cache), 0, turn, positions_BL, segment_ids_BL
        )
        if cache is not None:
            cache = cache.advance(positions_BL, segment_ids_BL)
            filled.append(jax.tree.map(lambda x, names: partitioning.constrain(x, *names), cache, _CACHE))
    hidden_BLD: Any = RMSNorm(config).apply({"params": params["final_norm"]}, x_BLD)
    return hidden_BLD, tuple(filled)


def output_head(params: PyTree) -> tuple[jax.Array, jax.Array | None]:
    """The table [V, D] of the output head and, where it has 8 bits, the scale [V] of its logits."""
    return params["unembedding"], params[SCALES]["unembedding"] if SCALES in params else None


def whole_head(params: PyTree) -> jax.Array:
    """The table [V, D] of the output head, in float32 where it has 8 bits: for losses, which know no scales."""
    table_VD, scale_V = output_head(params)
    return table_VD if scale_V is None else table_VD * scale_V[:, None]
