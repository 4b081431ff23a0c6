"""The shorter convolution is the convolution: against float64, with its gradient, and only where it is meant to be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.tokenizers.nets import winograd

SETTINGS = {
    "lhs_dilation": (1, 1),
    "rhs_dilation": (1, 1),
    "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    "feature_group_count": 1,
    "precision": None,
}
AROUND = ((1, 1), (1, 1))


def picture_and_kernel(height: int, width: int, channels: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x_BHWC = rng.normal(size=(2, height, width, channels)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, channels, features)) / (9 * channels) ** 0.5
    return x_BHWC, kernel.astype(np.float32)


def in_float64(x_BHWC: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    _, height, width, _ = x_BHWC.shape
    padded = np.pad(x_BHWC.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))


@pytest.mark.parametrize("shape", [(2, 2, 3, 5), (8, 4, 16, 7), (32, 16, 128, 64)])
def test_it_equals_the_convolution(shape):
    x_BHWC, kernel = picture_and_kernel(*shape)
    np.testing.assert_allclose(winograd.convolve(x_BHWC, kernel), in_float64(x_BHWC, kernel), atol=3e-6, rtol=0)


def test_gradients_are_those_of_the_convolution():
    x_BHWC, kernel = picture_and_kernel(64, 64, 128, 128)

    def loss(convolution):
        return lambda x, k: jnp.mean(jnp.square(convolution(x, k, (1, 1), AROUND, **SETTINGS)))

    ours = jax.jit(jax.grad(loss(winograd.conv_general_dilated), (0, 1)))(x_BHWC, kernel)
    plain = jax.jit(jax.grad(loss(jax.lax.conv_general_dilated), (0, 1)))(x_BHWC, kernel)
    for found, expected in zip(ours, plain):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-4)


@pytest.mark.parametrize(
    ("height", "channels", "stride", "padding", "platform", "shorter"),
    [
        (64, 128, 1, AROUND, "cpu", True),
        (64, 128, 1, AROUND, "tpu", False),
        (64, 128, 1, AROUND, "cuda", False),
        (64, 64, 1, AROUND, "cpu", False),
        (32, 128, 1, AROUND, "cpu", False),
        (65, 128, 1, AROUND, "cpu", False),
        (64, 128, 2, AROUND, "cpu", False),
        (64, 128, 1, ((0, 1), (0, 1)), "cpu", False),
    ],
)
def test_where_it_is_used(height, channels, stride, padding, platform, shorter):
    x_BHWC, kernel = picture_and_kernel(height, 66, channels, 128)
    convolution = jax.jit(lambda x, k: winograd.conv_general_dilated(x, k, (stride, stride), padding, **SETTINGS))
    text = convolution.trace(x_BHWC, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in text) != shorter
    assert text.count("stablehlo.dot_general") == (16 if shorter else 0)
