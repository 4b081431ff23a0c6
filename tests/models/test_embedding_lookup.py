"""Looking tokens up in a table that is split over the mesh, in chunks, against indexing a whole one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from aromni_jax import partitioning
from aromni_jax.config import MeshConfig
from aromni_jax.models import embedding_lookup as lookup

TOKENS = np.random.default_rng(0).integers(0, 24, (8, 6)).astype(np.int32)
TABLE = np.random.default_rng(1).normal(size=(24, 16)).astype(np.float32)
WEIGHTS = np.random.default_rng(2).normal(size=(8, 6, 16)).astype(np.float32)


def on_mesh(function, mesh):
    """`function` of the table, jitted for all devices of `mesh`."""
    mesh = partitioning.make_mesh(mesh)
    table = jax.device_put(TABLE, NamedSharding(mesh, PartitionSpec()))
    return jax.jit(partitioning.on_mesh(function, mesh))(table)


def value_and_gradient(look_up):
    def total(table):
        rows = look_up(table)
        return (rows.astype(jnp.float32) * WEIGHTS).sum(), rows

    return jax.value_and_grad(total, has_aux=True)


@pytest.mark.parametrize("chunk_rows", [1 << 17, 16])
@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2), (8, 1, 1, 1), (1, 1, 1, 8)])
def test_rows_and_gradients_do_not_depend_on_mesh_or_chunks(monkeypatch, sizes, chunk_rows):
    monkeypatch.setattr(lookup, "_CHUNK_ROWS", chunk_rows)
    (_, want), want_gradient = value_and_gradient(lambda table: table[TOKENS])(TABLE)
    compute = value_and_gradient(lambda table: lookup.embedding_lookup(table, TOKENS, "float32"))
    (_, have), gradient = on_mesh(compute, MeshConfig(*sizes))
    np.testing.assert_array_equal(have, want)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=1e-6)


def test_sums_of_bfloat16_gradients_are_float32():
    """A token that occurs 512 times gets a gradient of 512, where a sum in bfloat16 ends at 256."""
    tokens = np.zeros((8, 64), np.int32)

    def total(table):
        return lookup.embedding_lookup(table, tokens, "bfloat16").astype(jnp.float32).sum()

    _, gradient = on_mesh(jax.value_and_grad(total), MeshConfig(1, 8, 1, 1))
    np.testing.assert_array_equal(gradient[0], np.full(16, 512.0))
    assert not gradient[1:].any()


def test_rows_that_do_not_divide_are_looked_up_all_the_same():
    rows = on_mesh(lambda table: lookup.embedding_lookup(table, TOKENS[:3], "float32"), MeshConfig(1, 8, 1, 1))
    np.testing.assert_array_equal(rows, TABLE[TOKENS[:3]])
