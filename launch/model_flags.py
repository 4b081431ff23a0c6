"""Flags of commands that ask a model: how its weights are spread over devices, and in which type they are."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from aromni_jax.inference.decode import Weights

WEIGHTS: tuple[Weights, ...] = ("float32", "bfloat16", "int8")


def add_mesh_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--mesh`; `parse_mesh` reads it."""
    parser.add_argument(
        "--mesh",
        default="",
        metavar="AXIS=N,...",
        help="spread weights and caches over all devices: sizes of data, fsdp, context and tensor as in a training "
        "config (1 where not named, -1 for the rest), such as tensor=8 or data=2,tensor=-1 (default: one device)",
    )


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--weights`, None where it is not given (`OmniModel.of`)."""
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="type of the weights; float32 and bfloat16 are also what is computed in, int8 is half of bfloat16 and "
        "computes as the model says (default: what the model computes in)",
    )


def parse_mesh(text: str) -> Mesh | None:
    """The mesh of `--mesh` over the devices of this host; None for "".

    Raises:
      ValueError: no such axis, a size that is no number, or as `partitioning.make_mesh`.
    """
    from aromni_jax.config import MeshConfig
    from aromni_jax.partitioning import MESH_AXES, make_mesh

    if not text:
        return None
    known = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes = dict.fromkeys(MESH_AXES, 1)
    for pair in text.split(","):
        axis, _, size = pair.partition("=")
        if axis not in known or not size.removeprefix("-").isdecimal():
            raise ValueError(f"--mesh={text}: {pair!r} is not AXIS=N with one of {', '.join(known)}, as in tensor=8")
        sizes[axis] = int(size)
    return make_mesh(MeshConfig(**sizes))
