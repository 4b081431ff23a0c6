"""Everything a run must remember between steps, made directly where it lives."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aromni_jax import optim, partitioning
from aromni_jax.arrays import PyTree
from aromni_jax.config import TrainConfig
from aromni_jax.models.config import ModelConfig
from aromni_jax.models.decoder import Decoder
from aromni_jax.train import update

Frozen = dict[str, Any]
"""Arrays that training reads and never changes: {"image_codebook": [C, E]} or {}."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step` counts batches seen, bad ones included; `skipped_steps` the bad ones.

    `params` are what the model computes with. `master` is their float32 original where `params` are bfloat16 and
    `optimizer.master_weights` asks for it, `ema` the moving average in float32; {} where none is kept.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    master: PyTree
    ema: PyTree
    rng: jax.Array
    frozen: Frozen
    skipped_steps: jax.Array


def keeps_master(model: ModelConfig, train: TrainConfig) -> bool:
    """Whether the state of this run has a float32 original of its parameters beside them."""
    return train.optimizer.master_weights and model.param_dtype != "float32"


def _boxed_state(model: ModelConfig, train: TrainConfig, frozen: Frozen) -> TrainState:
    key = jax.random.PRNGKey(train.seed)
    init_key, run_key = jax.random.split(key)
    ids_BL = jnp.zeros((1, 2), jnp.int32)
    # Drawn in float32 whatever `param_dtype` is: the rounded values of one and the same start. A scan draws the same
    # numbers as its layers one by one, which take a GPU half a minute to compile.
    decoder = Decoder(dataclasses.replace(model, param_dtype="float32", scan_layers=True))
    weights = decoder.init(init_key, ids_BL, ids_BL, ids_BL)["params"]
    # Copies, because donation forbids two leaves in one buffer.
    ema = jax.tree.map(jnp.copy, weights) if train.optimizer.ema_decay else {}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(lambda w: w.astype(model.param_dtype), weights),
        opt_state=optim.make_optimizer(train.optimizer).init(weights),
        master=weights if keeps_master(model, train) else {},
        ema=ema,
        rng=run_key,
        frozen=jax.tree.map(jnp.asarray, frozen),
        skipped_steps=jnp.zeros((), jnp.int32),
    )


def abstract_state(model: ModelConfig, train: TrainConfig, mesh: Mesh, frozen: Frozen | None = None) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s with shardings: for compiling ahead of time and for restoring.

    `frozen` may hold arrays or ShapeDtypeStructs. With `optimizer.offload`, what only the update reads is placed in
    host memory (`update.is_offloaded`).

    Raises:
      ValueError: a dimension the mesh does not divide, a large array it leaves whole, or devices without host memory.
    """
    frozen_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen or {})
    boxed = jax.eval_shape(lambda f: _boxed_state(model, train, f), frozen_shapes)
    placement = partitioning.shardings(boxed, mesh)
    shapes = partitioning.unbox(boxed)
    partitioning.check_large_arrays_are_sharded(
        (shapes.params, shapes.opt_state), (placement.params, placement.opt_state), mesh
    )
    if train.optimizer.offload:
        _check_host_memory(mesh)
        placement = jax.tree_util.tree_map_with_path(
            lambda path, s: s.with_memory_kind(update.HOST) if update.is_offloaded(path) else s, placement
        )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placement)


def _check_host_memory(mesh: Mesh) -> None:
    device = mesh.devices.flat[0]
    try:
        device.memory(update.HOST)
    except Exception as error:
        raise ValueError(
            f"optimizer.offload needs devices that reach {update.HOST} memory, and {device.device_kind} does not; set "
            "it to False"
        ) from error


def init_state(model: ModelConfig, train: TrainConfig, mesh: Mesh, frozen: Frozen | None = None) -> TrainState:
    """A fresh state, each device making only its own part; the values depend on `train.seed` and not on the mesh."""
    frozen = jax.tree.map(np.asarray, frozen or {})
    placement = state_shardings(abstract_state(model, train, mesh, frozen))
    make = jax.jit(lambda f: partitioning.unbox(_boxed_state(model, train, f)), out_shardings=placement)
    return make(frozen)


def state_shardings(abstract: TrainState) -> TrainState:
    """The NamedSharding of every leaf of an `abstract_state`."""
    return jax.tree.map(lambda x: x.sharding, abstract)
