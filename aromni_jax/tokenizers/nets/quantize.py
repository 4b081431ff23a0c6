"""A codebook learnt by exponential moving averages: nearest code, update, k-means start, revival of dead codes.

Plain functions over a small state, so that a residual quantizer is a stack of them. Sources: van den Oord et al. 2017
(appendix A.1, EMA update); Zeghidour et al. 2021, SoundStream (k-means start, revival); Yu et al. 2022, ViT-VQGAN
(normalised latents).
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from aromni_jax.arrays import FloatArray, IntArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codebook:
    """`sum_CE` and `count_C` are moving averages of the latents a code received; `embedding_CE` is their ratio."""

    embedding_CE: FloatArray
    sum_CE: FloatArray
    count_C: FloatArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """What a quantizer made of latents [..., E].

    `chosen` [..., E] is where the codes stand, with gradient to them; `commitment` how far the latents are from there.
    `inputs_XE` and `codes_X` are what the codebook received and answered, X latents; of a residual quantizer they have
    K first.
    """

    chosen: FloatArray
    commitment: FloatArray
    inputs_XE: FloatArray
    codes_X: IntArray


@dataclasses.dataclass(frozen=True)
class OneCodebook:
    """The quantizer of one codebook, as a trainer uses it (see `training.Quantizer`)."""

    num_codes: int
    code_dim: int

    def empty(self) -> Codebook:
        """A place for the k-means start."""
        return empty_codebook(self.num_codes, self.code_dim)

    def start(self, rng: jax.Array, samples_XE: FloatArray, count_per_step: FloatArray) -> Codebook:
        """The codebook of k-means centres: see `kmeans_codebook`."""
        return kmeans_codebook(rng, samples_XE, count_per_step, self.num_codes)

    def quantize(self, table_CE: FloatArray, latents: FloatArray, rng: jax.Array) -> Quantized:
        """The nearest code of each latent [..., E]; nothing here is random."""
        codes = nearest_codes(jax.lax.stop_gradient(table_CE), jax.lax.stop_gradient(latents))
        chosen = table_CE[codes]
        commitment = jnp.mean(jnp.square(latents - jax.lax.stop_gradient(chosen)))
        return Quantized(chosen, commitment, latents.reshape(-1, self.code_dim), codes.reshape(-1))

    def update(self, codebook: Codebook, quantized: Quantized, decay: float) -> Codebook:
        """The codebook after one step of its moving averages."""
        return update(codebook, quantized.inputs_XE, quantized.codes_X, decay)

    def revive(self, codebook: Codebook, quantized: Quantized, rng: jax.Array, below: float) -> Codebook:
        """The codebook with dead codes started anew: see `revive`."""
        return revive(codebook, quantized.inputs_XE, rng, below)

    def perplexity(self, quantized: Quantized) -> FloatArray:
        """See `perplexity`."""
        return perplexity(quantized.codes_X, self.num_codes)


def empty_codebook(num_codes: int, code_dim: int) -> Codebook:
    """All zeros: a place for the k-means start."""
    table_CE = jnp.zeros((num_codes, code_dim), jnp.float32)
    return Codebook(table_CE, table_CE, jnp.zeros((num_codes,), jnp.float32))


def normalize(latents: FloatArray) -> FloatArray:
    """Latents of mean square 1 over the last axis: no code can win by its length, and warm-up has the right scale."""
    return latents * jax.lax.rsqrt(jnp.mean(jnp.square(latents), axis=-1, keepdims=True) + 1e-6)


def nearest_codes(embedding_CE: FloatArray, latents: FloatArray) -> IntArray:
    """int32 index of the nearest code (Euclidean) of each latent: [..., E] -> [...]. Ties go to the lower index."""
    scores = jnp.einsum("...E,CE->...C", latents, embedding_CE) - 0.5 * jnp.sum(jnp.square(embedding_CE), axis=-1)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def update(codebook: Codebook, latents_XE: FloatArray, codes_X: IntArray, decay: float) -> Codebook:
    """Moves every code towards the mean of the latents that chose it."""
    one_hot_XC = jax.nn.one_hot(codes_X, codebook.count_C.shape[0], dtype=jnp.float32)
    count_C = decay * codebook.count_C + (1 - decay) * one_hot_XC.sum(axis=0)
    sum_CE = decay * codebook.sum_CE + (1 - decay) * jnp.einsum("XC,XE->CE", one_hot_XC, latents_XE)
    return _with_embedding(codebook.embedding_CE, sum_CE, count_C)


def placed_at(codebook: Codebook, embedding_CE: FloatArray) -> Codebook:
    """The same use of codes that stand elsewhere, for a codebook that learns by gradient."""
    return Codebook(embedding_CE, embedding_CE * codebook.count_C[:, None], codebook.count_C)


def revive(codebook: Codebook, latents_XE: FloatArray, rng: jax.Array, below: float) -> Codebook:
    """Gives codes used less than `below` times the average a latent of this batch to start from.

    Latents far from every code are the likelier choice: most of a batch may be one flat background that needs no
    second code. The moving averages are rewritten too; changing the embedding alone would be undone by the next update.
    """
    average = codebook.count_C.mean()
    dead_C = codebook.count_C < below * average
    distance_X = _squared_distances(codebook.embedding_CE, latents_XE).min(axis=1)
    chosen_C = jax.random.categorical(rng, jnp.log(distance_X + 1e-8), shape=dead_C.shape)
    count_C = jnp.where(dead_C, average, codebook.count_C)
    sum_CE = jnp.where(dead_C[:, None], latents_XE[chosen_C] * average, codebook.sum_CE)
    return _with_embedding(codebook.embedding_CE, sum_CE, count_C)


@partial(jax.jit, static_argnames=("num_codes", "num_iterations"))
def kmeans_codebook(
    rng: jax.Array, samples_XE: FloatArray, count_per_step: FloatArray, num_codes: int, num_iterations: int = 12
) -> Codebook:
    """Codebook whose codes are the k-means centres of samples; `count_per_step`: latents per training step.

    Needs at least `num_codes` samples. The first centres are drawn in rounds, far samples first (k-means||, Bahmani et
    al. 2012): a uniform draw would put most of them into the commonest patch. Centres that lose all samples stay.
    """
    num_rounds = 8
    distance_X = jnp.sum(jnp.square(samples_XE - samples_XE.mean(axis=0)), axis=-1)
    centres = []
    for round_index, round_rng in enumerate(jax.random.split(rng, num_rounds)):
        size = num_codes * (round_index + 1) // num_rounds - num_codes * round_index // num_rounds
        noise_X = jax.random.gumbel(round_rng, distance_X.shape)
        _, drawn = jax.lax.top_k(jnp.log(distance_X + 1e-8) + noise_X, size)
        centres.append(samples_XE[drawn])
        if size:
            distance_X = jnp.minimum(distance_X, _squared_distances(centres[-1], samples_XE).min(axis=1))

    def iterate(centres_CE: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        one_hot_XC = jax.nn.one_hot(nearest_codes(centres_CE, samples_XE), num_codes, dtype=jnp.float32)
        count_C = one_hot_XC.sum(axis=0)
        mean_CE = jnp.einsum("XC,XE->CE", one_hot_XC, samples_XE) / jnp.maximum(count_C, 1)[:, None]
        return jnp.where(count_C[:, None] > 0, mean_CE, centres_CE), count_C

    centres_CE, counts = jax.lax.scan(iterate, jnp.concatenate(centres), None, length=num_iterations)
    count_C = counts[-1] * (count_per_step / samples_XE.shape[0])
    return Codebook(centres_CE, centres_CE * count_C[:, None], count_C)


def perplexity(codes: IntArray, num_codes: int) -> FloatArray:
    """exp of the entropy of code use: `num_codes` when all are used alike, 1 when one is."""
    share_C = jnp.bincount(codes.reshape(-1), length=num_codes) / codes.size
    return jnp.exp(-jnp.sum(share_C * jnp.log(share_C + 1e-10)))


def _squared_distances(table_CE: FloatArray, latents_XE: FloatArray) -> FloatArray:
    squares = jnp.sum(jnp.square(latents_XE), axis=-1)[:, None] + jnp.sum(jnp.square(table_CE), axis=-1)
    return jnp.maximum(squares - 2 * jnp.einsum("XE,CE->XC", latents_XE, table_CE), 0.0)


def _with_embedding(old_CE: FloatArray, sum_CE: FloatArray, count_C: FloatArray) -> Codebook:
    embedding_CE = jnp.where(count_C[:, None] > 1e-4, sum_CE / jnp.maximum(count_C, 1e-4)[:, None], old_CE)
    return Codebook(embedding_CE, sum_CE, count_C)
