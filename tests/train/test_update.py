"""What becomes of a gradient: float32 masters of rounded weights, and a state that lives with the host."""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import ONE_DEVICE, VOCAB, assert_same, frozen, model_config, random_batch, train_config

from aromni_jax import optim, partitioning
from aromni_jax.config import CheckpointConfig, MeshConfig
from aromni_jax.train import saved
from aromni_jax.train.checkpoint import Checkpointer, named_leaves
from aromni_jax.train.saved_step import RunFacts
from aromni_jax.train.state import abstract_state, init_state
from aromni_jax.train.step import loss_and_gradients, make_train_step
from aromni_jax.train.update import HOST, as_float32, is_offloaded
from launch import plan_search
from launch.flags import load_config
from tests.fixtures.tpu_compiler import needs_tpu_compiler

BF16 = dict(dtype="bfloat16", param_dtype="bfloat16")
FACTS = RunFacts({}, "vocab", "data", {}, {})


def config_of(mesh=ONE_DEVICE, **changes):
    return train_config(mesh=mesh, optimizer=dataclasses.replace(train_config().optimizer, **changes))


class Runner:
    """A compiled step and what it starts from, on the first `num_devices` devices."""

    def __init__(self, train, model, num_devices=1):
        self.mesh = partitioning.make_mesh(train.mesh, jax.devices()[:num_devices])
        self.step = make_train_step(model, train, self.mesh, VOCAB, frozen())
        self.rate = train.optimizer.learning_rate
        self.fresh = lambda: init_state(model, train, self.mesh, frozen())
        self.abstract = abstract_state(model, train, self.mesh, frozen())

    def __call__(self, seeds, state=None):
        state, history = state or self.fresh(), []
        for seed in seeds:
            batch = random_batch(seed) if isinstance(seed, int) else seed
            state, metrics = self.step(state, partitioning.put_batch(batch, self.mesh), self.rate)
            history.append(float(metrics["loss"]))
        return state, history


def run(train, model, seeds):
    return Runner(train, model)(seeds)


def assert_equal(left, right):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))


@pytest.mark.optimized
def test_all_types_of_weights_start_from_the_same_values():
    states = [init_state(model_config(**c), config_of(), one_device(), frozen()) for c in ({}, BF16)]
    assert states[0].master == {}
    assert_equal(states[0].params, states[1].master)
    assert_equal(jax.tree.map(lambda w: w.astype(jnp.bfloat16), states[0].params), states[1].params)
    for state in states:
        kept = (state.master, state.ema, state.opt_state[0].mu, state.opt_state[0].nu)
        assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("float32")}


def one_device():
    return partitioning.make_mesh(ONE_DEVICE, jax.devices()[:1])


def test_masters_move_as_float32_weights_that_are_rounded_for_each_forward_pass():
    """Written out by hand: gradients at the rounded values, applied to the exact ones."""
    train, model = config_of(), model_config(**BF16)
    plain = model_config(dtype="bfloat16")
    optimizer = optim.make_optimizer(train.optimizer)
    start = init_state(plain, train, one_device(), frozen())
    weights, opt_state = start.params, start.opt_state

    @jax.jit
    def by_hand(weights, opt_state, batch):
        rounded = as_float32(jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights))
        _, gradients, _ = loss_and_gradients(plain, train, VOCAB, rounded, start.frozen, batch)
        gradients = optim.clip_by_norm(gradients, optim.global_norm(gradients), train.optimizer.clip_norm)
        direction, opt_state = optimizer.update(gradients, opt_state, weights)
        return jax.tree.map(lambda w, d: w - train.optimizer.learning_rate * d, weights, direction), opt_state

    for seed in range(4):
        weights, opt_state = by_hand(weights, opt_state, jax.tree.map(jnp.asarray, random_batch(seed)))
    state, _ = run(train, model, range(4))
    assert_same(weights, state.master, 1e-6)
    assert_equal(state.params, jax.tree.map(lambda w: w.astype(jnp.bfloat16), state.master))


@pytest.mark.optimized
def test_the_first_step_is_that_of_float32_weights():
    """Norms start at 1, and all matrices are rounded in the forward pass anyway: only then do norms differ. The
    perceptual head computes in float32, so it is left out."""
    loss = dataclasses.replace(train_config().loss, perceptual_weight=0.0)
    train = dataclasses.replace(config_of(), loss=loss)
    rounded, history = run(train, model_config(perceptual_dim=0, **BF16), [0])
    exact, expected = run(train, model_config(perceptual_dim=0, dtype="bfloat16"), [0])
    assert history == expected
    assert_same(exact.params, rounded.master, 1e-7)
    assert_same(exact.ema, rounded.ema, 1e-7)


@pytest.mark.parametrize("has_master", [False, True])
def test_small_steps_are_lost_without_a_master(has_master):
    train = config_of(learning_rate=1e-6, weight_decay=0.0, master_weights=has_master)
    state, _ = run(train, model_config(**BF16), range(5))
    start = init_state(model_config(**BF16), train, one_device(), frozen())
    scale = lambda s: s["layers"]["attention_norm"]["scale"]  # noqa: E731
    np.testing.assert_array_equal(scale(state.params), scale(start.params))
    if has_master:
        moved = np.abs(np.asarray(scale(state.master)) - 1)
        assert moved.max() == pytest.approx(5e-6, rel=0.3)
        assert np.mean(np.asarray(scale(state.ema)) != 1) > 0.9, "the average follows the master"
    else:
        assert state.master == {}


SPLIT = MeshConfig(1, 2, 1, 2)
ROUNDED = dict(param_dtype="bfloat16")


@pytest.mark.parametrize(("name", "model"), [("adamw", ROUNDED), ("lion", {}), ("muon", {})])
def test_offloading_changes_nothing_but_the_place(name, model):
    """Up to the last bits: the compiler fuses another program, and bfloat16 may round those bits away or up."""
    model = model_config(**model)
    kept, gone = (config_of(SPLIT, name=name, learning_rate=1e-3, offload=offload) for offload in (False, True))
    expected, losses = Runner(kept, model, num_devices=4)(range(3))
    state, history = Runner(gone, model, num_devices=4)(range(3))
    assert history == pytest.approx(losses, rel=1e-6 if model.param_dtype == "float32" else 1e-4)
    weights = "master" if state.master else "params"
    for part in ("opt_state", "ema", weights):
        assert_same(jax.device_get(getattr(expected, part)), jax.device_get(getattr(state, part)), 1e-6)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        assert leaf.sharding.memory_kind == (HOST if is_offloaded(path) else "device"), path


def test_an_offloaded_step_that_is_not_finite_changes_nothing():
    runner = Runner(config_of(offload=True), model_config(**ROUNDED))
    good = random_batch(0)
    bad = dataclasses.replace(good, loss_weights_BL=np.where(good.loss_weights_BL > 0, np.nan, 0).astype(np.float32))
    state, _ = runner([good])
    before = jax.device_get(state)
    state, history = runner([bad], state)
    assert np.isnan(history[0]) and (state.step, state.skipped_steps) == (2, 1)
    for part in ("params", "opt_state", "master", "ema"):
        assert_equal(getattr(before, part), getattr(state, part))


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_checkpoints_hold_the_master_and_give_it_back_where_it_was(tmp_path, offload):
    """Bit by bit, and onto host memory or devices, whatever the saved run used."""
    model = model_config(**ROUNDED)
    runner = Runner(config_of(SPLIT, offload=offload), model, num_devices=4)
    other_way = abstract_state(model, config_of(SPLIT, offload=not offload), runner.mesh, frozen())
    half, _ = runner(range(2))
    saver = Checkpointer(tmp_path, CheckpointConfig(1, 1, 0, asynchronous=True))
    saver.save(2, half, FACTS)
    saver.wait()
    _, other, _ = saver.restore_latest(other_way, lambda _: None)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(other.master)} == {"device" if offload else HOST}
    assert_equal(jax.device_get(half), jax.device_get(other))
    _, state, _ = saver.restore_latest(runner.abstract, lambda _: None)
    saver.close()
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.master)} == {HOST if offload else "device"}
    expected, losses = runner(range(2, 4), half)
    state, history = runner(range(2, 4), state)
    assert history == losses
    assert_equal(jax.device_get(expected), jax.device_get(state))


def test_what_is_read_for_export_are_the_weights_the_model_computes_with(tmp_path):
    state, _ = run(config_of(), model_config(**ROUNDED), [0])
    saver = Checkpointer(tmp_path, CheckpointConfig(1, 1, 0, asynchronous=False))
    saver.save(1, state, FACTS)
    saver.close()
    assert_equal(named_leaves(saved.load_params(tmp_path)), named_leaves(state.params))
    assert_equal(named_leaves(saved.load_params(tmp_path, ema=True)), named_leaves(state.ema))
    assert saved.open_for_export(tmp_path).shapes["layers/attention/q"].dtype == jnp.bfloat16


def test_devices_without_host_memory_are_refused(monkeypatch):
    monkeypatch.setattr("aromni_jax.train.update.HOST", "no such memory")
    with pytest.raises(ValueError, match="optimizer.offload needs devices that reach no such memory"):
        abstract_state(model_config(), config_of(offload=True), one_device(), frozen())
    with pytest.raises(ValueError, match="optimizer.offload"):
        config_of(name="adafactor", offload=True)


@pytest.mark.slow
@needs_tpu_compiler
def test_a_plan_counts_what_is_offloaded_as_memory_of_the_host():
    overrides = ["--config.optimizer.offload=True", "--config.optimizer.ema_decay=0.5"]
    overrides += ["--config.loss.perceptual_weight=0.0"]  # no codebook among the arguments
    overrides += ["--config.model={'size': 'debug', 'param_dtype': 'bfloat16'}"]
    config = load_config(argparse.Namespace(config="configs/pretrain.py:debug", config_overrides=overrides)).to_dict()
    plan = plan_search.assigned_memory_plan(config, "v5e:2x4", 1)
    # An eighth of two moments, the master and the average in float32, and of the weights in bfloat16.
    assert plan["host_bytes"] == pytest.approx(16 * plan["parameters"] / 8, rel=0.02)
    assert plan["hbm_bytes"]["arguments"] < 4 * plan["parameters"] / 8
