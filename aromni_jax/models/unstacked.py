"""The decoder for decoding: parameters and cache of every layer apart, instead of one stack of all layers.

A stack is what training scans over. Token by token it would be cut anew for every layer, which costs as much as reading
it: decoding waits for little else than reading weights.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from aromni_jax.arrays import IntArray, PyTree
from aromni_jax.models.config import ModelConfig
from aromni_jax.models.kv_cache import KVCache
from aromni_jax.models.layers import DecoderLayer, RMSNorm
from aromni_jax.models.rope import rotation

Caches = tuple[KVCache, ...]
"""A cache of one layer for each layer."""


def unstack(config: ModelConfig, params: PyTree) -> PyTree:
    """`params` with a tuple of trees, one a layer, for `layers`, and all matrices in the compute type.

    A stack of jax arrays is freed as soon as its layers are copied, so that a model never lies in memory twice.
    """
    dtype = jnp.dtype(config.dtype)

    def cast(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        is_norm = str(path[-1].key) in ("scale", "bias")
        return jnp.asarray(leaf) if is_norm else jnp.asarray(leaf, dtype)

    stacks, structure = jax.tree_util.tree_flatten_with_path(params["layers"])
    layers: list[list[jax.Array]] = [[] for _ in range(config.num_layers)]
    for path, stack in stacks:
        for number, own in enumerate(layers):
            own.append(cast(path, stack[number]))
        if isinstance(stack, jax.Array):
            jax.block_until_ready([own[-1] for own in layers])
            stack.delete()
    rest = {name: tree for name, tree in params.items() if name != "layers"}
    return jax.tree_util.tree_map_with_path(cast, rest) | {
        "layers": tuple(jax.tree.unflatten(structure, own) for own in layers)
    }


def make_caches(config: ModelConfig, num_rows: int, max_length: int) -> Caches:
    """Empty caches for `num_rows` rows of at most `max_length` tokens."""
    return tuple(KVCache.create(config, num_rows, max_length, num_layers=1) for _ in range(config.num_layers))


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
    x_BLD = jnp.take(params["embedding"], tokens_BL, axis=0).astype(jnp.dtype(config.dtype))
    turn = rotation(positions_BL, config.head_dim, config.rope_theta)
    layer = DecoderLayer(config)
    filled = []
    for number, own in enumerate(params["layers"]):
        cache = caches[number] if caches else None
        (x_BLD, cache), _ = layer.apply({"params": own}, (x_BLD, cache), 0, turn, positions_BL, segment_ids_BL)
        if cache is not None:
            filled.append(cache.advance(positions_BL, segment_ids_BL))
    hidden_BLD: Any = RMSNorm(config).apply({"params": params["final_norm"]}, x_BLD)
    return hidden_BLD, tuple(filled)
