"""Mesh sizes and their errors, rows per process, batches, and the guard against unsharded parameters."""

from __future__ import annotations

import re
import types

import jax
import numpy as np
import pytest
from flax import linen as nn

from aromni_jax import partitioning as p
from aromni_jax.config import MeshConfig


def test_minus_one_takes_what_remains():
    assert dict(p.make_mesh(MeshConfig(2, -1, 1, 2)).shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(2, 2, 1, 1), "this run has 8"),
        (MeshConfig(3, -1, 1, 1), "multiple of 3 devices"),
        (MeshConfig(-1, -1, 1, 1), "one of them may be -1"),
        (MeshConfig(0, 8, 1, 1), "at least 1"),
        (MeshConfig(8, 1, 1, 1, num_slices=3), "num_slices = 3.*set mesh.num_slices=1 and mesh.data=8"),
        (MeshConfig(8, 1, 1, 1, num_slices=2), "1 slice"),
        (MeshConfig(8, 1, 1, 1, num_slices=0), "num_slices = 0"),
    ],
)
def test_wrong_meshes_are_explained(config, message):
    with pytest.raises(ValueError, match=message):
        p.make_mesh(config)


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        (MeshConfig(1, -1, 1, 1), (2, 2)),
        (MeshConfig(4, -1, 1, 1), (2, 8)),
        (MeshConfig(-1, 1, 1, 4), (2, -1)),
        (MeshConfig(4, -1, 1, 1, num_slices=4), (2, 2)),
    ],
)
def test_slices_that_the_config_does_not_name_are_told_with_the_keys_to_set(config, keys):
    chips = [types.SimpleNamespace(platform="tpu", slice_index=i // 16) for i in range(32)]
    with pytest.raises(ValueError, match=f"form 2 slice.*set mesh.num_slices={keys[0]} and mesh.data={keys[1]}$"):
        p.make_mesh(config, chips)


def test_nodes_of_gpus_are_slices_that_need_no_mesh_of_their_own(monkeypatch):
    gpus = [types.SimpleNamespace(platform="gpu", slice_index=i // 4) for i in range(8)]
    made = []
    monkeypatch.setattr(p.mesh_utils, "create_device_mesh", lambda shape, *_, **__: made.append(shape))
    monkeypatch.setattr(p, "Mesh", lambda *_, **__: None)
    p.make_mesh(MeshConfig(1, -1, 1, 1), gpus)
    assert made == [(1, 8, 1, 1)]


def test_a_small_config_says_what_makes_it_fit_an_odd_number_of_devices():
    mesh = p.make_mesh(MeshConfig(1, -1, 1, 1), jax.devices()[:6])
    with pytest.raises(ValueError, match="--config.global_batch_size=12$"):
        p.local_rows(mesh, 8)
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((64, 4), np.float32), ("embed", "mlp"))
    with pytest.raises(ValueError, match=re.escape("mesh.fsdp=2 and mesh.data=-1")):
        p.shardings({"weight": box}, mesh)
    assert dict(p.make_mesh(MeshConfig(-1, 2, 1, 1), jax.devices()[:6]).shape)["data"] == 3


def test_rules():
    assert len(p.RULES) <= 20
    assert p.spec(("batch", "length", "vocab")) == jax.sharding.PartitionSpec(("data", "fsdp"), "context", "tensor")
    with pytest.raises(ValueError, match="unknown logical axis 'batches'"):
        p.spec(("batches",))
    with pytest.raises(ValueError, match="wanted by both 'heads' and 'mlp'"):
        p.spec(("heads", "mlp"))


def test_batches_are_placed_by_row():
    mesh = p.make_mesh(MeshConfig(2, 2, 2, 1))
    np.testing.assert_array_equal(p.local_rows(mesh, 8), np.arange(8))
    rows = np.arange(8 * 6).reshape(8, 6)
    placed = p.put_batch({"x": rows}, mesh)["x"]
    np.testing.assert_array_equal(placed, rows)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    with pytest.raises(ValueError, match="multiple of 4"):
        p.local_rows(mesh, 6)


def test_dimensions_that_do_not_divide_and_large_copies_are_named():
    mesh = p.make_mesh(MeshConfig(1, 8, 1, 1))
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((12, 4), np.float32), ("embed", "mlp"))
    with pytest.raises(ValueError, match=r"weight.*'embed' of size 12"):
        p.shardings({"weight": box}, mesh)
    large = {"weight": jax.ShapeDtypeStruct((64, 64), np.float32)}
    with pytest.raises(ValueError, match="weight.*not sharded|not sharded.*weight"):
        p.check_large_arrays_are_sharded(large, p.shardings(large, mesh), mesh, limit_bytes=1024)
