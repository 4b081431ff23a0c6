"""Meshes on the command line are spelled as in training configs, and errors say how."""

from __future__ import annotations

import pytest

from launch.model_flags import parse_mesh


def test_meshes():
    assert parse_mesh("") is None
    assert dict(parse_mesh("tensor=8").shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 8}
    assert dict(parse_mesh("data=2,tensor=-1").shape) == {"data": 2, "fsdp": 1, "context": 1, "tensor": 4}


@pytest.mark.parametrize(
    "text, message",
    [
        ("heads=8", "'heads=8' is not AXIS=N with one of data, fsdp, context, tensor"),
        ("tensor=all", "'tensor=all' is not AXIS=N"),
        ("8", "'8' is not AXIS=N"),
        ("tensor=3", "asks for 3 devices, this run has 8"),
    ],
)
def test_wrong_meshes_are_explained(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)
