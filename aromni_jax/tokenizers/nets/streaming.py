"""What layers of causal nets remember between the chunks of a stream, in a variable collection of Flax.

A net applied with `mutable=[STREAM]` works on the next chunk of each row: without the collection on the first one,
with it on a later one. Applied as usual, it works on whole rows and remembers nothing.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from aromni_jax.arrays import FloatArray

STREAM = "stream"
"""The collection's name."""


def is_streaming(module: nn.Module) -> bool:
    """Whether this call works on a chunk."""
    return module.is_mutable_collection(STREAM) and not module.is_initializing()


def is_continuing(module: nn.Module, name: str) -> bool:
    """Whether this call works on a chunk after the first one, so that `name` is remembered."""
    return is_streaming(module) and module.has_variable(STREAM, name)


def remember(module: nn.Module, name: str, value: FloatArray) -> None:
    """Keeps `value` for the next chunk, where this call works on a chunk at all."""
    if is_streaming(module):
        module.put_variable(STREAM, name, value)


def recall(module: nn.Module, name: str, otherwise: FloatArray) -> FloatArray:
    """What was remembered as `name`, or `otherwise` on a first chunk and on whole rows."""
    return module.get_variable(STREAM, name) if is_continuing(module, name) else otherwise


def after_past(module: nn.Module, x: FloatArray, num_steps: int) -> FloatArray:
    """`x` [B, T, ...] behind the `num_steps` steps before it, zeros at the start; remembers its own last ones."""
    start = jnp.zeros((x.shape[0], num_steps, *x.shape[2:]), x.dtype)
    joined = jnp.concatenate([recall(module, "past", start), x], axis=1)
    remember(module, "past", joined[:, x.shape[1] :])
    return joined
