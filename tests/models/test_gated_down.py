"""The second half of SwiGLU, whose gradients are written over its inputs, against automatic differentiation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from aromni_jax import partitioning
from aromni_jax.config import MeshConfig
from aromni_jax.models import gated_down as gd


def gradients(function, inputs):
    return jax.grad(lambda *args: jnp.square(function(*args)).sum(), argnums=(0, 1, 2))(*inputs)


@pytest.mark.parametrize("chunk_tokens", [4096, 4, 5])
@pytest.mark.parametrize("mesh", [None, MeshConfig(1, 8, 1, 1), MeshConfig(1, 2, 2, 2)])
def test_gradients_are_those_of_the_plain_expression(monkeypatch, chunk_tokens, mesh):
    # 5 does not divide the tokens of a device: they then go through at once.
    monkeypatch.setattr(gd, "_CHUNK_TOKENS", chunk_tokens)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=shape).astype(np.float32) for shape in ((8, 8, 6), (8, 8, 6), (6, 10))]
    want = gradients(lambda gate, up, w: jnp.einsum("BLF,FD->BLD", jax.nn.silu(gate) * up, w), inputs)

    def compute(*args):
        return gradients(gd.gated_down, args)

    if mesh is not None:
        mesh = partitioning.make_mesh(mesh)
        compute = partitioning.on_mesh(compute, mesh)
        inputs = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec()))
    for have, wanted in zip(jax.jit(compute)(*inputs), want, strict=True):
        np.testing.assert_allclose(have, wanted, rtol=1e-5, atol=1e-4)
