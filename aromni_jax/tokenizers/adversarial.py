"""Training a codec against a discriminator: hinge losses, the adaptive weight between them, and one step of the latter.

Source: Esser et al. 2021, "Taming Transformers", equation 7; hinge losses of Lim and Ye 2017.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aromni_jax.arrays import FloatArray, PyTree

Loss = Callable[[FloatArray, FloatArray], tuple[FloatArray, dict[str, FloatArray]]]
"""(reconstruction, target) -> (loss, named metrics)."""
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


@dataclasses.dataclass(frozen=True)
class AdaptiveCriterion:
    """A reconstruction loss and, with an adversary, its score by the adaptive weight (see `training.Criterion`)."""

    loss: Loss
    adversary: Adversary | None = None

    @property
    def start_fraction(self) -> float:
        return self.adversary.recipe.start_fraction if self.adversary else 1.0

    def initial_state(self, rng: jax.Array, example: FloatArray) -> PyTree:
        """State of the discriminator; None without one."""
        return initial_state(self.adversary, rng, example) if self.adversary else None

    def codec_loss(
        self,
        state: PyTree,
        decoded: FloatArray,
        target: FloatArray,
        decode: Callable[[PyTree], FloatArray],
        params: PyTree,
        against: bool,
    ) -> tuple[FloatArray, dict[str, FloatArray], PyTree]:
        """The codec's loss and its metrics; the state stays."""
        total, metrics = self.loss(decoded, target)
        if against and self.adversary:
            reconstruction = partial(_first, self.loss, target)
            score, weight = generator_loss(self.adversary, state["params"], decoded, decode, params, reconstruction)
            total += weight * score
            metrics |= {"generator": score, "generator_weight": weight}
        return total, metrics, state

    def learn(
        self, state: PyTree, target: FloatArray, decoded: FloatArray, rng: jax.Array, against: bool
    ) -> tuple[PyTree, dict[str, FloatArray]]:
        """The state after the discriminator has seen both, and what it thinks of them."""
        if against and self.adversary:
            return discriminator_step(self.adversary, state, target, decoded)
        return state, {}


def _first(loss: Loss, target: FloatArray, made: FloatArray) -> FloatArray:
    return loss(made, target)[0]


def initial_state(adversary: Adversary, rng: jax.Array, example: FloatArray) -> PyTree:
    """{"params", "opt_state"} of a discriminator that has seen nothing."""
    params = adversary.net.init(rng, example)["params"]
    return {"params": params, "opt_state": discriminator_optimizer(adversary.recipe.learning_rate).init(params)}


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
    updates, opt_state = discriminator_optimizer(adversary.recipe.learning_rate).update(
        grads, state["opt_state"], state["params"]
    )
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, metrics


def discriminator_optimizer(learning_rate: float) -> optax.GradientTransformation:
    """Adam with little memory, as discriminators of pictures and of sound are published with."""
    return optax.adam(learning_rate, b1=0.5, b2=0.9)


def _leaf(tree: PyTree, path: tuple[str, ...]) -> Any:
    return _leaf(tree[path[0]], path[1:]) if path else tree


def _with_leaf(tree: PyTree, path: tuple[str, ...], leaf: Any) -> PyTree:
    return {**tree, path[0]: _with_leaf(tree[path[0]], path[1:], leaf)} if path else leaf
