"""Every way to compute attention equals the plain one, values and gradients, packed rows and GQA included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.models.attention import attention


@pytest.mark.parametrize("length, num_kv_heads", [(100, 4), (128, 2), (300, 4), (513, 1)])
def test_blocked_equals_reference(length, num_kv_heads):
    rng = np.random.default_rng(length)

    def array(heads):
        return jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32)

    q, k, v, probe = array(4), array(num_kv_heads), array(num_kv_heads), array(4)
    segments = np.sort(rng.integers(1, 5, (2, length)), axis=1).astype(np.int32)
    segments[:, length - 7 :] = 0
    results = {}
    for implementation in ("reference", "blocked"):

        def run(q, k, v, implementation=implementation):
            return attention(q, k, v, segments, implementation=implementation)

        out, pull = jax.vjp(run, q, k, v)
        results[implementation] = (out, *pull(probe))
    for want, have in zip(results["reference"], results["blocked"], strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5, rtol=1e-5)


def test_blocked_stays_finite_and_close_in_bfloat16():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 256, 2, 16)), jnp.bfloat16) for _ in range(3))
    segments = np.ones((1, 256), np.int32)
    want = attention(q, k, v, segments, implementation="reference").astype(jnp.float32)
    have = attention(q, k, v, segments, implementation="blocked").astype(jnp.float32)
    np.testing.assert_allclose(have, want, atol=3e-2)
