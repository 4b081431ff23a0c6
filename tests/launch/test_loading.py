"""An export and the workdir it came from are the same model, whatever the mesh and the type of the weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from aromni_jax.config import MeshConfig
from aromni_jax.partitioning import make_mesh
from launch.export import export_workdir
from launch.loading import _from_export, _from_workdir
from tests.launch.test_export_import import make_workdir


@pytest.mark.parametrize("weights", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("sizes", [None, MeshConfig(2, 2, 1, 2)], ids=["one device", "eight devices"])
def test_weights_are_the_same_from_both(tmp_path, sizes, weights):
    make_workdir(tmp_path / "run")
    export_workdir(tmp_path / "run", tmp_path / "out", dtype="float32")
    mesh = sizes and make_mesh(sizes)
    of_run, step, *_ = _from_workdir(tmp_path / "run", "", mesh, weights)
    of_export, exported_step, *_ = _from_export(tmp_path / "out", "", mesh, weights)
    assert step == exported_step == 5 and of_run.config.dtype == of_export.config.dtype
    assert of_run.mesh == of_export.mesh == mesh
    assert jax.tree.structure(of_run.params) == jax.tree.structure(of_export.params)
    for left, right in zip(jax.tree.leaves(of_run.params), jax.tree.leaves(of_export.params), strict=True):
        assert left.dtype == right.dtype and (mesh is None or left.sharding == right.sharding)
        np.testing.assert_array_equal(left, right)
