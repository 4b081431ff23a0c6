"""Training of a codec: any encoder and decoder around one codebook, on batches made by a pure function of the step.

The same trainer serves pictures and speech; they bring a net, a batch function, a reconstruction loss and, if they want
one, a discriminator. It can be interrupted anywhere: its whole state is one file, and the steps after a restart are the
ones that would have been. Sources: van den Oord et al. 2017 (VQ-VAE); Esser et al. 2021 (adversarial training).
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
from aromni_jax.tokenizers import adversarial, storage
from aromni_jax.tokenizers.adversarial import Adversary
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
    """Everything that changes during training; `adversary` is {"params", "opt_state"} of a discriminator, or None."""

    step: Any
    params: PyTree
    opt_state: PyTree
    codebook: quantize.Codebook
    adversary: PyTree = None


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
    normalize_latents: bool = True,
    adversary: Adversary | None = None,
) -> tuple[PyTree, np.ndarray]:
    """Trains `net` and a codebook; returns (parameters, embedding_CE).

    Args:
      batch_at: makes one batch from a random generator that depends on (seed, step) only.
      workdir: holds `training.safetensors`, from which an interrupted training goes on.
      identity: describes net, recipe and data; a state in `workdir` made with another one is refused.
      normalize_latents: latents meet the codes with mean square 1.
      adversary: what the codec is trained against, or None.

    Raises:
      ValueError: `workdir` holds the state of another training, or the loss is no longer finite.
    """
    warmup_steps = int(recipe.total_steps * recipe.warmup_fraction)
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, warmup_steps, recipe.total_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(recipe.clip_norm), optax.adam(schedule, b1=0.9, b2=0.99))

    learns_codes = recipe.codebook_update == "gradient"
    adversarial_start = int(recipe.total_steps * adversary.recipe.start_fraction) if adversary else recipe.total_steps

    def batch(step: int) -> np.ndarray:
        return batch_at(np.random.default_rng((seed, step)))

    def encode(params: PyTree, target: FloatArray) -> FloatArray:
        latents = net.apply({"params": params}, target, method="encode")
        return quantize.normalize(latents) if normalize_latents else latents

    def decode(params: PyTree, latents: FloatArray) -> FloatArray:
        return net.apply({"params": params}, latents, method="decode")

    def trained_of(params: PyTree, codebook: quantize.Codebook) -> PyTree:
        return (params, codebook.embedding_CE) if learns_codes else params

    @jax.jit
    def start(rng: jax.Array, first_batch: FloatArray) -> CodecState:
        params = net.init(rng, first_batch)["params"]
        codebook = quantize.empty_codebook(num_codes, code_dim)
        opt_state = optimizer.init(trained_of(params, codebook))
        opponent = adversarial.initial_state(adversary, jax.random.fold_in(rng, 1), first_batch) if adversary else None
        return CodecState(jnp.int32(0), params, opt_state, codebook, opponent)

    @partial(jax.jit, donate_argnums=0, static_argnames="against")
    def train_step(
        state: CodecState, target: FloatArray, against: Adversary | None
    ) -> tuple[CodecState, dict[str, FloatArray]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        quantized = state.step >= recipe.continuous_steps

        def objective(trained: PyTree) -> tuple[FloatArray, Any]:
            params, table_CE = trained if learns_codes else (trained, state.codebook.embedding_CE)
            latents = encode(params, target)
            codes = quantize.nearest_codes(jax.lax.stop_gradient(table_CE), jax.lax.stop_gradient(latents))
            chosen = table_CE[codes]
            straight_through = latents + jax.lax.stop_gradient(chosen - latents)
            into_decoder = jnp.where(quantized, straight_through, latents)
            decoded = decode(params, into_decoder)
            total, metrics = loss(decoded, target)
            if against:
                score, weight = adversarial.generator_loss(
                    against,
                    state.adversary["params"],
                    decoded,
                    partial(decode, latents=jax.lax.stop_gradient(into_decoder)),
                    params,
                    lambda made: loss(made, target)[0],
                )
                total += weight * score
                metrics |= {"generator": score, "generator_weight": weight}
            commitment = jnp.mean(jnp.square(latents - jax.lax.stop_gradient(chosen)))
            total += recipe.commitment_weight * jnp.where(quantized, commitment, 0.0)
            if learns_codes:
                distance = jnp.mean(jnp.square(jax.lax.stop_gradient(latents) - chosen))
                total += recipe.codebook_weight * jnp.where(quantized, distance, 0.0)
            metrics |= {"loss": total, "perplexity": quantize.perplexity(codes, num_codes), "commitment": commitment}
            return total, (metrics, latents.reshape(-1, code_dim), codes.reshape(-1), decoded)

        trained = trained_of(state.params, state.codebook)
        grads, (metrics, latents_XE, codes_X, decoded) = jax.grad(objective, has_aux=True)(trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        moved = quantize.update(state.codebook, latents_XE, codes_X, recipe.codebook_decay)
        params = trained
        if learns_codes:
            params, table_CE = trained
            moved = quantize.placed_at(moved, table_CE)
        revives = quantized & (state.step % recipe.revive_every_steps == 0) & (state.step < 0.8 * recipe.total_steps)
        moved = jax.lax.cond(
            revives, lambda: quantize.revive(moved, latents_XE, rng, recipe.revive_below), lambda: moved
        )
        codebook = jax.tree.map(partial(jnp.where, quantized), moved, state.codebook)
        metrics["codes_used"] = jnp.mean(codebook.count_C > recipe.revive_below * codebook.count_C.mean())
        opponent = state.adversary
        if against:
            opponent, learnt = adversarial.discriminator_step(against, opponent, target, decoded)
            metrics |= learnt
        return CodecState(state.step + 1, params, opt_state, codebook, opponent), metrics

    @jax.jit
    def latents_of(params: PyTree, target: FloatArray) -> FloatArray:
        return encode(params, target).reshape(-1, code_dim)

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
        state, metrics = train_step(state, batch(step), against=adversary if step >= adversarial_start else None)
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
