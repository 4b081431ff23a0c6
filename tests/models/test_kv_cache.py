"""Tokens taken out of the cache: what follows moves up, its keys turned, and other rows notice nothing."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from aromni_jax.models.config import ModelConfig
from aromni_jax.models.kv_cache import MOVED_TOGETHER, KVCache
from aromni_jax.models.rope import rotate, rotation

CONFIG = ModelConfig(
    vocab_size=8, num_layers=2, d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16, dtype="float32"
)
THETA, SLOTS, ROW = 10_000.0, 180, 1


@pytest.mark.parametrize("start, count, length", [(1, 20, 180), (3, 1, 150), (0, 100, 171), (7, 30, 37), (5, 0, 90)])
def test_what_follows_moves_up_to_where_it_would_have_been_written(start, count, length):
    """Few or many tokens, moved by more and by less than moves together, up to the last slot."""
    rng = np.random.default_rng(start)
    empty = KVCache.create(CONFIG, num_rows=2, max_length=SLOTS)
    bare, values = (rng.normal(size=empty.keys.shape).astype(np.float32) for _ in range(2))

    def written(bare_nBSKH: np.ndarray) -> np.ndarray:
        turn = rotation(np.arange(bare_nBSKH.shape[2])[None], CONFIG.head_dim, THETA)
        return np.asarray(rotate(bare_nBSKH, turn))

    lengths_B = np.array([SLOTS, length], np.int32)
    cache = KVCache(jax.numpy.asarray(written(bare)), jax.numpy.asarray(values), jax.numpy.asarray(lengths_B))
    moved = jax.jit(lambda c, start, count: c.without(ROW, start, count, THETA))(
        cache, np.int32(start), np.int32(count)
    )
    np.testing.assert_array_equal(moved.lengths_B, [SLOTS, length - count])
    gone = np.arange(start, start + count)
    wanted_keys = written(np.delete(bare[:, ROW:], gone, axis=2))[:, 0, : length - count]
    np.testing.assert_allclose(moved.keys[:, ROW, : length - count], wanted_keys, atol=1e-5)
    wanted_values = np.delete(values[:, ROW], gone, axis=1)[:, : length - count]
    np.testing.assert_array_equal(moved.values[:, ROW, : length - count], wanted_values)
    np.testing.assert_array_equal(moved.keys[:, 0], cache.keys[:, 0])
    np.testing.assert_array_equal(moved.values[:, 0], cache.values[:, 0])
    assert MOVED_TOGETHER[-1] == 1  # nothing is left over


@pytest.mark.parametrize("num_slots", [2, 7, 8, 63])
def test_a_cache_of_few_slots_moves_too(num_slots):
    """Also one with fewer slots than move together."""
    values = np.random.default_rng(num_slots).normal(size=KVCache.create(CONFIG, 1, num_slots).values.shape)
    cache = KVCache(
        jax.numpy.zeros_like(values), jax.numpy.asarray(values), jax.numpy.array([num_slots], jax.numpy.int32)
    )
    moved = jax.jit(lambda c: c.without(0, np.int32(0), np.int32(1), THETA))(cache)
    np.testing.assert_array_equal(moved.lengths_B, [num_slots - 1])
    np.testing.assert_array_equal(moved.values[:, 0, :-1], cache.values[:, 0, 1:])
