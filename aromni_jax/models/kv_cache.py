"""Keys and values of what a decoder has read, for all layers, as one pytree of static shape.

Rows are left-aligned: the token at position p of a row lives in slot p, so a query at position p sees slots 0..p and no
separate mask is needed. Rows may have different lengths.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from aromni_jax.models.config import ModelConfig
from aromni_jax.models.rope import Rotation, rotate, rotation

MOVED_TOGETHER = (64, 8, 1)
"""Slots that `without` moves at a time: most in the first width that the cache has, what is left in the others."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """`keys` and `values` are [n, B, S, K, H] (n layers) in the compute type; `lengths_B`: tokens read per row."""

    keys: jax.Array
    values: jax.Array
    lengths_B: jax.Array

    @classmethod
    def create(cls, config: ModelConfig, num_rows: int, max_length: int, num_layers: int | None = None) -> KVCache:
        """An empty cache for `num_rows` rows of at most `max_length` tokens (S), of all layers or of `num_layers`."""
        shape = (
            config.num_layers if num_layers is None else num_layers,
            num_rows,
            max_length,
            config.num_kv_heads,
            config.head_dim,
        )
        dtype = jnp.dtype(config.dtype)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((num_rows,), jnp.int32))

    def put(self, rows_X: jax.Array, other: KVCache) -> KVCache:
        """The cache with the rows of `other`, a shorter or equally long one, in its rows `rows_X`.

        A row outside 0..B-1 is put nowhere. What a row held behind the new tokens stays, and is never read: the next
        tokens are written over it.
        """
        length = other.max_length
        return KVCache(
            self.keys.at[:, rows_X, :length].set(other.keys, mode="drop"),
            self.values.at[:, rows_X, :length].set(other.values, mode="drop"),
            self.lengths_B.at[rows_X].set(other.lengths_B, mode="drop"),
        )

    @property
    def max_length(self) -> int:
        return self.keys.shape[2]

    def write(
        self, layer: jax.Array, slots_BL: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array
    ) -> tuple[KVCache, jax.Array, jax.Array]:
        """Stores one layer's keys and values; returns the cache and the layer's [B, S, K, H] keys and values.

        A slot outside 0..S-1 (see `slots`) stores nothing.
        """
        rows_B1 = jnp.arange(slots_BL.shape[0])[:, None]
        keys = self.keys.at[layer, rows_B1, slots_BL].set(k_BLKH, mode="drop")
        values = self.values.at[layer, rows_B1, slots_BL].set(v_BLKH, mode="drop")
        return dataclasses.replace(self, keys=keys, values=values), keys[layer], values[layer]

    def slots(self, positions_BL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        """Where each token is stored: its position; padding (segment 0) goes to slot S, that is, nowhere."""
        return jnp.where(segment_ids_BL == 0, self.max_length, positions_BL)

    def advance(self, positions_BL: jax.Array, segment_ids_BL: jax.Array) -> KVCache:
        """Lengths after reading these tokens."""
        ends_BL = jnp.where(segment_ids_BL == 0, 0, positions_BL + 1)
        return dataclasses.replace(self, lengths_B=jnp.maximum(self.lengths_B, ends_BL.max(axis=1)))

    def without(self, row: int, start: jax.Array, count: jax.Array, theta: float) -> KVCache:
        """The cache after `count` tokens of one row, from slot `start` on, are gone and the rest has moved up.

            slots, start 1, count 2:  [s a b c d . .]  ->  [s c d . . . .]

        Keys are turned to their new positions (RoPE of base `theta`), which is what they would be had they been
        written there, to rounding. What kept tokens had read of those that are gone stays in their keys and values.
        """
        head_dim = self.keys.shape[-1]
        turn = rotation(jnp.broadcast_to(-count, (1, 1)), head_dim, theta)

        def move(x_nBSKH: jax.Array, slot: jax.Array, width: int, turn: Rotation | None = None) -> jax.Array:
            """Fills `width` slots from `slot` on; what it reads lies behind, so that it can be done in place."""
            layers, _, _, heads, _ = x_nBSKH.shape
            size = (layers, 1, width, heads, head_dim)
            x = jax.lax.dynamic_slice(x_nBSKH, (0, row, slot + count, 0, 0), size)
            return jax.lax.dynamic_update_slice(x_nBSKH, rotate(x, turn) if turn else x, (0, row, slot, 0, 0))

        keys, values, slot = self.keys, self.values, jnp.asarray(start)
        for width in (width for width in MOVED_TOGETHER if width <= self.max_length):
            num_moves = jnp.maximum(self.lengths_B[row] - count - slot, 0) // width

            def body(number: jax.Array, kv: tuple[jax.Array, jax.Array], slot=slot, width=width):
                to = slot + number * width
                return move(kv[0], to, width, turn), move(kv[1], to, width)

            keys, values = jax.lax.fori_loop(0, num_moves, body, (keys, values))
            slot = slot + num_moves * width
        return KVCache(keys, values, self.lengths_B.at[row].add(-count))
