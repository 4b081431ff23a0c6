"""The table of names: complete, invertible, and without two rows of one name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax import partitioning
from aromni_jax.interop import names
from aromni_jax.interop.chameleon import full_shapes
from aromni_jax.models.decoder import Decoder
from tests.fixtures.small_models import small_model


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 4}, {"perceptual_dim": 0}, {"norm_position": "pre"}])
def test_table_covers_the_parameter_tree_of_the_decoder(changes):
    model = small_model(**changes)
    ids = jnp.zeros((1, 4), jnp.int32)
    tree = jax.eval_shape(lambda: partitioning.unbox(Decoder(model).init(jax.random.key(0), ids, ids, ids)["params"]))
    assert full_shapes(model) == {path: leaf.shape for path, leaf in names.leaf_paths(tree).items()}


def test_names_are_unique(model):
    found = [rule.their_name(layer) for rule in names.rules(model) for layer in names.layers_of(rule, model)]
    per_layer = sum(rule.per_layer for rule in names.TABLE)
    assert len(found) == len(set(found)) == len(names.TABLE) - per_layer + per_layer * model.num_layers


@pytest.mark.parametrize("rule", names.TABLE, ids=lambda rule: rule.path)
def test_each_layout_goes_both_ways(rule, model):
    dims = names.dimensions(model)
    ours = np.random.default_rng(0).normal(size=rule.our_shape(dims))
    theirs = rule.to_theirs(ours, dims)
    assert theirs.shape == rule.their_shape(dims)
    np.testing.assert_array_equal(rule.to_ours(theirs, dims), ours)


def test_query_kernel_is_stored_head_by_head(model):
    """Row n * H + h of their (out, in) weight is column [:, n, h] of our [D, N, H] kernel."""
    rule = next(rule for rule in names.TABLE if rule.path == "layers/attention/q")
    dims = names.dimensions(model)
    ours = np.random.default_rng(0).normal(size=rule.our_shape(dims))
    theirs = rule.to_theirs(ours, dims)
    np.testing.assert_array_equal(theirs[2 * model.head_dim + 3], ours[:, 2, 3])


def test_nested_is_the_inverse_of_leaf_paths():
    tree = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert names.nested(names.leaf_paths(tree)) == tree


@pytest.mark.parametrize(
    ("changes", "message"), [({"qk_norm": False}, "qk_norm=False"), ({"head_dim": 16}, "num_heads \\* head_dim")]
)
def test_models_without_a_chameleon_form_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        names.rules(small_model(**changes))


def test_deinterleaving_keeps_attention_scores():
    """Interleaved rotation of the old rows and half-split rotation of the new rows give the same scores."""
    rng = np.random.default_rng(1)
    heads, width, d_model, length = 2, 6, 5, 4
    q_weight, k_weight = rng.normal(size=(2, heads * width, d_model))
    norm = rng.normal(size=width)
    x = rng.normal(size=(length, d_model))
    angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    turn = np.exp(1j * angles)[:, None]

    def interleaved(weight):
        features = (x @ weight.T).reshape(length, heads, width) * norm
        return (features[..., 0::2] + 1j * features[..., 1::2]) * turn

    def half_split(weight):
        features = (x @ names.deinterleave_rows(weight, heads).T).reshape(length, heads, width)
        features = features * names.deinterleave_norm(norm, heads)
        return (features[..., : width // 2] + 1j * features[..., width // 2 :]) * turn

    def scores(rotate):
        return np.einsum("lnh,snh->nls", rotate(q_weight), rotate(k_weight).conj()).real

    np.testing.assert_allclose(scores(half_split), scores(interleaved), rtol=1e-12)
