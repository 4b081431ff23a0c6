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
