"""Schedules, optimizers by name, decay masks that must cover every parameter, clipping and the moving average.

An optimizer here yields a direction; the step scales it by the learning rate of its own step count, so the rate is
known before the update, can be logged, and is not hidden in optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from aromni_jax.arrays import PyTree
from aromni_jax.config import OptimizerConfig

LAYER_MATRICES = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
DECAYED = LAYER_MATRICES | {"unembedding", "kernel"}
UNDECAYED = frozenset({"embedding", "scale", "bias"})

MUON_MATRICES: dict[str, MuonDimensionNumbers] = {
    "q": MuonDimensionNumbers(-3, (-2, -1)),
    "k": MuonDimensionNumbers(-3, (-2, -1)),
    "v": MuonDimensionNumbers(-3, (-2, -1)),
    "o": MuonDimensionNumbers((-3, -2), -1),
    "gate": MuonDimensionNumbers(-2, -1),
    "up": MuonDimensionNumbers(-2, -1),
    "down": MuonDimensionNumbers(-2, -1),
}
"""Input and output axes of the matrices that `muon` orthogonalises; everything else it leaves to Adam."""
_MUON_RMS = 0.2
"""Size of a step of Muon relative to its rate, which lets both halves share one rate. Source: arXiv 2502.16982."""


def make_schedule(config: OptimizerConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """Learning rate of a step: linear warm-up, then constant, cosine, linear, or constant with a final decay (wsd).

    Step 0 already moves (rate peak / warm-up). Decays end at `final_learning_rate_fraction` of the peak.

    Raises:
      ValueError: warm-up (and the decay of wsd) do not fit into the run, or wsd has no `decay_steps`.
    """
    warmup, decay = config.warmup_steps, config.decay_steps if config.schedule == "wsd" else 0
    if config.schedule == "wsd" and decay < 1:
        raise ValueError("optimizer.decay_steps must be at least 1 for schedule 'wsd': the length of its final decay")
    if warmup + decay > total_steps:
        raise ValueError(
            f"optimizer.warmup_steps = {warmup} and decay_steps = {decay} do not fit into total_steps = {total_steps}"
        )
    start = total_steps - decay if config.schedule == "wsd" else warmup

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step + 1 - start) / max(1, total_steps - start), 0, 1)
        if config.schedule == "constant":
            remaining = jnp.ones(())
        elif config.schedule == "cosine":
            remaining = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        else:
            remaining = 1 - progress
        final = config.final_learning_rate_fraction
        ramp = jnp.minimum(1.0, (step + 1) / max(1, warmup))
        return config.learning_rate * ramp * (final + (1 - final) * remaining)

    return schedule


def decay_mask(params: PyTree) -> PyTree:
    """True for the matrices that weight decay shrinks, False for embeddings, gains and biases.

    Raises:
      ValueError: a parameter that is in neither list, with its path: nothing is decayed or spared by accident.
    """

    def decide(path: tuple[Any, ...], _: Any) -> bool:
        name = parameter_name(path)
        if name not in DECAYED | UNDECAYED:
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path)} has no weight-decay rule; "
                f"add {name!r} to optim.DECAYED or UNDECAYED"
            )
        return name in DECAYED

    return jax.tree_util.tree_map_with_path(decide, params)


def parameter_name(path: tuple[Any, ...]) -> str:
    """The last key of a parameter's path, such as "q"."""
    # Parameters boxed with logical names have one more step in their path, which is no dictionary key.
    return next(str(step.key) for step in reversed(path) if isinstance(step, jax.tree_util.DictKey))


def muon_axes(params: PyTree) -> PyTree:
    """`MUON_MATRICES` for every leaf of `params`, None for those that Adam moves."""
    return jax.tree_util.tree_map_with_path(lambda path, _: MUON_MATRICES.get(parameter_name(path)), params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The direction of `config.name` with decoupled weight decay, to be scaled by minus the learning rate.

    `muon` orthogonalises the momentum (decay 0.95) of the layers' matrices and moves the rest by Nesterov Adam.

    `moment_dtype` is the type of first moments; second moments stay float32 (bfloat16 would lose their slow growth).
    """
    dtype = jnp.dtype(config.moment_dtype)
    if config.name == "adamw":
        direction = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=dtype)
    elif config.name == "lion":
        direction = optax.scale_by_lion(config.b1, config.b2, mu_dtype=dtype)
    elif config.name == "muon":
        direction = muon(
            learning_rate=-1.0,  # optax would flip the sign; here the step does.
            eps=config.eps,
            mu_dtype=dtype,
            adam_b1=config.b1,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=muon_axes,
            consistent_rms=_MUON_RMS,
        )
    else:
        direction = optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.ema(config.b1, accumulator_dtype=dtype)
        )
    return optax.chain(direction, optax.add_decayed_weights(config.weight_decay, mask=decay_mask))


def clip_by_norm(gradients: PyTree, norm: jax.Array, clip_norm: float) -> PyTree:
    """Scales `gradients`, whose global norm is `norm`, down to `clip_norm`; 0 leaves them alone."""
    if not clip_norm:
        return gradients
    factor = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * factor, gradients)


def update_average(average: PyTree, params: PyTree, decay: float) -> PyTree:
    """The exponential moving average, in the type of `average`; {} where none is kept stays {}."""
    if not average:
        return average
    return jax.tree.map(lambda a, p: (decay * a + (1 - decay) * p.astype(a.dtype)).astype(a.dtype), average, params)


def global_norm(tree: PyTree) -> jax.Array:
    """Euclidean norm over all leaves, in float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros(())))
