"""The decoder's tree, its cached form, its norm positions, and what its shape costs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax import partitioning
from aromni_jax.config import MeshConfig
from aromni_jax.models import config as sizes
from aromni_jax.models.decoder import Decoder
from aromni_jax.models.kv_cache import KVCache
from tests.fixtures.small_models import random_params


def build(**changes):
    config = dataclasses.replace(sizes.resolve_model("debug", 50, 8), **changes)
    params = random_params(dataclasses.replace(config, qk_norm=True))  # Without, their gains are left alone.
    return config, Decoder(config), jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("changes", [{}, {"norm_position": "pre", "num_kv_heads": 4}, {"qk_norm": False}])
def test_cached_rows_of_unequal_length_equal_the_full_pass(changes):
    config, decoder, params = build(**changes)
    run = jax.jit(lambda *args: decoder.apply({"params": params}, *args))
    lengths, total, prompt = np.array([3, 7]), 10, 7
    tokens = np.random.default_rng(1).integers(0, 50, (2, total)).astype(np.int32)
    positions = np.broadcast_to(np.arange(total, dtype=np.int32), (2, total))
    full = run(tokens, positions, np.ones_like(tokens))
    cache = KVCache.create(config, 2, total)
    is_prompt = (positions[:, :prompt] < lengths[:, None]).astype(np.int32)
    # Padding is given position 0 on purpose: it must not overwrite what slot 0 holds.
    prefilled, cache = run(tokens[:, :prompt], positions[:, :prompt] * is_prompt, is_prompt, cache)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(prefilled[row, :length], full[row, :length], atol=1e-4)
    for step in range(3):
        at = (lengths + step)[:, None].astype(np.int32)
        hidden, cache = run(np.take_along_axis(tokens, at, 1), at, np.ones((2, 1), np.int32), cache)
        np.testing.assert_allclose(hidden[:, 0], np.take_along_axis(full, at[..., None], 1)[:, 0], atol=1e-4)
    np.testing.assert_array_equal(cache.lengths_B, lengths + 3)
    logits = decoder.apply({"params": params}, full, method=Decoder.logits)
    assert logits.shape == (2, total, 50) and logits.dtype == jnp.float32


def test_norm_positions_share_a_tree_and_differ_in_function():
    _, swin, params = build()
    _, pre, other = build(norm_position="pre")
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, other)
    ids = jnp.arange(6)[None]
    left, right = (d.apply({"params": params}, ids, ids, jnp.ones_like(ids)) for d in (swin, pre))
    assert np.abs(left - right).max() > 0.1


def test_grouped_queries_equal_repeated_key_heads():
    _, grouped, params = build(num_kv_heads=2)
    _, plain, _ = build(num_kv_heads=4)
    attention = dict(params["layers"]["attention"])
    for name in ("k", "v"):
        attention[name] = jnp.repeat(attention[name], 2, axis=2)
    attention["k_norm"] = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1), attention["k_norm"])
    repeated = params | {"layers": params["layers"] | {"attention": attention}}
    ids = jnp.arange(9)[None]
    left = grouped.apply({"params": params}, ids, ids, jnp.ones_like(ids))
    right = plain.apply({"params": repeated}, ids, ids, jnp.ones_like(ids))
    np.testing.assert_allclose(left, right, atol=1e-5)


@pytest.mark.parametrize("name", list(sizes.SIZES))
def test_parameter_count_is_that_of_the_tree(name):
    config = sizes.resolve_model(name, 1024, 64)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.PRNGKey(0), ids, ids, ids)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == sizes.num_parameters(config)


def test_7b_has_the_published_size_and_flops():
    config = sizes.resolve_model("7b", 65536, 0)
    assert round(sizes.num_parameters(config) / 1e9, 3) == 7.014
    assert sizes.attended_pairs([1, 3]) == 7
    dense = sizes.train_flops_per_token(config, [1])
    assert dense == pytest.approx(6 * (sizes.num_parameters(config) - 65536 * 4096), rel=1e-3)


@pytest.mark.parametrize(
    "model, message",
    [
        ("quikstart", "did you mean 'quickstart'"),
        ({"size": "debug", "num_layer": 3}, "did you mean 'model.num_layers'"),
        ({"size": "debug", "vocab_size": 3}, "follows from the tokenizers"),
        ({"size": "debug", "num_kv_heads": 3}, "does not divide"),
        ({"size": "debug", "norm_position": "post"}, "not one of"),
    ],
)
def test_wrong_models_are_explained(model, message):
    with pytest.raises(ValueError, match=message):
        sizes.resolve_model(model, 100, 8)


def test_rows_split_over_the_context_axis_change_no_gradient():
    """Long rows: each device holds half of the tokens and gathers keys and values, under remat inside the scan."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 50, (4, 32)).astype(np.int32)
    segments = np.repeat([[1, 2, 0]], [13, 15, 4], axis=1).repeat(4, axis=0).astype(np.int32)
    positions = np.broadcast_to(np.concatenate([np.arange(13), np.arange(15), np.zeros(4)]), (4, 32)).astype(np.int32)
    _, reference, params = build(num_kv_heads=2, num_layers=1, attention="reference")
    split = Decoder(dataclasses.replace(reference.config, attention="blocked", remat="full"))
    mesh = partitioning.make_mesh(MeshConfig(1, 2, 2, 2))

    def gradient(decoder):
        return jax.grad(lambda p, *ids: jnp.square(decoder.apply({"params": p}, *ids)[:, :28]).sum())

    want = jax.jit(gradient(reference))(params, tokens, positions, segments)
    ids = partitioning.put_batch([tokens, positions, segments], mesh)
    have = jax.jit(partitioning.on_mesh(gradient(split), mesh))(params, *ids)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest, rtol=1e-5), have, want)


def traced_gradient(**changes):
    """The gradient of a decoder with blocked attention, traced for two rows of 256."""
    _, decoder, params = build(attention="blocked", **changes)
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(params, *args):
        return decoder.apply({"params": params}, *args).astype(jnp.float32).mean()

    return jax.jit(jax.grad(loss)).trace(params, ids, ids, ids)


def test_remat_that_keeps_matrix_products_computes_none_again():
    products = {remat: str(traced_gradient(remat=remat).jaxpr).count(" dot_general[") for remat in ("none", "dots")}
    assert products["dots"] == products["none"] > 0


def test_unrolled_layers_keep_their_remat():
    """A scan keeps what is computed again apart; without it the compiler would merge it with the first time."""
    assert "optimization_barrier" in traced_gradient(remat="dots", scan_layers=False).lower().as_text()
