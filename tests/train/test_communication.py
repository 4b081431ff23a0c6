"""Counted communication against the collectives of the compiled step."""

from __future__ import annotations

import jax
import pytest

from aromni_jax import partitioning
from aromni_jax.config import MeshConfig
from tests.fixtures.collectives import sent_bytes
from tests.fixtures.compiled_step import lower_step
from tests.fixtures.tpu_compiler import answer_of, needs_tpu_compiler


def compare(sizes, compiled, counted, tolerance):
    for axis, size in zip(partitioning.MESH_AXES, sizes, strict=True):
        if size == 1:
            assert compiled[axis] == counted[axis] == 0
        else:
            assert counted[axis] == pytest.approx(compiled[axis], rel=tolerance), (axis, compiled, counted)


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
    mesh_config = MeshConfig(*sizes)
    lowered, mesh, counted = lower_step(mesh_config, jax.devices(), 16, remat=remat, d_model=256, mlp_dim=512)
    compare(sizes, sent_bytes(lowered.compile().as_text(), mesh), counted, 0.05)


@pytest.mark.slow
@needs_tpu_compiler
@pytest.mark.parametrize(
    "topology, sizes, width",
    [
        ("v5e:4x4", (2, 2, 2, 2), 1024),  # a device gets its part of a sum alone
        ("v5e:2x2", (1, 4, 1, 1), 1024),  # on the whole of a small slice, too
        ("v5e:2x4", (1, 8, 1, 1), 4096),  # parts of matrices go around a ring
        ("v5e:8x8", (1, 64, 1, 1), 4096),  # the whole of a large slice: sums are all-reduces
        ("v5p:4x4x4", (1, 64, 1, 1), 1024),  # in three dimensions all gathers are
    ],
)
def test_counted_bytes_are_those_of_the_step_for_tpus(topology, sizes, width):
    """Within 1 % on every axis."""
    found = answer_of("tests.fixtures.compiled_step", topology, "1", ",".join(map(str, sizes)), str(width))
    compare(sizes, found["compiled"], found["counted"], 0.01)


@pytest.mark.slow
@needs_tpu_compiler
def test_slices_send_each_other_what_was_counted():
    """Within 1 %, in a slice (two devices of data) and between two; parts of the table are narrower than a TPU pads."""
    found = answer_of("tests.fixtures.compiled_step", "v5e:4x4", "2", "4,8,1,1", "512")
    assert found["counted"]["data"] == pytest.approx(found["compiled"]["data"], rel=0.01)
