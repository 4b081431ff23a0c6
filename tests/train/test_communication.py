"""Counted communication against the collectives of the compiled step."""

from __future__ import annotations

import argparse
import dataclasses

import jax
import pytest

from aromni_jax import partitioning
from aromni_jax.config import MeshConfig, TrainConfig, from_mapping
from aromni_jax.models.config import resolve_model
from aromni_jax.train import estimate
from aromni_jax.train.communication import communication_bytes
from aromni_jax.train.state import abstract_state
from aromni_jax.train.step import make_train_step
from aromni_jax.vocab import JointVocab
from launch.flags import load_config
from tests.fixtures.collectives import sent_bytes

VOCAB = JointVocab.released()


def compiled_and_counted(sizes, remat):
    """Bytes per axis of the compiled step of a small decoder, and as counted."""
    plain = load_config(argparse.Namespace(config="configs/pretrain.py:debug", config_overrides=[]))
    train = from_mapping(TrainConfig, plain)
    train = dataclasses.replace(
        train,
        mesh=MeshConfig(*sizes),
        global_batch_size=16,
        sequence_length=256,
        loss=dataclasses.replace(train.loss, perceptual_weight=0.0, chunk_tokens=128),
    )
    model = resolve_model("debug", VOCAB.size, 0)
    model = dataclasses.replace(model, remat=remat, num_layers=3, d_model=256, mlp_dim=512)
    mesh = partitioning.make_mesh(train.mesh, jax.devices())
    step = make_train_step(model, train, mesh, VOCAB, {})
    compiled = step.lower(abstract_state(model, train, mesh, {}), estimate.abstract_batch(train, mesh)).compile()
    return sent_bytes(compiled.as_text(), mesh), communication_bytes(model, train, mesh.shape)


@pytest.mark.parametrize(
    "sizes, remat",
    [
        ((1, 8, 1, 1), "full"),
        ((2, 2, 1, 2), "full"),
        ((1, 2, 2, 2), "none"),
        ((2, 2, 2, 1), "dots"),
    ],
)
def test_counted_bytes_are_those_of_the_compiled_step(sizes, remat):
    """Within 5 % on every axis that the mesh has, none where it has one device. XLA for CPUs, float32."""
    compiled, counted = compiled_and_counted(sizes, remat)
    for axis, size in zip(partitioning.MESH_AXES, sizes, strict=True):
        if size == 1:
            assert compiled[axis] == counted[axis] == 0
        else:
            assert counted[axis] == pytest.approx(compiled[axis], rel=0.05), (axis, compiled, counted)
