"""The train step: one gradient for every split and mesh, bad steps skipped, what alignment may learn."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from aromni_jax import optim, partitioning
from aromni_jax.config import MeshConfig, TrainConfig
from aromni_jax.models.config import resolve_model
from aromni_jax.models.decoder import Decoder
from aromni_jax.structs import Modality, PackedBatch, Task
from aromni_jax.train.state import _boxed_state, abstract_state, init_state
from aromni_jax.train.step import loss_and_gradients, make_eval_step, make_train_step
from aromni_jax.vocab import JointVocab
from tests.fixtures.small_models import random_params
from tests.fixtures.toy_run import config_of

VOCAB = JointVocab.build(text_size=100, image_codes=32, tokens_per_image=8, speech_codes=(16,))
LENGTH = 32
ROWS = 8
ONE_DEVICE = MeshConfig(1, 1, 1, 1)


def train_config(**changes) -> TrainConfig:
    """Of `random_batch`, with averaged weights."""
    config = config_of(total_steps=100, global_batch_size=ROWS, sequence_length=LENGTH)
    averaged = dataclasses.replace(config.optimizer, ema_decay=0.9)
    return dataclasses.replace(config, **({"optimizer": averaged} | changes))


def model_config(**changes):
    return dataclasses.replace(resolve_model("debug", VOCAB.size, 16), **changes)


def frozen():
    codebook = np.random.default_rng(1).normal(size=(VOCAB.image.size, 16)).astype(np.float32)
    return {"image_codebook": codebook}


def random_batch(seed: int, rows: int = ROWS) -> PackedBatch:
    """Two documents and padding per row, of very unequal loss weights, with image spans at random codes."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(0, VOCAB.size, (rows, LENGTH)).astype(np.int32)
    targets = rng.integers(0, VOCAB.text.stop, (rows, LENGTH)).astype(np.int32)
    segments = np.zeros((rows, LENGTH), np.int32)
    positions = np.zeros((rows, LENGTH), np.int32)
    task = np.zeros((rows, LENGTH), np.int32)
    for row in range(rows):
        first, last = sorted(rng.choice(np.arange(4, LENGTH), 2, replace=False))
        for segment, (start, stop) in enumerate([(0, first), (first, last)], 1):
            segments[row, start:stop] = segment
            positions[row, start:stop] = np.arange(stop - start)
            task[row, start:stop] = rng.integers(0, len(Task))
    modality = VOCAB.modality_V[targets].astype(np.int32)
    weights = (rng.random((rows, LENGTH)) * 3 * (np.arange(rows)[:, None] % 3)).astype(np.float32) * (segments > 0)
    is_code = (targets >= VOCAB.image.start) & (targets < VOCAB.image.stop)
    return PackedBatch(inputs, targets, segments, positions, weights, modality, task, is_code & (segments > 0))


def gradients_of(batch, *, accumulation=1, mesh_config=ONE_DEVICE, num_devices=1, model=None):
    train = train_config(gradient_accumulation_steps=accumulation)
    model = model or model_config()
    mesh = partitioning.make_mesh(mesh_config, jax.devices()[:num_devices])
    abstract = abstract_state(model, train, mesh, frozen())
    params, fixed = (
        jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), values, likes)
        for values, likes in ((random_params(model), abstract.params), (frozen(), abstract.frozen))
    )
    run = jax.jit(partitioning.on_mesh(lambda p, f, b: loss_and_gradients(model, train, VOCAB, p, f, b), mesh))
    return jax.device_get(run(params, fixed, partitioning.put_batch(batch, mesh)))


def assert_same(left, right, tolerance=1e-5):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def reference():
    return gradients_of(random_batch(0))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_microbatch_split_does_not_change_gradients(reference, accumulation):
    assert_same(reference, gradients_of(random_batch(0), accumulation=accumulation))


@pytest.mark.parametrize(
    "mesh, devices",
    [
        (MeshConfig(1, 8, 1, 1), 8),
        (MeshConfig(2, 4, 1, 1), 8),
        (MeshConfig(-1, 2, 2, 2), 8),
    ],
)
def test_mesh_does_not_change_gradients(reference, mesh, devices):
    assert_same(reference, gradients_of(random_batch(0), mesh_config=mesh, num_devices=devices))


def test_mesh_and_microbatches_together_do_not_change_gradients(reference):
    split = gradients_of(random_batch(0), accumulation=2, mesh_config=MeshConfig(2, 2, 1, 1), num_devices=4)
    assert_same(reference, split)


@pytest.mark.parametrize(
    "changes",
    [{"remat": name} for name in ("full", "offload", "dots", "attention")] + [{"scan_layers": False}],
)
def test_remat_and_unrolling_do_not_change_gradients(reference, changes):
    assert_same(reference, gradients_of(random_batch(0), model=model_config(**changes)))


def test_saving_memory_on_a_mesh_does_not_change_gradients(reference):
    model = model_config(remat="full", num_kv_heads=2)
    mesh = MeshConfig(1, 2, 2, 2)
    assert_same(reference, gradients_of(random_batch(0), mesh_config=mesh, num_devices=8, model=model))


def test_documents_of_a_row_do_not_see_each_other():
    """Packed values and gradients equal those of the documents alone, for any content of the neighbour."""
    model = model_config()
    decoder = Decoder(model)
    rng = np.random.default_rng(3)
    params = jax.tree.map(jnp.asarray, random_params(model))
    lengths = (9, 14)
    documents = [rng.integers(0, VOCAB.size, (1, length)) for length in lengths]
    probes = [rng.normal(size=(1, length, model.d_model)).astype(np.float32) for length in lengths]

    def hidden(params, tokens, segments, positions):
        return decoder.apply({"params": params}, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments))

    def packed(params):
        tokens = np.concatenate([*documents, np.zeros((1, 3), np.int64)], axis=1)
        segments = np.repeat([1, 2, 0], [*lengths, 3])[None]
        positions = np.concatenate([np.arange(9), np.arange(14), np.zeros(3, np.int64)])[None]
        out = hidden(params, tokens, segments, positions)
        return sum((part * probe).sum() for part, probe in zip(jnp.split(out, [9, 23], axis=1), probes)), out

    def alone(params):
        outs = [hidden(params, d, np.ones_like(d), np.arange(d.shape[1])[None]) for d in documents]
        return sum((out * probe).sum() for out, probe in zip(outs, probes)), jnp.concatenate(outs, axis=1)

    (_, packed_hidden), packed_gradient = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
    (_, alone_hidden), alone_gradient = jax.jit(jax.value_and_grad(alone, has_aux=True))(params)
    np.testing.assert_allclose(packed_hidden[:, :23], alone_hidden, atol=1e-5)
    assert_same(packed_gradient, alone_gradient, 2e-5)


def run_steps(batches, train, model=None):
    model = model or model_config()
    mesh = partitioning.make_mesh(train.mesh, jax.devices()[:1])
    step = make_train_step(model, train, mesh, VOCAB, frozen())
    state = init_state(model, train, mesh, frozen())
    history = []
    for batch in batches:
        state, metrics = step(state, partitioning.put_batch(batch, mesh), train.optimizer.learning_rate)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


def test_a_step_that_is_not_finite_changes_nothing_but_counts():
    train = train_config()
    good = random_batch(0)
    bad = dataclasses.replace(good, loss_weights_BL=np.where(good.loss_weights_BL > 0, np.nan, 0).astype(np.float32))
    once, _ = run_steps([good], train)
    skipped, history = run_steps([good, bad], train)
    assert (skipped.step, skipped.skipped_steps) == (2, 1)
    assert [bool(m["is_finite"]) for m in history] == [True, False]
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(once, name), getattr(skipped, name))
    recovered, history = run_steps([good, bad, good], train)
    assert history[-1]["is_finite"] and recovered.skipped_steps == 1


def test_state_is_the_same_on_every_mesh_and_matches_its_abstract_form():
    train, model = train_config(), model_config()
    one = partitioning.make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
    eight = partitioning.make_mesh(MeshConfig(2, 2, 1, 2))
    left, right = (init_state(model, train, mesh, frozen()) for mesh in (one, eight))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))
    abstract = abstract_state(model, train, eight, frozen())
    for have, want in zip(jax.tree.leaves(right), jax.tree.leaves(abstract), strict=True):
        assert (have.shape, have.dtype, have.sharding.spec) == (want.shape, want.dtype, want.sharding.spec)
    assert right.opt_state[0].mu["layers"]["mlp"]["up"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")


def test_layers_that_train_one_by_one_begin_as_a_scan():
    """Which compiles far faster, and draws the same numbers."""
    model = model_config(num_layers=3)

    def program(model: ModelConfig) -> str:
        return str(jax.make_jaxpr(lambda: partitioning.unbox(_boxed_state(model, train_config(), frozen())))())

    assert program(model) == program(dataclasses.replace(model, scan_layers=False))


def test_training_learns_and_reports_every_part():
    train = train_config(optimizer=dataclasses.replace(train_config().optimizer, learning_rate=3e-3))
    batch = random_batch(0)
    state, history = run_steps([batch] * 30, train)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    first = history[0]
    np.testing.assert_allclose(first["modality"].sum.sum(), first["task"].sum.sum(), rtol=1e-5)
    assert first["modality"].weight.shape == (len(Modality),) and first["task"].weight.shape == (len(Task),)
    np.testing.assert_allclose(first["weight_share"].sum(), batch.loss_weights_BL.sum(), rtol=1e-5)
    assert first["num_tokens"] == (batch.segment_ids_BL > 0).sum()
    assert first["num_pairs"] == (batch.positions_BL + 1)[batch.segment_ids_BL > 0].sum()
    averaged = optim.global_norm(jax.tree.map(np.subtract, state.ema, state.params))
    assert 0 < averaged < optim.global_norm(state.params)


def test_eval_step_agrees_with_the_metrics_of_training():
    train, model = train_config(), model_config()
    mesh = partitioning.make_mesh(MeshConfig(2, 4, 1, 1))
    batch = partitioning.put_batch(random_batch(0), mesh)
    state = init_state(model, train, mesh, frozen())
    evaluated = make_eval_step(model, train, mesh, VOCAB, frozen())(state.params, state.frozen, batch, state.step)
    _, trained = make_train_step(model, train, mesh, VOCAB, frozen())(state, batch, 1e-2)
    assert_same(jax.device_get(evaluated), {k: v for k, v in jax.device_get(trained).items() if k in evaluated})


def test_blend_goes_from_the_pre_norm_model_to_the_swin_norm_one():
    """The loss of a step with the same parameters: at first that of pre-norm, at last that of Swin-Norm."""
    mesh = partitioning.make_mesh(ONE_DEVICE, jax.devices()[:1])
    batch = partitioning.put_batch(random_batch(0), mesh)
    swin, pre = model_config(), model_config(norm_position="pre")
    blending = train_config(norm_blend_steps=4, init_from="a pre-norm run", total_steps=10)
    # Gains far from 1, so that a norm in the wrong place shows.
    start = init_state(swin, train_config(), mesh, frozen())
    start = dataclasses.replace(start, params=jax.tree.map(lambda leaf: 1.3 * leaf, start.params))

    def losses_at(model, train, *steps):
        evaluate, run = (make(model, train, mesh, VOCAB, frozen()) for make in (make_eval_step, make_train_step))
        found = []
        for step in steps:
            state = jax.tree.map(jnp.copy, dataclasses.replace(start, step=jnp.int32(step)))
            evaluated = evaluate(state.params, state.frozen, batch, state.step)
            _, metrics = run(state, batch, 1e-2)
            assert_same(evaluated["next_token"], metrics["next_token"])
            found.append(float(metrics["loss"]))
        return found

    (begins,), (ends,) = losses_at(pre, train_config(), 0), losses_at(swin, train_config(), 0)
    assert abs(begins - ends) > 1e-2
    first, between, last, later = losses_at(swin, blending, 0, 2, 4, 9)
    # Equal but for the order in which XLA adds.
    np.testing.assert_allclose([first, last, later], [begins, ends, ends], rtol=1e-6)
    assert min(abs(between - begins), abs(between - ends)) > 1e-3


def test_blend_into_pre_norm_is_refused():
    mesh = partitioning.make_mesh(ONE_DEVICE, jax.devices()[:1])
    train = train_config(norm_blend_steps=4, init_from="a run", total_steps=10)
    with pytest.raises(ValueError, match="norm_blend_steps = 4 turns .*has norm_position = 'pre'"):
        make_train_step(model_config(norm_position="pre"), train, mesh, VOCAB, frozen())


@pytest.mark.parametrize("name", ["lion", "adafactor", "muon"])
def test_other_optimizers_train_sharded(name):
    optimizer = dataclasses.replace(train_config().optimizer, name=name, learning_rate=1e-3, ema_decay=0.0)
    train, model = train_config(optimizer=optimizer), model_config()
    mesh = partitioning.make_mesh(MeshConfig(1, 4, 1, 2))
    step = make_train_step(model, train, mesh, VOCAB, frozen())
    state = init_state(model, train, mesh, frozen())
    losses = []
    for _ in range(10):
        state, metrics = step(state, partitioning.put_batch(random_batch(0), mesh), 1e-3)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] and state.ema == {}


def image_batch(seed: int, rows: int) -> PackedBatch:
    """Rows that are nothing but uniformly random image codes: no state that predicts one can know it."""
    rng = np.random.default_rng(seed)
    stream = rng.integers(VOCAB.image.start, VOCAB.image.stop, (rows, LENGTH + 1)).astype(np.int32)
    ones = np.ones((rows, LENGTH), np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
    weights = np.full(ones.shape, 1e-6, np.float32)
    return PackedBatch(
        stream[:, :-1], stream[:, 1:], ones, positions, weights, ones * Modality.IMAGE, ones, ones.astype(bool)
    )


@pytest.mark.optimized
def test_copy_probe():
    """METHOD 8.2: only the state that has read a random code can name it; the state that predicts it cannot."""
    final = {}
    for mode in ("official", "predict"):
        optimizer = dataclasses.replace(train_config().optimizer, learning_rate=3e-3, weight_decay=0.0)
        loss = dataclasses.replace(train_config().loss, perceptual_mode=mode, perceptual_weight=10.0)
        train = train_config(loss=loss, optimizer=optimizer, global_batch_size=16)
        _, history = run_steps([image_batch(seed, 16) for seed in range(200)], train)
        tail = [m["perceptual"] for m in history[-20:]]
        final[mode] = sum(t.sum for t in tail) / sum(t.weight for t in tail)
    variance = frozen()["image_codebook"].var(axis=0).mean()
    assert final["official"] < 0.03 * variance
    assert 0.9 * variance < final["predict"] < 1.3 * variance


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gradient_accumulation_steps": 4}, "microbatches"),
        ({"global_batch_size": 6}, "multiple of 4"),
    ],
)
def test_rows_must_divide(changes, message):
    mesh = partitioning.make_mesh(MeshConfig(2, 2, 2, 1))
    with pytest.raises(ValueError, match=message):
        make_train_step(model_config(), train_config(**changes), mesh, VOCAB, frozen())


def test_alignment_needs_a_codebook():
    mesh = partitioning.make_mesh(MeshConfig(-1, 1, 1, 1))
    with pytest.raises(ValueError, match="image_codebook"):
        make_train_step(model_config(), train_config(), mesh, VOCAB)
