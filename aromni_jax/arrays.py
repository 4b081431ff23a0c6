"""Array types and the one legend of dimension letters.

Suffixes of names, einsum subscripts and shapes all use these letters:

    B rows              L query positions    S key positions      D model width
    N query heads       K key-value heads    G = N / K            H head width
    F MLP width         V joint vocabulary   C codebook entries   E code width
    P image codes       U speech codes       T waveform samples   HWC picture height, width, channels

`K` also counts speech codebooks in `codes_KU`. Masks are bool, weights float, ids and codes integer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np
from beartype import beartype
from jaxtyping import jaxtyped

if TYPE_CHECKING:
    Array = Any  # numpy and jax arrays stand in for each other at every border; shapes are checked at run time
else:
    Array = jax.Array | np.ndarray
IntArray = Array
FloatArray = Array
BoolArray = Array
PyTree = Any

F = TypeVar("F", bound=Callable[..., Any])


def shape_checked(function: F) -> F:
    """Checks jaxtyping annotations of `function` at call (that is, trace) time; free once a step is compiled."""
    return jaxtyped(typechecker=beartype)(function)
