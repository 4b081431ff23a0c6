"""Hand-written gradients of the layers equal those that JAX derives from the plain formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.models import layers


@pytest.mark.parametrize(
    "ours, plain, shapes",
    [
        (layers._linear, lambda x, w: x @ w, [(2, 5, 3), (3, 7)]),
        (layers._gated, lambda g, u: g / (1 + jnp.exp(-g)) * u, [(2, 5, 3), (2, 5, 3)]),
    ],
)
def test_gradients(ours, plain, shapes):
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    want, pull_want = jax.vjp(plain, *inputs)
    have, pull_have = jax.vjp(ours, *inputs)
    probe = jnp.asarray(rng.normal(size=want.shape), jnp.float32)
    for left, right in zip((have, *pull_have(probe)), (want, *pull_want(probe)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
