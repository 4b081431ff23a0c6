"""Matrices in 8 bits for decoding: symmetric, one float32 scale for each output channel; activations stay as they are.

Decoding a few rows waits for weights to be read, and 8 bits are half of bfloat16. x w is (x values) * scale: the scale
belongs to an output channel, so the product needs it once, and no matrix is ever written out in full precision.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

SCALES = "scales"
"""The collection that holds the scale of each int8 parameter, under the parameter's name."""

INPUT_DIMS: dict[str, tuple[int, ...]] = {
    "layers/attention/q": (0,),
    "layers/attention/k": (0,),
    "layers/attention/v": (0,),
    "layers/attention/o": (0, 1),
    "layers/mlp/gate": (0,),
    "layers/mlp/up": (0,),
    "layers/mlp/down": (0,),
    "unembedding": (1,),
}
"""Path of each matrix that decoding reads whole -> the dimensions (of one layer) that its product sums over.

The embedding is not among them: a token reads one row of it.
"""

_LARGEST = 127
_NOTHING = 1e-30
"""Channels that are smaller than this throughout become zeros: their scale would not be a normal number."""


@functools.partial(jax.jit, static_argnames="input_dims")
def quantised(weight: jax.Array, input_dims: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """int8 values [shape of `weight`] and float32 scales [its other dimensions].

    A weight is off by at most half a scale, a 254th of the largest of its channel. NaN and infinity make their channel
    NaN. `[[1.0], [-0.5]]` with input_dims (0,) becomes `[[127], [-64]]` and `[1 / 127]`.
    """
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=input_dims, keepdims=True)
    scale = jnp.where(largest < _NOTHING, 1.0, largest / _LARGEST)
    values = jnp.clip(jnp.round(weight / scale), -_LARGEST, _LARGEST).astype(jnp.int8)
    return values, jnp.where(jnp.isfinite(scale), scale, jnp.nan).squeeze(input_dims)


def read_here(x: jax.Array, weight: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """x and the weight in `dtype`, ready for their product; a weight of 8 bits is converted for this one alone.

    Otherwise XLA converts it once, before the loop over tokens, and the loop reads the copy, which is larger than the
    model would have been. (On TPUs it does not; on CPUs, which write the converted matrix out anyway, once is faster.)
    """
    if weight.dtype == jnp.int8:
        x, weight = jax.lax.platform_dependent(
            x, weight, cpu=lambda *pair: pair, default=lambda *pair: jax.lax.optimization_barrier(pair)
        )
    return x, weight.astype(dtype)


def scaled(product: jax.Array, scale: jax.Array | None) -> jax.Array:
    """The product with int8 values, turned into that with the matrix they stand for; no scale leaves it as it is."""
    return product if scale is None else (product.astype(jnp.float32) * scale).astype(product.dtype)


def scaled_in(module: nn.Module, name: str, product: jax.Array) -> jax.Array:
    """`scaled` by what is stored for parameter `name` of a module; training stores nothing."""
    return scaled(product, module.get_variable(SCALES, name))
