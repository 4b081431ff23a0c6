"""Training a codec against a discriminator: hinge losses, the adaptive weight between them, and one step of the latter.

Source: Esser et al. 2021, "Taming Transformers", equation 7; hinge losses of Lim and Ye 2017.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aromni_jax.arrays import FloatArray, PyTree

_LARGEST_WEIGHT = 1e4


@dataclasses.dataclass(frozen=True)
class AdversarialRecipe:
    """Training against a discriminator (hinge loss), from the step `start_fraction` of the run onwards.

    The generator's loss counts `weight` times the ratio of two gradients at the decoder's last layer, that of the
    reconstruction over its own. `gradient_penalty` is R1's gamma (Mescheder et al. 2018), 0 for none, as published.
    """

    start_fraction: float
    weight: float
    learning_rate: float
    gradient_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.start_fraction <= 1:
            raise ValueError(f"start_fraction {self.start_fraction} must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A discriminator (a Linen module that gives scores), its recipe, and the path of the codec's last layer."""

    net: Any
    recipe: AdversarialRecipe
    last_layer: tuple[str, ...]


def initial_state(adversary: Adversary, rng: jax.Array, example: FloatArray) -> PyTree:
    """{"params", "opt_state"} of a discriminator that has seen nothing."""
    params = adversary.net.init(rng, example)["params"]
    return {"params": params, "opt_state": _optimizer(adversary.recipe).init(params)}


def generator_loss(
    adversary: Adversary,
    discriminator: PyTree,
    decoded: FloatArray,
    decode: Callable[[PyTree], FloatArray],
    params: PyTree,
    reconstruction_loss: Callable[[FloatArray], FloatArray],
) -> tuple[FloatArray, FloatArray]:
    """(hinge loss of the codec, its weight); no gradient flows through the weight.

    Args:
      decoded: what the codec made, with gradient.
      decode: parameters of the codec to `decoded`; asked again for the gradients at the last layer alone.
    """

    def score(made: FloatArray) -> FloatArray:
        return -jnp.mean(adversary.net.apply({"params": discriminator}, made))

    params = jax.lax.stop_gradient(params)
    made, pull = jax.vjp(
        lambda kernel: decode(_with_leaf(params, adversary.last_layer, kernel)), _leaf(params, adversary.last_layer)
    )
    made = jax.lax.stop_gradient(made)
    of_reconstruction, of_score = (optax.tree.norm(pull(jax.grad(part)(made))) for part in (reconstruction_loss, score))
    ratio = jnp.clip(of_reconstruction / (of_score + 1e-4), 0.0, _LARGEST_WEIGHT)
    return score(decoded), adversary.recipe.weight * jax.lax.stop_gradient(ratio)


def discriminator_step(
    adversary: Adversary, state: PyTree, real: FloatArray, made: FloatArray
) -> tuple[PyTree, dict[str, FloatArray]]:
    """The state after one step on `real` and `made`, and what the discriminator thinks of both."""
    made = jax.lax.stop_gradient(made)

    def objective(params: PyTree) -> tuple[FloatArray, dict[str, FloatArray]]:
        def scores(x: FloatArray) -> FloatArray:
            return adversary.net.apply({"params": params}, x)

        of_real, of_made = scores(real), scores(made)
        total = 0.5 * (jnp.mean(jax.nn.relu(1 - of_real)) + jnp.mean(jax.nn.relu(1 + of_made)))
        metrics = {"discriminator": total, "score_real": jnp.mean(of_real), "score_made": jnp.mean(of_made)}
        if adversary.recipe.gradient_penalty:
            slope = jax.grad(lambda x: jnp.sum(scores(x)))(real)
            squared = jnp.sum(jnp.square(slope), axis=tuple(range(1, slope.ndim)))
            total += 0.5 * adversary.recipe.gradient_penalty * jnp.mean(squared)
        return total, metrics

    grads, metrics = jax.grad(objective, has_aux=True)(state["params"])
    updates, opt_state = _optimizer(adversary.recipe).update(grads, state["opt_state"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, metrics


def _optimizer(recipe: AdversarialRecipe) -> optax.GradientTransformation:
    return optax.adam(recipe.learning_rate, b1=0.5, b2=0.9)


def _leaf(tree: PyTree, path: tuple[str, ...]) -> Any:
    return _leaf(tree[path[0]], path[1:]) if path else tree


def _with_leaf(tree: PyTree, path: tuple[str, ...], leaf: Any) -> PyTree:
    return {**tree, path[0]: _with_leaf(tree[path[0]], path[1:], leaf)} if path else leaf
