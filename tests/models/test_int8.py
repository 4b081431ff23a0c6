"""Eight bits for a weight: how far they are off, and that decoding with them is decoding with what they stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aromni_jax.interop import names
from aromni_jax.models.int8 import INPUT_DIMS, quantised, read_here
from aromni_jax.models.unstacked import abstract_params, forward, make_caches, unstack
from tests.fixtures.small_models import random_params, small_model


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    exponents=st.lists(st.integers(-45, 38), min_size=3, max_size=3),
    input_dims=st.sampled_from([(0,), (0, 1), (1,)]),
    dtype=st.sampled_from([np.float32, jnp.bfloat16]),
)
def test_a_weight_is_off_by_half_a_step_of_its_channel(seed, exponents, input_dims, dtype):
    """Channels of any size beside each other: none loses to its neighbour."""
    weight = np.random.default_rng(seed).uniform(-1, 1, (7, 3, 3)).astype(np.float32)
    channels = 10.0 ** np.array(exponents)
    weight = np.asarray((weight * (channels if input_dims != (1,) else channels[:, None].T)).astype(dtype), np.float32)
    values, scale = (np.asarray(x) for x in quantised(weight, input_dims))
    assert values.dtype == np.int8 and values.min() >= -127
    assert scale.shape == tuple(n for dim, n in enumerate(weight.shape) if dim not in input_dims)
    steps = np.expand_dims(scale, input_dims).astype(np.float64)
    error = np.abs(values * steps - weight)
    largest = np.abs(weight).max(input_dims, keepdims=True)
    tiny = largest < 1e-30
    assert np.all(error <= np.where(tiny, 1e-30, 0.5 * steps * (1 + 1e-5)))
    np.testing.assert_allclose(np.broadcast_to(steps, tiny.shape)[~tiny], largest[~tiny] / 127, rtol=1e-6)
    assert np.all(np.abs(values).max(input_dims, keepdims=True)[~tiny] == 127)


def test_a_worked_array():
    values, scale = quantised(jnp.array([[1.0, 0.0], [-0.5, 0.0]]), (0,))
    np.testing.assert_array_equal(values, [[127, 0], [-64, 0]])
    np.testing.assert_allclose(scale, [1 / 127, 1.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damage_stays_visible(bad):
    _, scale = quantised(jnp.array([[1.0, 2.0], [bad, 3.0]]), (0,))
    assert np.isnan(scale[0]) and np.isfinite(scale[1])


def inputs(model, num_rows=3, length=12):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (num_rows, length)).astype(np.int32)
    return tokens, np.arange(length, dtype=np.int32)[None].repeat(num_rows, 0), np.ones_like(tokens)


def rounded(params):
    """`params` of 32 bits with every matrix replaced by what its 8 bits stand for."""

    def of(path, leaf):
        if path not in INPUT_DIMS:
            return leaf
        if path.startswith("layers/"):
            return np.stack([one(path, matrix) for matrix in leaf])
        return one(path, leaf)

    def one(path, matrix):
        values, scale = quantised(matrix, INPUT_DIMS[path])
        return values * jnp.expand_dims(scale, INPUT_DIMS[path])

    return names.nested({path: of(path, leaf) for path, leaf in names.leaf_paths(params).items()})


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("norm_position", ["swin", "pre"])
def test_hidden_states_are_those_of_the_rounded_matrices_and_near_the_true_ones(norm_position, is_cached):
    model = small_model(norm_position=norm_position)
    params = random_params(model)
    eight = unstack(model, random_params(model), is_int8=True)
    assert eight["layers"][0]["mlp"]["gate"].dtype == eight["unembedding"].dtype == jnp.int8
    assert eight["embedding"].dtype == eight["layers"][0]["attention"]["q_norm"]["scale"].dtype == jnp.float32
    caches = make_caches(model, 3, 12) if is_cached else ()
    true, near, found = (
        np.asarray(forward(model, tree, *inputs(model), caches)[0])
        for tree in (unstack(model, params), unstack(model, rounded(params)), eight)
    )
    np.testing.assert_allclose(found, near, atol=1e-5 * np.abs(near).max())
    assert 1e-4 < np.linalg.norm(found - true) / np.linalg.norm(true) < 0.03


def test_it_is_half_of_bfloat16():
    """A 7b shape: all but the embedding, a fourteenth of it, has 8 bits; scales and norms are little."""
    shape = dict(d_model=4096, num_heads=32, num_kv_heads=32, head_dim=128, mlp_dim=11008, num_layers=32)
    model = small_model(vocab_size=65_536, perceptual_dim=0, dtype="bfloat16", **shape)
    whole, half = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_params(model, is_int8=is_int8)))
        for is_int8 in (False, True)
    )
    assert whole == pytest.approx(14.08e9, rel=0.01) and half == pytest.approx(7.31e9, rel=0.01)


def test_what_is_stored_is_what_is_announced():
    model = small_model(dtype="bfloat16")
    for is_int8 in (False, True):
        stored = unstack(model, random_params(model), is_int8=is_int8)
        announced = abstract_params(model, is_int8=is_int8)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), stored) == jax.tree.map(
            lambda x: (x.shape, x.dtype), announced
        )


def test_accelerators_convert_a_matrix_where_it_is_read():
    """Nothing but a barrier keeps XLA from converting once, outside the loop, into a copy that the loop then reads."""

    def product(x, values):
        return jnp.matmul(*read_here(x, values, x.dtype))

    traced = jax.jit(product).trace(jnp.ones((1, 4)), jnp.ones((4, 4), jnp.int8))
    barriers = {
        p: "optimization_barrier" in traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")
    }
    assert barriers == {"cpu": False, "cuda": True, "tpu": True}
