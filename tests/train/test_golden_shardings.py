"""Where every parameter of the large models lives on three pods, as stored files a person can read.

After a wanted change of rules or shapes: python -m tests.train.test_golden_shardings
"""

from __future__ import annotations

import argparse
import difflib
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from aromni_jax import partitioning
from aromni_jax.config import TrainConfig, from_mapping
from aromni_jax.models.config import resolve_model
from aromni_jax.train.state import abstract_state
from aromni_jax.vocab import JointVocab
from launch.flags import load_config

FOLDER = pathlib.Path(__file__).parent / "golden_shardings"
PODS = {"v5e-256": 256, "v5p-128": 64, "v5p-1024": 512}
"""Layout of configs/pretrain.py -> chips: v5e:16x16, v5p:4x4x4 and v5p:8x8x8."""
CODE_WIDTH = 256
WHOLE_LIMIT_BYTES = 1 << 26


class Chip:
    """A device that is only counted."""

    platform = "tpu"
    device_kind = "a chip"
    process_index = 0

    def __init__(self, number: int) -> None:
        self.id = number


def state_of(size: str, pod: str) -> Any:
    """The abstract state of a named model on a named layout."""
    plain = load_config(argparse.Namespace(config=f"configs/pretrain.py:{size},mesh={pod}", config_overrides=[]))
    train = from_mapping(TrainConfig, plain)
    sizes = partitioning.mesh_sizes(train.mesh, PODS[pod])
    mesh = jax.sharding.Mesh(
        np.array([Chip(number) for number in range(PODS[pod])], dtype=object).reshape(sizes), partitioning.MESH_AXES
    )
    return abstract_state(resolve_model(size, JointVocab.released().size, CODE_WIDTH), train, mesh, {})


def lines_of(state: Any) -> list[str]:
    """`path  shape  spec  shape of one shard` of every parameter."""
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = "/".join(str(step.key) for step in path)
        shard = leaf.sharding.shard_shape(leaf.shape)
        spec = ", ".join("-" if axes is None else str(axes) for axes in leaf.sharding.spec)
        rows.append((name, str(list(leaf.shape)), f"({spec})", str(list(shard))))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


CASES = [(size, pod) for size in ("7b", "34b") for pod in PODS]


@pytest.mark.parametrize("size, pod", CASES)
def test_parameters_live_where_the_file_says(size, pod):
    stored = (FOLDER / f"{size}_{pod}.txt").read_text(encoding="utf-8").splitlines()
    have = lines_of(state_of(size, pod))
    changed = "\n".join(difflib.unified_diff(stored, have, f"stored {size}_{pod}.txt", "now", lineterm="", n=0))
    assert not changed, f"{changed}\nIf that is wanted, run `{__doc__.strip().splitlines()[-1].partition(': ')[2]}`"


@pytest.mark.parametrize("size, pod", CASES)
def test_no_large_array_of_the_state_is_left_whole(size, pod):
    state = state_of(size, pod)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        is_whole = leaf.sharding.shard_shape(leaf.shape) == leaf.shape
        assert not is_whole or math.prod(leaf.shape) * leaf.dtype.itemsize <= WHOLE_LIMIT_BYTES, (
            jax.tree_util.keystr(path),
            leaf,
        )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for size, pod in CASES:
        (FOLDER / f"{size}_{pod}.txt").write_text("\n".join(lines_of(state_of(size, pod))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
