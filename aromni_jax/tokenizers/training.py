"""Training of a codec: any encoder and decoder around a quantizer, on batches made by a pure function of the step.

The same trainer serves pictures and speech; they bring a net, a batch function, a quantizer of one or many codebooks,
and a criterion: a reconstruction loss with or without a discriminator. It can be interrupted anywhere: its whole state
is one file, and the steps after a restart are the ones that would have been. Source: van den Oord et al. 2017 (VQ-VAE).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aromni_jax.arrays import FloatArray, PyTree
from aromni_jax.tokenizers import storage
from aromni_jax.tokenizers.nets import quantize
from aromni_jax.tokenizers.nets.quantize import Codebook, Quantized

Progress = Callable[[dict[str, Any]], None]
"""Receives {"step", "total_steps", "loss", ...} now and then; what it raises stops the training."""

_SAVE_EVERY_SECONDS = 30.0
_KMEANS_BATCHES = 8


class CodecNet(Protocol):
    """A Linen module with the methods `encode` (to latents [..., E]) and `decode` (from them)."""

    def init(self, *args: Any, **kwargs: Any) -> Any: ...

    def apply(self, *args: Any, **kwargs: Any) -> Any: ...


class Quantizer(Protocol):
    """One or many codebooks between encoder and decoder; a `Codebook` of K codebooks has K first in each array."""

    @property
    def num_codes(self) -> int: ...

    @property
    def code_dim(self) -> int: ...

    def empty(self) -> Codebook:
        """A place for the start."""

    def start(self, rng: jax.Array, samples_XE: FloatArray, count_per_step: FloatArray) -> Codebook:
        """Codebooks that stand where the samples are; `count_per_step`: latents per training step."""

    def quantize(self, table: FloatArray, latents: FloatArray, rng: jax.Array) -> Quantized:
        """Codes of latents [..., E] in `table`, the embedding of a codebook."""

    def update(self, codebook: Codebook, quantized: Quantized, decay: float) -> Codebook:
        """The codebook after one step of its moving averages."""

    def revive(self, codebook: Codebook, quantized: Quantized, rng: jax.Array, below: float) -> Codebook:
        """The codebook with codes used less than `below` times the average started anew."""

    def perplexity(self, quantized: Quantized) -> FloatArray:
        """Of the codes chosen, a mean over codebooks."""


class Criterion(Protocol):
    """What a codec is trained towards, and what learns beside it; its state is part of the training's.

    `start_fraction`: where in the run `against` becomes true, that is, the discriminator starts; 1 without one.
    """

    @property
    def start_fraction(self) -> float: ...

    def initial_state(self, rng: jax.Array, example: FloatArray) -> PyTree: ...

    def codec_loss(
        self,
        state: PyTree,
        decoded: FloatArray,
        target: FloatArray,
        decode: Callable[[PyTree], FloatArray],
        params: PyTree,
        against: bool,
    ) -> tuple[FloatArray, dict[str, FloatArray], PyTree]:
        """(loss of `decoded`, metrics, state after); `decode` makes `decoded` again from parameters like `params`."""

    def learn(
        self, state: PyTree, target: FloatArray, decoded: FloatArray, rng: jax.Array, against: bool
    ) -> tuple[PyTree, dict[str, FloatArray]]:
        """(state after the discriminator's step, metrics)."""


@dataclasses.dataclass(frozen=True)
class CodecRecipe:
    """How a codec is trained.

    For the first `continuous_fraction` of the steps latents pass unquantized; then the codebook starts from k-means
    over `_KMEANS_BATCHES` batches, and every `revive_every_steps` codes used less than `revive_below` times the
    average start anew, until the last fifth of the run. The learning rate warms up and falls to zero by a cosine.

    `codebook_update`: `ema` moves codes by moving averages; `gradient` is the plain VQ-VAE, whose codes learn from a
    loss of weight `codebook_weight`. The published nets were trained with 1 for commitment and 0.25 for the codebook,
    the paper's weights the wrong way round.
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
    codebook_update: Literal["ema", "gradient"] = "ema"
    codebook_weight: float = 1.0
    adam_betas: tuple[float, ...] = (0.9, 0.99)

    def __post_init__(self) -> None:
        if self.total_steps < 1 or self.batch_size < 1:
            raise ValueError(f"total_steps {self.total_steps} and batch_size {self.batch_size} must be at least 1")
        if not (0 <= self.warmup_fraction < 1 and 0 <= self.continuous_fraction < 1):
            raise ValueError("warmup_fraction and continuous_fraction must lie in [0, 1)")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas {self.adam_betas} must be two numbers in [0, 1)")

    @property
    def continuous_steps(self) -> int:
        return int(self.total_steps * self.continuous_fraction)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodecState:
    """Everything that changes during training; `adversary` is what the criterion keeps: a discriminator, or None."""

    step: Any
    params: PyTree
    opt_state: PyTree
    codebook: Codebook
    adversary: PyTree = None


def train_codec(
    net: CodecNet,
    batch_at: Callable[[np.random.Generator], np.ndarray],
    criterion: Criterion,
    recipe: CodecRecipe,
    *,
    quantizer: Quantizer,
    seed: int,
    workdir: str | Path,
    identity: str,
    progress: Progress,
    normalize_latents: bool = True,
) -> tuple[PyTree, np.ndarray]:
    """Trains `net` and the codebooks of `quantizer`; returns (parameters, embedding [C, E], or [K, C, E] of many).

    Args:
      batch_at: makes one batch from a random generator that depends on (seed, step) only.
      workdir: holds `training.safetensors`, from which an interrupted training goes on.
      identity: describes net, recipe and data; a state in `workdir` made with another one is refused.
      normalize_latents: latents meet the codes with mean square 1.

    Raises:
      ValueError: `workdir` holds the state of another training, or the loss is no longer finite.
    """
    warmup_steps = int(recipe.total_steps * recipe.warmup_fraction)
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, warmup_steps, recipe.total_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(recipe.clip_norm), optax.adam(schedule, *recipe.adam_betas))

    learns_codes = recipe.codebook_update == "gradient"
    adversarial_start = int(recipe.total_steps * criterion.start_fraction)

    def batch(step: int) -> np.ndarray:
        return batch_at(np.random.default_rng((seed, step)))

    def encode(params: PyTree, target: FloatArray) -> FloatArray:
        latents = net.apply({"params": params}, target, method="encode")
        return quantize.normalize(latents) if normalize_latents else latents

    def decode(params: PyTree, latents: FloatArray) -> FloatArray:
        return net.apply({"params": params}, latents, method="decode")

    def trained_of(params: PyTree, codebook: Codebook) -> PyTree:
        return (params, codebook.embedding_CE) if learns_codes else params

    @jax.jit
    def start(rng: jax.Array, first_batch: FloatArray) -> CodecState:
        params = net.init(rng, first_batch)["params"]
        codebook = quantizer.empty()
        opt_state = optimizer.init(trained_of(params, codebook))
        opponent = criterion.initial_state(jax.random.fold_in(rng, 1), first_batch)
        return CodecState(jnp.int32(0), params, opt_state, codebook, opponent)

    @partial(jax.jit, donate_argnums=0, static_argnames="against")
    def train_step(state: CodecState, target: FloatArray, against: bool) -> tuple[CodecState, dict[str, FloatArray]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        quantized = state.step >= recipe.continuous_steps

        def objective(trained: PyTree) -> tuple[FloatArray, Any]:
            params, table_CE = trained if learns_codes else (trained, state.codebook.embedding_CE)
            latents = encode(params, target)
            result = quantizer.quantize(table_CE, latents, jax.random.fold_in(rng, 1))
            straight_through = latents + jax.lax.stop_gradient(result.chosen - latents)
            into_decoder = jnp.where(quantized, straight_through, latents)
            decoded = decode(params, into_decoder)
            decode_again = partial(decode, latents=jax.lax.stop_gradient(into_decoder))
            total, metrics, opponent = criterion.codec_loss(
                state.adversary, decoded, target, decode_again, params, against
            )
            total += recipe.commitment_weight * jnp.where(quantized, result.commitment, 0.0)
            if learns_codes:
                distance = jnp.mean(jnp.square(jax.lax.stop_gradient(latents) - result.chosen))
                total += recipe.codebook_weight * jnp.where(quantized, distance, 0.0)
            metrics |= {"loss": total, "perplexity": quantizer.perplexity(result), "commitment": result.commitment}
            return total, (metrics, result, decoded, opponent)

        trained = trained_of(state.params, state.codebook)
        grads, (metrics, result, decoded, opponent) = jax.grad(objective, has_aux=True)(trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        moved = quantizer.update(state.codebook, result, recipe.codebook_decay)
        params = trained
        if learns_codes:
            params, table_CE = trained
            moved = quantize.placed_at(moved, table_CE)
        revives = quantized & (state.step % recipe.revive_every_steps == 0) & (state.step < 0.8 * recipe.total_steps)
        moved = jax.lax.cond(revives, lambda: quantizer.revive(moved, result, rng, recipe.revive_below), lambda: moved)
        codebook = jax.tree.map(partial(jnp.where, quantized), moved, state.codebook)
        average = codebook.count_C.mean(axis=-1, keepdims=True)
        metrics["codes_used"] = jnp.mean(codebook.count_C > recipe.revive_below * average)
        opponent, learnt = criterion.learn(opponent, target, decoded, jax.random.fold_in(rng, 2), against)
        metrics |= learnt
        return CodecState(state.step + 1, params, opt_state, codebook, opponent), metrics

    @jax.jit
    def latents_of(params: PyTree, target: FloatArray) -> FloatArray:
        return encode(params, target).reshape(-1, quantizer.code_dim)

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
            codebook = quantizer.start(jax.random.key(seed), jnp.concatenate(batches), per_step)
            state = dataclasses.replace(state, codebook=codebook)
        state, metrics = train_step(state, batch(step), against=step >= adversarial_start)
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
