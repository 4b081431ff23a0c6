"""3x3 convolutions of wide feature maps with 4 multiplications where there were 9: what a CPU core spends its time on.

A pair of results (y0, y1) of three taps (g0, g1, g2) on (a, b, c, d) is `gather(spread_inputs * spread_kernel)`, with
4 products instead of 6; over rows and columns 16 instead of 36. The inputs' halves are exact and sums are shorter than
those of the convolution: float32 results are as near to float64 as those of `lax.conv_general_dilated`, or nearer.

Source: Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks", F(2x2, 3x3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aromni_jax.arrays import FloatArray

_SMALLEST_WIDTH = 128
_SMALLEST_PLACES = 64 * 64
"""Below either, a convolution of one picture is no slower. Batch size has no say: a row's result is its own."""


def conv_general_dilated(
    x_BHWC: FloatArray, kernel: FloatArray, strides: Sequence[int], padding: Any, **settings: Any
) -> FloatArray:
    """`lax.conv_general_dilated` for `nn.Conv`; wide 3x3 convolutions padded by 1 go the shorter way on CPUs.

    Other devices have units for convolutions, and keep them.
    """

    def direct(x_BHWC: FloatArray, kernel: FloatArray) -> FloatArray:
        return jax.lax.conv_general_dilated(x_BHWC, kernel, strides, padding, **settings)

    _, height, width, _ = x_BHWC.shape
    same_size = kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1) and list(padding) == [(1, 1), (1, 1)]
    wide = min(kernel.shape[2:]) >= _SMALLEST_WIDTH and height * width >= _SMALLEST_PLACES
    if not (same_size and wide and height % 2 == width % 2 == 0):
        return direct(x_BHWC, kernel)
    result: FloatArray = jax.lax.platform_dependent(x_BHWC, kernel, cpu=convolve, default=direct)
    return result


def convolve(x_BHWC: FloatArray, kernel: FloatArray) -> FloatArray:
    """[B, H, W, C] and [3, 3, C, F] to [B, H, W, F], zeros around the picture; H and W are even."""
    batch, height, width, channels = x_BHWC.shape
    rows, columns = height // 2, width // 2
    padded = jnp.pad(x_BHWC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    pairs = padded.reshape(batch, rows + 1, 2, columns + 1, 2, channels)

    def place(i: int, j: int) -> FloatArray:
        """Row i and column j of every tile of 4x4 places, whose inner 2x2 places are results: [B, H/2, W/2, C]."""
        return pairs[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2]

    by_row = zip(*(_spread_inputs(*(place(i, j) for i in range(4))) for j in range(4)))
    inputs = [_spread_inputs(*row) for row in by_row]
    kernels = [_spread_kernel(*row) for row in _spread_kernel(*kernel)]
    products = [[tile @ matrix for tile, matrix in zip(*pair)] for pair in zip(inputs, kernels)]
    by_column = zip(*(_gather(*column) for column in zip(*products)))
    results = [jnp.stack(_gather(*row), axis=3) for row in by_column]
    return jnp.stack(results, axis=2).reshape(batch, height, width, -1)


def _spread_inputs(a: FloatArray, b: FloatArray, c: FloatArray, d: FloatArray) -> tuple[FloatArray, ...]:
    return a - c, b + c, c - b, b - d


def _spread_kernel(a: FloatArray, b: FloatArray, c: FloatArray) -> tuple[FloatArray, ...]:
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def _gather(a: FloatArray, b: FloatArray, c: FloatArray, d: FloatArray) -> tuple[FloatArray, ...]:
    return a + b + c, b - c - d
