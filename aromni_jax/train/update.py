"""The second half of a step: what a gradient does to weights, optimizer and average, at once or layer by layer.

Weights move in float32, whatever type `params` has: bfloat16 keeps 8 bits of a number, and a step of less than a
256th of a weight is lost in it. `params` are what the model computes with, `master` what the optimizer moves.

What only this half reads (moments, master weights, average) may live in the memory of the host. Then the layers,
stacked on the first axis of their arrays, come to the device one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from aromni_jax import optim
from aromni_jax.arrays import PyTree

HOST = "pinned_host"
"""Memory kind of what is offloaded: pages that the devices read and write by themselves."""

_LAYERS = "layers"


class Updated(NamedTuple):
    """The parts of a TrainState that an update replaces."""

    params: PyTree
    opt_state: PyTree
    master: PyTree
    ema: PyTree


Update = Callable[[Updated, PyTree], Updated]
"""(old, float32 gradients) -> new; for a whole tree or for any of its branches."""


def make_update(
    optimizer: optax.GradientTransformation, ema_decay: float, rate: jax.Array, is_finite: jax.Array
) -> Update:
    """The update at learning rate `rate`; where not `is_finite`, it gives back what it was given."""

    def update(old: Updated, gradients: PyTree) -> Updated:
        weights = as_float32(old.master or old.params)
        direction, opt_state = optimizer.update(gradients, old.opt_state, weights)
        weights = jax.tree.map(lambda w, d: w - rate * d, weights, direction)
        new = Updated(
            params=jax.tree.map(lambda w, p: w.astype(p.dtype), weights, old.params),
            opt_state=opt_state,
            master=weights if old.master else old.master,
            ema=optim.update_average(old.ema, weights, ema_decay),
        )
        return jax.tree.map(lambda after, before: jnp.where(is_finite, after, before), new, old)

    return update


def as_float32(tree: PyTree) -> PyTree:
    """Every leaf in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def streamed(update: Update) -> Update:
    """`update` for a state of which moments, master weights and average are in host memory, where it leaves them.

    The layers pass one by one, and each is written back to the very place it came from; what belongs to no layer passes
    at once. It gives what `update` gives where the update of a parameter does not depend on other layers: with all
    optimizers here but adafactor, which chooses the axes it factors by the shape of the stack.
    """

    def run(old: Updated, gradients: PyTree) -> Updated:
        rest = _to_host(update(_to_device(_branch(old, False)), _branch(gradients, False)))
        layers, layer_gradients = _branch(old, True), _branch(gradients, True)

        def one_layer(layer: Any, layers: Updated) -> Updated:
            def take(path: Any, array: jax.Array) -> jax.Array:
                is_stacked = _is_of_parameter(path)
                return jax.lax.dynamic_index_in_dim(array, layer, 0, keepdims=False) if is_stacked else array

            def put(path: Any, array: jax.Array, new: jax.Array) -> jax.Array:
                # Counters are no layer's: every layer sees them as they were, and `rest` has them as they will be.
                is_stacked = _is_of_parameter(path)
                return jax.lax.dynamic_update_index_in_dim(array, new, layer, 0) if is_stacked else array

            with_path = jax.tree_util.tree_map_with_path
            new = update(_to_device(with_path(take, layers)), with_path(take, layer_gradients))
            return with_path(put, layers, _to_host(new))

        num_layers = jax.tree.leaves(layer_gradients)[0].shape[0]
        return _merged(old, rest, jax.lax.fori_loop(0, num_layers, one_layer, layers))

    return run


def is_offloaded(path: tuple[Any, ...]) -> bool:
    """Whether `streamed` expects this leaf of a state in host memory."""
    return path[0].name in ("opt_state", "master", "ema") and _is_of_parameter(path)


def _is_of_parameter(path: tuple[Any, ...]) -> bool:
    """Whether a leaf has the name of a parameter: counters and constants are fields of an optimizer's own tuples."""
    return isinstance(path[-1], jax.tree_util.DictKey)


def _to_device(state: Updated) -> Updated:
    return _moved(state, jax.memory.Space.Device)


def _to_host(state: Updated) -> Updated:
    return _moved(state, jax.memory.Space.Host)


def _moved(state: Updated, space: Any) -> Updated:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, space) if is_offloaded(path) else x, state
    )


def _has_layers(tree: Any) -> bool:
    return isinstance(tree, dict) and _LAYERS in tree


def _branch(tree: PyTree, is_stacked: bool) -> PyTree:
    """The layers, or all else, of every parameter-like tree in `tree`; counters are in both."""

    def select(node: Any) -> Any:
        if not _has_layers(node):
            return node
        return {name: branch for name, branch in node.items() if (name == _LAYERS) == is_stacked}

    return jax.tree.map(select, tree, is_leaf=_has_layers)


def _merged(like: PyTree, rest: PyTree, stacked: PyTree) -> PyTree:
    """Inverse of `_branch`, in the structure of `like`; counters are taken from `rest`."""
    leaves = dict(jax.tree_util.tree_leaves_with_path(stacked)) | dict(jax.tree_util.tree_leaves_with_path(rest))
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path], like)
