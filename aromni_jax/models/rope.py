"""Rotary position embedding in the half-split form: dimension h turns with dimension h + H / 2."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, float32 [B, L, 1, H / 2], ready to broadcast over heads."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions_BL: jax.Array, head_dim: int, theta: float) -> Rotation:
    """Angles position * theta^(-2 h / H) for h < H / 2, in float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x_BLNH: jax.Array, turn: Rotation) -> jax.Array:
    """Turns each pair (x[h], x[h + H / 2]) by its angle, in float32, and returns the type of `x_BLNH`.

    `[a b c d]` (H = 4) becomes `[a cos0 - c sin0, b cos1 - d sin1, c cos0 + a sin0, d cos1 + b sin1]`.
    """
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * turn.cos - second * turn.sin, second * turn.cos + first * turn.sin], axis=-1)
    return turned.astype(x_BLNH.dtype)
