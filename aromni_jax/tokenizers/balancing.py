"""Training sound codecs against a discriminator with balanced losses: weights say what share of the gradient is whose.

The gradient of every loss is taken at the decoder's output, brought to its weight's share by a moving average of its
norm, and only their sum goes back through the codec; so no weight depends on the scale of a loss. Source: Défossez et
al. 2022, "High Fidelity Neural Audio Compression", equations 4 (features), 5 (hinge) and 6 (balancer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aromni_jax.arrays import FloatArray, PyTree
from aromni_jax.tokenizers.adversarial import discriminator_optimizer


@dataclasses.dataclass(frozen=True)
class BalanceRecipe:
    """Shares of the gradient at the decoder's output, and how the discriminator learns.

    Before `start_fraction` of the run only waveform and mel count. `decay` is that of the norms' moving averages;
    `update_probability` is the share of steps in which the discriminator learns. Published for 24 kHz: the defaults.
    """

    learning_rate: float
    start_fraction: float = 0.0
    waveform_weight: float = 0.1
    mel_weight: float = 1.0
    generator_weight: float = 3.0
    feature_weight: float = 3.0
    decay: float = 0.999
    update_probability: float = 2 / 3

    def __post_init__(self) -> None:
        for name in ("start_fraction", "update_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must lie in [0, 1]")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay {self.decay} must lie in [0, 1)")
        if min(self.weights.values()) < 0 or not self.waveform_weight + self.mel_weight:
            raise ValueError(f"weights {self.weights} must be at least 0, and that of waveform or mel above")

    @property
    def weights(self) -> dict[str, float]:
        """Loss -> weight."""
        return {
            "waveform": self.waveform_weight,
            "mel": self.mel_weight,
            "generator": self.generator_weight,
            "features": self.feature_weight,
        }


@dataclasses.dataclass(frozen=True)
class BalancedCriterion:
    """What sound codecs are trained towards (see `training.Criterion`).

    `losses` are "waveform" and "mel", each (reconstruction, target) -> scalar; `discriminator` is a Linen module that
    returns scores and features as `StftDiscriminator` does. The state is "params" and "opt_state" of the discriminator
    and "norms": by loss, the moving average of its gradient's norm as (sum, weight).
    """

    losses: Mapping[str, Callable[[FloatArray, FloatArray], FloatArray]]
    discriminator: Any
    recipe: BalanceRecipe

    @property
    def start_fraction(self) -> float:
        return self.recipe.start_fraction

    def initial_state(self, rng: jax.Array, example: FloatArray) -> PyTree:
        """The state of a discriminator that has seen nothing, and no norms."""
        params = self.discriminator.init(rng, example)["params"]
        opt_state = discriminator_optimizer(self.recipe.learning_rate).init(params)
        return {"params": params, "opt_state": opt_state, "norms": {name: jnp.zeros(2) for name in self.recipe.weights}}

    def codec_loss(
        self,
        state: PyTree,
        decoded: FloatArray,
        target: FloatArray,
        decode: Callable[[PyTree], FloatArray],
        params: PyTree,
        against: bool,
    ) -> tuple[FloatArray, dict[str, FloatArray], PyTree]:
        """(sum of weighted losses, whose gradient is the balanced one; each loss; state with newer norms)."""
        made = jax.lax.stop_gradient(decoded)
        found = {name: jax.value_and_grad(loss)(made, target) for name, loss in self.losses.items()}
        if against:
            values, pull = jax.vjp(lambda x: self._opposed(state["params"], x, target), made)
            for name, value, pulled in zip(("generator", "features"), values, ((1.0, 0.0), (0.0, 1.0))):
                (gradient,) = pull(tuple(map(jnp.float32, pulled)))
                found[name] = (value, gradient)
        norms = {name: self._averaged(state["norms"][name], gradient) for name, (_, gradient) in found.items()}
        weights = {name: self.recipe.weights[name] for name in found}
        whole = sum(weights.values())
        direction = sum(
            weights[name] / whole * gradient * norms[name][1] / (norms[name][0] + 1e-12)
            for name, (_, gradient) in found.items()
        )
        value = sum(weights[name] * value for name, (value, _) in found.items())
        surrogate = jnp.sum(decoded * jax.lax.stop_gradient(direction))
        total = jax.lax.stop_gradient(value - surrogate) + surrogate
        metrics = {name: value for name, (value, _) in found.items()}
        return total, metrics, jax.lax.stop_gradient(state | {"norms": state["norms"] | norms})

    def learn(
        self, state: PyTree, target: FloatArray, decoded: FloatArray, rng: jax.Array, against: bool
    ) -> tuple[PyTree, dict[str, FloatArray]]:
        """The state after the discriminator's step, where one is due, and what it thought of both before."""
        if not against:
            return state, {}
        made = jax.lax.stop_gradient(decoded)

        def hinge(params: PyTree) -> tuple[FloatArray, dict[str, FloatArray]]:
            of_real, of_made = ([score for score, _ in self._judged(params, x)] for x in (target, made))
            total = sum(
                jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))
                for real, fake in zip(of_real, of_made)
            )
            real, fake = (sum(map(jnp.mean, scores)) / len(scores) for scores in (of_real, of_made))
            return total / len(of_real), {"score_real": real, "score_made": fake}

        def step() -> tuple[PyTree, PyTree]:
            grads, _ = jax.grad(hinge, has_aux=True)(state["params"])
            optimizer = discriminator_optimizer(self.recipe.learning_rate)
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            return optax.apply_updates(state["params"], updates), opt_state

        loss, scores = hinge(state["params"])
        if self.recipe.update_probability == 1:
            params, opt_state = step()  # convolutions inside a conditional take twice as long on CPU
        else:
            due = jax.random.bernoulli(rng, self.recipe.update_probability)
            params, opt_state = jax.lax.cond(due, step, lambda: (state["params"], state["opt_state"]))
        return state | {"params": params, "opt_state": opt_state}, {"discriminator": loss, **scores}

    def _judged(self, params: PyTree, waveform_BT: FloatArray) -> list[tuple[FloatArray, list[FloatArray]]]:
        judged: list[tuple[FloatArray, list[FloatArray]]] = self.discriminator.apply({"params": params}, waveform_BT)
        return judged

    def _opposed(self, params: PyTree, made: FloatArray, target: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(hinge loss of the codec, distance of features relative to their size on the target)."""
        of_real, of_made = self._judged(params, target), self._judged(params, made)
        hinge = sum(jnp.mean(jax.nn.relu(1 - score)) for score, _ in of_made) / len(of_made)
        distances = [
            jnp.mean(jnp.abs(real - fake)) / (jnp.mean(jnp.abs(real)) + 1e-6)
            for (_, reals), (_, fakes) in zip(of_real, of_made)
            for real, fake in zip(reals, fakes)
        ]
        return jnp.asarray(hinge), jnp.mean(jnp.stack(distances))

    def _averaged(self, norm: FloatArray, gradient: FloatArray) -> FloatArray:
        decay = self.recipe.decay
        # Per item of the batch, as released: how this weighs against the commitment depends on it.
        items = gradient.reshape(gradient.shape[0], -1)
        newest = jnp.mean(jnp.sqrt(jnp.sum(jnp.square(items), axis=1)))
        return decay * norm + (1 - decay) * jnp.stack([newest, jnp.float32(1)])
