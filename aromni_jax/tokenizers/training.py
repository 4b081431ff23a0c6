"""Training of a codec: any encoder and decoder around one codebook, on batches made by a pure function of the step.

The same trainer serves pictures and speech; they bring a net, a batch function and a reconstruction loss. It can be
interrupted anywhere: its whole state is one file, and the steps after a restart are the ones that would have been.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aromni_jax.arrays import FloatArray, PyTree
from aromni_jax.tokenizers import storage
from aromni_jax.tokenizers.nets import quantize

Progress = Callable[[dict[str, Any]], None]
"""Receives {"step", "total_steps", "loss", ...} now and then; what it raises stops the training."""
Loss = Callable[[FloatArray, FloatArray], tuple[FloatArray, dict[str, FloatArray]]]
"""(reconstruction, target) -> (loss, named metrics)."""

_SAVE_EVERY_SECONDS = 30.0
_KMEANS_BATCHES = 8


class CodecNet(Protocol):
    """A Linen module with the methods `encode` (to latents [..., E]) and `decode` (from them)."""

    def init(self, *args: Any, **kwargs: Any) -> Any: ...

    def apply(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class CodecRecipe:
    """How a codec is trained.

    For the first `continuous_fraction` of the steps latents pass unquantized; then the codebook starts from k-means
    over `_KMEANS_BATCHES` batches, and every `revive_every_steps` codes used less than `revive_below` times the
    average start anew, until the last fifth of the run. The learning rate warms up and falls to zero by a cosine.
    """

    total_steps: int
    batch_size: int
    learning_rate: float
    warmup_fraction: float
    continuous_fraction: float
    commitment_weight: float
    codebook_decay: float
    revive_every_steps: int
    revive_below: float
    clip_norm: float
    log_every_steps: int

    def __post_init__(self) -> None:
        if self.total_steps < 1 or self.batch_size < 1:
            raise ValueError(f"total_steps {self.total_steps} and batch_size {self.batch_size} must be at least 1")
        if not (0 <= self.warmup_fraction < 1 and 0 <= self.continuous_fraction < 1):
            raise ValueError("warmup_fraction and continuous_fraction must lie in [0, 1)")

    @property
    def continuous_steps(self) -> int:
        return int(self.total_steps * self.continuous_fraction)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodecState:
    """Everything that changes during training."""

    step: Any
    params: PyTree
    opt_state: PyTree
    codebook: quantize.Codebook


def train_codec(
    net: CodecNet,
    batch_at: Callable[[np.random.Generator], np.ndarray],
    loss: Loss,
    recipe: CodecRecipe,
    *,
    num_codes: int,
    code_dim: int,
    seed: int,
    workdir: str | Path,
    identity: str,
    progress: Progress,
) -> tuple[PyTree, np.ndarray]:
    """Trains `net` and a codebook; returns (parameters, embedding_CE).

    Args:
      batch_at: makes one batch from a random generator that depends on (seed, step) only.
      workdir: holds `training.safetensors`, from which an interrupted training goes on.
      identity: describes net, recipe and data; a state in `workdir` made with another one is refused.

    Raises:
      ValueError: `workdir` holds the state of another training, or the loss is no longer finite.
    """
    warmup_steps = int(recipe.total_steps * recipe.warmup_fraction)
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, warmup_steps, recipe.total_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(recipe.clip_norm), optax.adam(schedule, b1=0.9, b2=0.99))

    def batch(step: int) -> np.ndarray:
        return batch_at(np.random.default_rng((seed, step)))

    @jax.jit
    def start(rng: jax.Array, first_batch: FloatArray) -> CodecState:
        params = net.init(rng, first_batch)["params"]
        codebook = quantize.empty_codebook(num_codes, code_dim)
        return CodecState(jnp.int32(0), params, optimizer.init(params), codebook)

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: CodecState, target: FloatArray) -> tuple[CodecState, dict[str, FloatArray]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        quantized = state.step >= recipe.continuous_steps

        def objective(params: PyTree) -> tuple[FloatArray, Any]:
            latents = quantize.normalize(net.apply({"params": params}, target, method="encode"))
            codes = quantize.nearest_codes(state.codebook.embedding_CE, jax.lax.stop_gradient(latents))
            chosen = state.codebook.embedding_CE[codes]
            straight_through = latents + jax.lax.stop_gradient(chosen - latents)
            decoded = net.apply({"params": params}, jnp.where(quantized, straight_through, latents), method="decode")
            total, metrics = loss(decoded, target)
            commitment = jnp.mean(jnp.square(latents - jax.lax.stop_gradient(chosen)))
            total += recipe.commitment_weight * jnp.where(quantized, commitment, 0.0)
            metrics |= {"loss": total, "perplexity": quantize.perplexity(codes, num_codes), "commitment": commitment}
            return total, (metrics, latents.reshape(-1, code_dim), codes.reshape(-1))

        grads, (metrics, latents_XE, codes_X) = jax.grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        moved = quantize.update(state.codebook, latents_XE, codes_X, recipe.codebook_decay)
        revives = quantized & (state.step % recipe.revive_every_steps == 0) & (state.step < 0.8 * recipe.total_steps)
        moved = jax.lax.cond(
            revives, lambda: quantize.revive(moved, latents_XE, rng, recipe.revive_below), lambda: moved
        )
        codebook = jax.tree.map(partial(jnp.where, quantized), moved, state.codebook)
        return CodecState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, codebook), metrics

    @jax.jit
    def latents_of(params: PyTree, target: FloatArray) -> FloatArray:
        return quantize.normalize(net.apply({"params": params}, target, method="encode")).reshape(-1, code_dim)

    path = Path(workdir) / "training.safetensors"
    # The hardware generator: drawing with threefry would take longer to compile than the train step.
    beginning = (jax.random.key(seed, impl="rbg"), batch(0))
    if path.exists():
        state = storage.load_tree(path, like=jax.eval_shape(start, *beginning), identity=identity)
    else:
        state = start(*beginning)
    last_save = time.monotonic()
    for step in range(int(state.step), recipe.total_steps):
        if step == recipe.continuous_steps:
            # Batches of this and later steps: a restart at this very step makes the same codebook.
            batches = [latents_of(state.params, batch(step + i)) for i in range(_KMEANS_BATCHES)]
            per_step = jnp.float32(batches[0].shape[0])
            codebook = quantize.kmeans_codebook(jax.random.key(seed), jnp.concatenate(batches), per_step, num_codes)
            state = dataclasses.replace(state, codebook=codebook)
        state, metrics = train_step(state, batch(step))
        done = step + 1
        if done % recipe.log_every_steps == 0 or done == recipe.total_steps:
            values = {name: float(value) for name, value in metrics.items()}
            if not np.isfinite(values["loss"]):
                raise ValueError(f"the tokenizer's loss is {values['loss']} at step {done}; lower learning_rate")
            progress({"step": done, "total_steps": recipe.total_steps, **values})
        if time.monotonic() - last_save > _SAVE_EVERY_SECONDS or done == recipe.total_steps:
            storage.save_tree(path, state, identity=identity)
            last_save = time.monotonic()
    return jax.device_get(state.params), np.asarray(state.codebook.embedding_CE)
