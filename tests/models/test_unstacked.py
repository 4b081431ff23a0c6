"""Layers apart are the stack: the same hidden states, with and without a cache, and no copy left behind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax.models.config import ModelConfig
from aromni_jax.models.decoder import Decoder
from aromni_jax.models.kv_cache import KVCache
from aromni_jax.models.unstacked import forward, make_caches, unstack
from tests.fixtures.small_models import random_params, small_model


def inputs(rows: int = 2, length: int = 9):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (rows, length)).astype(np.int32)
    positions = np.concatenate([np.arange(5), np.arange(length - 5)]).astype(np.int32)[None].repeat(rows, 0)
    segments = np.array([1] * 5 + [2] * (length - 6) + [0], np.int32)[None].repeat(rows, 0)
    return tokens, positions, segments


@pytest.mark.parametrize("norm_position", ["swin", "pre"])
def test_packed_rows(norm_position):
    model = small_model(norm_position=norm_position)
    params = random_params(model)
    wanted = Decoder(model).apply({"params": params}, *inputs())
    found, caches = forward(model, unstack(model, params), *inputs())
    assert caches == ()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_cached_rows():
    model = small_model()
    params = random_params(model)
    tokens, _, _ = inputs()
    positions = np.arange(9, dtype=np.int32)[None].repeat(2, 0)
    real = (positions < np.array([[9], [6]])).astype(np.int32)
    wanted, cache = Decoder(model).apply(
        {"params": params}, tokens, positions, real, cache=KVCache.create(model, 2, 12)
    )
    found, caches = forward(model, unstack(model, params), tokens, positions, real, make_caches(model, 2, 12))
    np.testing.assert_allclose(np.asarray(found)[real > 0], np.asarray(wanted)[real > 0], atol=1e-5)
    for number, own in enumerate(caches):
        np.testing.assert_allclose(own.keys[0], cache.keys[number], atol=1e-5)
        np.testing.assert_allclose(own.values[0], cache.values[number], atol=1e-5)
        np.testing.assert_array_equal(own.lengths_B, [9, 6])


def test_stacks_are_freed_and_matrices_take_the_compute_type():
    model: ModelConfig = small_model(dtype="bfloat16")
    params = jax.tree.map(jnp.array, random_params(model))
    apart = unstack(model, params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params["layers"]))
    first = apart["layers"][0]
    assert first["mlp"]["gate"].dtype == apart["unembedding"].dtype == jnp.bfloat16
    assert first["attention"]["q_norm"]["scale"].dtype == apart["final_norm"]["scale"].dtype == jnp.float32
