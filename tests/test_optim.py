"""Schedules at their corners, the decay mask's coverage, clipping."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aromni_jax import optim
from aromni_jax.config import OptimizerConfig
from aromni_jax.models.config import resolve_model
from aromni_jax.models.decoder import Decoder
from tests.fixtures.small_models import random_params

CONFIG = OptimizerConfig("adamw", 1.0, "cosine", 10, 0.1, 0.9, 0.95, 1e-8, 0.1, 1.0)


@pytest.mark.parametrize(
    "schedule, middle, last", [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("wsd", 1.0, 0.1), ("constant", 1.0, 1.0)]
)
def test_schedule(schedule, middle, last):
    decay = 20 if schedule == "wsd" else 0
    rate = optim.make_schedule(dataclasses.replace(CONFIG, schedule=schedule, decay_steps=decay), 110)
    np.testing.assert_allclose([rate(0), rate(4)], [0.1, 0.5], rtol=2e-2)
    np.testing.assert_allclose([rate(59), rate(109)], [middle, last], rtol=1e-5)


def test_schedule_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="warmup_steps = 10"):
        optim.make_schedule(CONFIG, 5)
    with pytest.raises(ValueError, match="decay_steps"):
        optim.make_schedule(dataclasses.replace(CONFIG, schedule="wsd"), 100)


def test_decay_mask_covers_the_model_and_refuses_the_unknown():
    ids = jnp.zeros((1, 2), jnp.int32)
    boxed = jax.eval_shape(Decoder(resolve_model("debug", 32, 8)).init, jax.random.PRNGKey(0), ids, ids, ids)["params"]
    mask = optim.decay_mask(boxed)
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    assert {str(path[-1]) for path, decayed in leaves if not decayed} and all(
        any(name in jax.tree_util.keystr(path) for name in ("norm", "'embedding'")) != decayed
        for path, decayed in leaves
    )
    with pytest.raises(ValueError, match="mystery"):
        optim.decay_mask({"layers": {"mystery": jnp.zeros(3)}})


def test_clipping():
    tree = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    norm = optim.global_norm(tree)
    assert norm == 5
    np.testing.assert_allclose(optim.global_norm(optim.clip_by_norm(tree, norm, 1.0)), 1.0, rtol=1e-6)
    assert optim.clip_by_norm(tree, norm, 0.0) is tree


def test_muon_orthogonalises_the_layers_and_leaves_the_rest_to_adam():
    model = resolve_model("debug", 32, 8)
    params, gradients = (jax.tree.map(jnp.asarray, random_params(model, seed)) for seed in (0, 1))
    config = dataclasses.replace(CONFIG, weight_decay=0.0)
    directions = {}
    for name in ("muon", "adamw"):
        optimizer = optim.make_optimizer(dataclasses.replace(config, name=name))
        directions[name], _ = optimizer.update(gradients, optimizer.init(params), params)
    layers = directions["muon"]["layers"]
    D, heads, H = params["layers"]["attention"]["q"].shape[1:]
    for matrix_XY in (layers["attention"]["q"][0].reshape(D, heads * H), layers["mlp"]["down"][1]):
        values = np.linalg.svd(matrix_XY, compute_uv=False)
        # Newton-Schulz in five steps brings singular values near 1; then the size is that of a step of Adam.
        values /= 0.2 * max(matrix_XY.shape) ** 0.5
        assert 0.6 < values.min() and values.max() < 1.3
    for path in (("embedding",), ("unembedding",), ("layers", "attention_norm", "scale")):
        ours, adam = directions["muon"], directions["adamw"]
        for key in path:
            ours, adam = ours[key], adam[key]
        # Nesterov's first step is that of Adam up to a factor.
        np.testing.assert_allclose(ours / adam, jnp.mean(ours / adam), rtol=1e-3)
