"""Rows of the embedding table for the tokens of every device, when the table is split over the mesh.

The table is [V, D] with D over `fsdp` and V over `tensor`, and a device needs whole rows for its own tokens. So devices
of one fsdp group exchange ids, each looks up its part of D for the tokens of all, and these parts change hands; the
backward pass is the same the other way round. A part of D is narrow (16 of 4096 on 256 devices), and a TPU pads it to
128 in memory: left to the compiler, all tokens at once took 2 GiB. Here tokens go through in chunks.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from aromni_jax import partitioning

_CHUNK_ROWS = 1 << 17
"""Rows that a device looks up at once for its fsdp group: 64 MiB of float32 on a TPU, which pads rows to 128."""

_TILE = 1024
"""Numbers that a TPU keeps, and sends, together."""

_BATCH, _LENGTH, _EMBED, _VOCAB = (partitioning.RULES[name] for name in ("batch", "length", "embed", "vocab"))


def embedding_lookup(table_VD: jax.Array, tokens_BL: jax.Array, dtype: Any) -> jax.Array:
    """`table_VD[tokens_BL]` in `dtype`, [B, L, D] split over rows and length; gradients are summed in float32.

    Without a mesh that splits the table, or with rows or widths that it does not divide, the compiler decides how.
    """
    tokens_BL = jnp.asarray(tokens_BL)
    mesh = jax.sharding.get_abstract_mesh()
    splits = {
        "batch": tokens_BL.shape[0],
        "length": tokens_BL.shape[1],
        "embed": table_VD.shape[1],
        "vocab": table_VD.shape[0],
    }
    is_even = all(size % partitioning.num_shards(name) == 0 for name, size in splits.items())
    if mesh.empty or mesh.size == 1 or not is_even:
        return jnp.take(table_VD, tokens_BL, axis=0).astype(dtype)
    return _split_lookup(jnp.dtype(dtype), table_VD, tokens_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _split_lookup(dtype: Any, table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    return _forward(dtype, table_VD, tokens_BL)[0]


def _forward(dtype: Any, table_VD: jax.Array, tokens_BL: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    def on_device(table_vd: jax.Array, tokens_bl: jax.Array) -> jax.Array:
        table_vd = table_vd.astype(dtype)

        def look_up(_: None, ids_c: jax.Array) -> tuple[None, jax.Array]:
            rows_r, is_here_r = _local_rows(ids_c, table_vd.shape[0])
            found_rd = jnp.where(is_here_r[:, None], table_vd[rows_r], 0)
            # Every device of the tensor axis has a part of the rows; of each row, one has it and others add zero.
            found_rd = jax.lax.psum(found_rd, _VOCAB)
            found_gcd = found_rd.reshape(-1, ids_c.shape[0], found_rd.shape[-1])
            return None, jax.lax.all_to_all(found_gcd, _EMBED, split_axis=0, concat_axis=2, tiled=True)[0]

        _, x_ncD = jax.lax.scan(look_up, None, _chunks(tokens_bl))
        return x_ncD.reshape(*tokens_bl.shape, -1)

    hidden = partitioning.spec(("batch", "length", None))
    x_BLD = _on_mesh(on_device, out_specs=hidden, in_specs=(_TABLE, _TOKENS))(table_VD, tokens_BL)
    return x_BLD, (table_VD, tokens_BL)


def _backward(dtype: Any, saved: tuple[jax.Array, jax.Array], d_x_BLD: jax.Array) -> tuple[jax.Array, None]:
    table_VD, tokens_BL = saved

    def on_device(table_vd: jax.Array, tokens_bl: jax.Array, d_x_blD: jax.Array) -> jax.Array:
        ids_nc = _chunks(tokens_bl)
        d_x_ncD = d_x_blD.reshape(*ids_nc.shape, -1)

        def add(d_table_vd: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            ids_c, d_x_cD = chunk
            rows_r, is_here_r = _local_rows(ids_c, d_table_vd.shape[0])
            d_x_gcd = jax.lax.all_to_all(d_x_cD[None], _EMBED, split_axis=2, concat_axis=0, tiled=True)
            d_x_rd = d_x_gcd.reshape(rows_r.shape[0], -1).astype(jnp.float32)
            return d_table_vd.at[rows_r].add(jnp.where(is_here_r[:, None], d_x_rd, 0)), None

        d_table_vd, _ = jax.lax.scan(add, jnp.zeros(table_vd.shape, jnp.float32), (ids_nc, d_x_ncD))
        return _sum_over_others(d_table_vd).astype(table_vd.dtype)

    hidden = partitioning.spec(("batch", "length", None))
    d_table_VD = _on_mesh(on_device, out_specs=_TABLE, in_specs=(_TABLE, _TOKENS, hidden))(table_VD, tokens_BL, d_x_BLD)
    return d_table_VD, None


_split_lookup.defvjp(_forward, _backward)

_TABLE = partitioning.spec(("vocab", "embed"))
_TOKENS = partitioning.spec(("batch", "length"))


def _sum_over_others(d_table_vd: jax.Array) -> jax.Array:
    """The sum over the axes that split tokens and not D.

    It is taken of one long array, because TPUs would send narrow rows as they keep them, padded to 128. The zeros at
    its end are there so that the compiler does not find the rows in it and do just that; they leave it divisible.
    """
    mesh = jax.sharding.get_abstract_mesh()
    others = tuple(axis for axis in (*_BATCH, *_LENGTH) if axis not in _EMBED and mesh.shape[axis] > 1)
    if not others:
        return d_table_vd
    num_zeros = _TILE * math.prod(mesh.shape[axis] for axis in others)
    d_table = jax.lax.psum(jnp.pad(d_table_vd.ravel(), (0, num_zeros)), others)
    return d_table[: d_table_vd.size].reshape(d_table_vd.shape)


def _on_mesh(function: Any, **specs: Any) -> Any:
    return jax.shard_map(function, mesh=jax.sharding.get_abstract_mesh(), check_vma=False, **specs)


def _chunks(tokens_bl: jax.Array) -> jax.Array:
    """[chunks, tokens of a chunk]: the fewest equal chunks of this device's tokens that keep to `_CHUNK_ROWS`."""
    num_tokens, ways = tokens_bl.size, partitioning.num_shards("embed")
    num_chunks = next(
        n for n in range(1, num_tokens + 1) if num_tokens % n == 0 and num_tokens // n * ways <= _CHUNK_ROWS
    )
    return tokens_bl.reshape(num_chunks, -1)


def _local_rows(ids_c: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Ids of the whole fsdp group as rows of this device's part of the table, and whether it has them: [g * c] each."""
    ids_r = jax.lax.all_gather(ids_c, _EMBED, tiled=True) - jax.lax.axis_index(_VOCAB) * num_rows
    is_here_r = (ids_r >= 0) & (ids_r < num_rows)
    return jnp.where(is_here_r, ids_r, 0), is_here_r
