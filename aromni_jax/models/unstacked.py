"""The decoder for decoding: parameters and cache of every layer apart, instead of one stack of all layers.

A stack is what training scans over. Token by token it would be cut anew for every layer, which costs as much as reading
it: decoding waits for little else than reading weights.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
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
    config: ModelConfig, mesh: Mesh | None, make: Callable[[str, int | None, jax.ShapeDtypeStruct], Any]
) -> PyTree:
    """The tree of parameters for decoding, of what `make` returns for the path, the layer and what is wanted of it."""
    rest: dict[str, Any] = {}
    layers: list[dict[str, Any]] = [{} for _ in range(config.num_layers)]
    for path, whole in stacked_params(config, mesh).items():
        is_norm = path.endswith(("scale", "bias"))
        wanted = whole.update(dtype=whole.dtype if is_norm else jnp.dtype(config.dtype))
        if not path.startswith(_STACK):
            rest[path] = make(path, None, wanted)
            continue
        sharding = mesh and NamedSharding(mesh, PartitionSpec(*whole.sharding.spec[1:]))
        wanted = jax.ShapeDtypeStruct(whole.shape[1:], wanted.dtype, sharding=sharding)
        for number, own in enumerate(layers):
            own[path.removeprefix(_STACK)] = make(path, number, wanted)
    apart = tuple(traverse_util.unflatten_dict(own, sep="/") for own in layers)
    return traverse_util.unflatten_dict(rest, sep="/") | {"layers": apart}


def abstract_params(config: ModelConfig, *, mesh: Mesh | None = None) -> PyTree:
    """What `load` makes, as `jax.ShapeDtypeStruct`s: for compiling without weights. Errors as `stacked_params`."""
    return _assemble(config, mesh, lambda path, layer, wanted: wanted)


def load(config: ModelConfig, read: Read, *, mesh: Mesh | None = None) -> PyTree:
    """Parameters with a tuple of trees, one a layer, for `layers`, and all matrices in the compute type.

    One array at a time is read, once; with a mesh each device is given its own part of it and no more. Errors as
    `stacked_params`.
    """

    def make(path: str, layer: int | None, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        value = read(path, layer)
        if mesh is None:
            return jnp.asarray(value, wanted.dtype)
        if isinstance(value, jax.Array):
            return jax.device_put(value.astype(wanted.dtype), wanted.sharding)
        return jax.make_array_from_callback(
            wanted.shape, wanted.sharding, lambda part: np.asarray(value[part], wanted.dtype)
        )

    return _assemble(config, mesh, make)


def unstack(config: ModelConfig, params: PyTree, *, mesh: Mesh | None = None) -> PyTree:
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

    return load(config, read, mesh=mesh)


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
    filled = []
    for number, own in enumerate(params["layers"]):
        cache = caches[number] if caches else None
        (x_BLD, cache), _ = layer.apply({"params": own}, (x_BLD, cache), 0, turn, positions_BL, segment_ids_BL)
        if cache is not None:
            cache = cache.advance(positions_BL, segment_ids_BL)
            filled.append(jax.tree.map(lambda x, names: partitioning.constrain(x, *names), cache, _CACHE))
    hidden_BLD: Any = RMSNorm(config).apply({"params": params["final_norm"]}, x_BLD)
    return hidden_BLD, tuple(filled)
