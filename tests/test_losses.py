"""Sums of the objective against plain formulas; padded vocabulary rows; the two readings of alignment."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from aromni_jax import losses, partitioning
from aromni_jax.config import MeshConfig
from aromni_jax.structs import Modality, PackedBatch, Task

B, L, D, V = 2, 12, 8, 20
VALID = np.arange(V) < 17
Z_LOSS = 0.1


def batch(seed: int = 0) -> PackedBatch:
    rng = np.random.default_rng(seed)
    shape = (B, L)
    weights = (rng.random(shape) * (rng.random(shape) > 0.3)).astype(np.float32)
    return PackedBatch(
        rng.integers(0, 17, shape),
        rng.integers(0, 17, shape),
        np.ones(shape, np.int32),
        np.arange(L)[None].repeat(B, 0),
        weights,
        rng.integers(0, len(Modality), shape),
        rng.integers(0, len(Task), shape),
        rng.random(shape) > 0.5,
    )


def tables():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32), jnp.asarray(rng.normal(size=(V, D)), jnp.float32)


def sums_of(hidden, table, of, chunk_tokens):
    return losses.next_token_loss(
        hidden, table, of, valid_mask_V=VALID, chunk_tokens=chunk_tokens, z_loss_weight=Z_LOSS
    )


def plain(hidden, table, of):
    """(objective, logits, log-partition, cross-entropy) as in a textbook."""
    logits = (hidden @ table.T)[..., :17]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    loss = log_z - jnp.take_along_axis(logits, of.targets_BL[..., None], -1)[..., 0]
    return (of.loss_weights_BL * (loss + Z_LOSS * log_z**2)).sum(), logits, log_z, loss


@pytest.fixture(params=["", "NVIDIA H200"])
def device_kind(request, monkeypatch):
    """As traced for a CPU and for a GPU, which takes all chunks."""
    monkeypatch.setattr(losses, "device_kind", lambda: request.param)
    return request.param


@pytest.mark.parametrize("chunk_tokens", [1, 5, 8, 10_000])
def test_sums_equal_the_plain_formula_for_any_chunk(chunk_tokens, device_kind):
    hidden, table = tables()
    b = batch()
    sums = sums_of(hidden, table, b, chunk_tokens)
    objective, logits, log_z, loss = plain(hidden, table, b)
    counts = b.loss_weights_BL > 0
    np.testing.assert_allclose(sums.objective, objective, rtol=1e-5)
    np.testing.assert_allclose(sums.total.sum, (loss * b.loss_weights_BL).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.z_loss.sum, (log_z**2 * b.loss_weights_BL).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.total.weight, b.loss_weights_BL.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.correct.sum.sum(), ((logits.argmax(-1) == b.targets_BL) & counts).sum())
    for modality in Modality:
        chosen = counts & (b.modality_BL == modality)
        np.testing.assert_allclose(sums.modality.sum[modality], loss[chosen].sum(), rtol=1e-5)
        assert sums.modality.weight[modality] == chosen.sum()
    for task in Task:
        np.testing.assert_allclose(sums.task.sum[task], loss[counts & (b.task_BL == task)].sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 12, 10_000])
def test_gradients_taken_with_the_loss_are_those_of_the_plain_formula(chunk_tokens, device_kind):
    def objective(hidden, table):
        return 3 * sums_of(hidden, table, batch(), chunk_tokens).objective

    gradients = jax.grad(objective, (0, 1))(*tables())
    wanted = jax.grad(lambda hidden, table: 3 * plain(hidden, table, batch())[0], (0, 1))(*tables())
    for left, right in zip(wanted, gradients, strict=True):
        np.testing.assert_allclose(right, left, rtol=1e-5, atol=1e-5)


def test_nothing_is_computed_for_chunks_without_a_target_that_counts():
    """States that would spoil every sum they touch; 24 targets, of which 4 count, in chunks of 4."""
    hidden, table = tables()
    b = batch()
    weights = np.zeros((B, L), np.float32)
    weights[[0, 0, 1, 1], [3, 7, 0, 11]] = 1, 2, 3, 4
    b = dataclasses.replace(b, loss_weights_BL=weights)
    spoilt = jnp.where(weights[..., None] > 0, hidden, jnp.nan)
    compute = jax.value_and_grad(lambda *inputs: sums_of(*inputs, b, 4).objective, (0, 1))
    value, (d_hidden, d_table) = compute(spoilt, table)
    wanted, (d_hidden_wanted, d_table_wanted) = compute(hidden, table)
    assert np.isfinite(value) and value == wanted
    np.testing.assert_array_equal(d_hidden, d_hidden_wanted)
    np.testing.assert_array_equal(d_table, d_table_wanted)
    assert not np.any(np.asarray(d_hidden)[weights == 0])


def test_no_gpu_waits_for_the_host_to_count_chunks(device_kind):
    """A loop whose length is data is one that a GPU leaves to ask the host."""
    traced = jax.make_jaxpr(jax.grad(lambda *inputs: sums_of(*inputs, batch(), 4).objective, (0, 1)))(*tables())
    assert ("while[" in str(traced)) == (device_kind == "")


def test_a_batch_without_targets_has_no_loss_and_no_gradient(device_kind):
    b = dataclasses.replace(batch(), loss_weights_BL=np.zeros((B, L), np.float32))
    value, gradients = jax.value_and_grad(lambda *inputs: sums_of(*inputs, b, 5).objective, (0, 1))(*tables())
    assert value == 0 and not any(np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize("chunk_tokens", [3, 10_000])
@pytest.mark.parametrize("mesh", [dict(tensor=4), dict(fsdp=2, tensor=2, context=2), dict(data=2, fsdp=4)])
def test_a_vocabulary_split_over_devices_changes_nothing(mesh, chunk_tokens):
    """To 1e-5 as on one device, sums and gradients, where devices hold parts of the table, of the batch, or of both."""
    sizes = dict(data=1, fsdp=1, context=1, tensor=1) | mesh
    made = partitioning.make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])
    rng = np.random.default_rng(1)
    hidden, table = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8, L, D), (V, D)))
    large = jax.tree.map(lambda x: np.concatenate([x] * 4), batch())

    def objective(hidden, table):
        sums = sums_of(hidden, table, large, chunk_tokens)
        return sums.objective, sums

    compute = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    placed = jax.jit(
        partitioning.on_mesh(compute, made),
        in_shardings=tuple(
            NamedSharding(made, partitioning.spec(names)) for names in (("batch", "length", None), ("vocab", "embed"))
        ),
    )
    for left, right in zip(
        jax.tree.leaves(compute(hidden, table)), jax.tree.leaves(placed(hidden, table)), strict=True
    ):
        np.testing.assert_allclose(right, left, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [3, 10_000])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_bfloat16_stays_close_to_float32(num_devices, chunk_tokens):
    """From the same bfloat16 values: losses to 1e-5, gradients (kept in bfloat16) within 1 % of the largest. Two
    devices go through blocks of the vocabulary, or take all of it at once."""
    hidden, table = (x.astype(jnp.bfloat16) for x in tables())
    mesh = partitioning.make_mesh(MeshConfig(1, num_devices, 1, 1), jax.devices()[:num_devices])

    def objective(hidden, table):
        return sums_of(hidden, table, batch(), chunk_tokens).objective

    compute = jax.value_and_grad(objective, argnums=(0, 1))
    value, gradients = jax.jit(partitioning.on_mesh(compute, mesh))(hidden, table)
    wanted, exact = compute(hidden.astype(jnp.float32), table.astype(jnp.float32))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for have, want in zip(gradients, exact, strict=True):
        assert have.dtype == jnp.bfloat16
        np.testing.assert_allclose(have.astype(jnp.float32), want, rtol=0, atol=0.01 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("chunk_tokens", [8, 24])
def test_padded_vocabulary_rows_get_no_probability_and_no_gradient(chunk_tokens):
    hidden, table = tables()

    def total(table, hidden):
        return sums_of(hidden, table, batch(), chunk_tokens).objective

    value, gradient = jax.value_and_grad(total)(table, hidden)
    assert not np.any(np.asarray(gradient)[~VALID]) and np.all(np.any(np.asarray(gradient)[VALID], axis=1))
    loud = table.at[~VALID].set(1e3)
    np.testing.assert_allclose(total(loud, hidden), value, rtol=1e-6)


def test_alignment_reads_the_worked_example_of_its_docstring():
    start, codebook = 10, np.eye(4, dtype=np.float32)
    inputs, targets = np.array([[3, 11, 12, 13, 4]]), np.array([[11, 12, 13, 4, 2]])
    mask = np.array([[True, True, True, False, False]])
    ones = np.ones((1, 5), np.int32)
    b = PackedBatch(inputs, targets, ones, ones, ones, ones, ones, mask)
    for mode, states in (("predict", [1, 2, 3, 0, 0]), ("official", [0, 1, 2, 3, 0])):
        projected = jnp.asarray(codebook)[np.array([states])]
        loss = losses.perceptual_loss(projected, b, codebook, image_start=start, mode=mode)
        assert (float(loss.sum), float(loss.weight)) == (0.0, 3.0)
        shifted = losses.perceptual_loss(jnp.roll(projected, 1, 1), b, codebook, image_start=start, mode=mode)
        assert shifted.sum > 0


def test_official_alignment_does_not_cross_a_document_border():
    b = batch()
    segments = np.repeat([[1, 2]], B, 0).repeat(L // 2, 1)
    b = PackedBatch(
        b.inputs_BL, b.targets_BL, segments, b.positions_BL, *[b.loss_weights_BL] * 3, np.ones((B, L), bool)
    )
    mask = losses.perceptual_mask(b, "official")
    assert not mask[:, 0].any() and not mask[:, L // 2].any() and mask.sum() == B * (L - 2)
