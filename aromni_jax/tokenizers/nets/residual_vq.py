"""Residual vector quantization: each codebook quantizes what the ones before it left over.

Source: Zeghidour et al. 2021, "SoundStream" (algorithm 1; k-means start, revival and quantizer dropout of section
III-C). The codebooks are those of `quantize`, stacked.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from aromni_jax.arrays import FloatArray, IntArray
from aromni_jax.tokenizers.nets import quantize
from aromni_jax.tokenizers.nets.quantize import Codebook, Quantized


def encode(codebooks_KCE: FloatArray, latents_BUE: FloatArray) -> IntArray:
    """int32 codes [B, K, U] of latents [B, U, E]; the first k rows are the codes that k codebooks alone give."""

    def step(residual_BUE: FloatArray, table_CE: FloatArray) -> tuple[FloatArray, IntArray]:
        codes_BU = quantize.nearest_codes(table_CE, residual_BUE)
        return residual_BUE - table_CE[codes_BU], codes_BU

    _, codes_KBU = jax.lax.scan(step, latents_BUE, codebooks_KCE)
    return jnp.swapaxes(codes_KBU, 0, 1)


def decode(codebooks_KCE: FloatArray, codes_BKU: IntArray) -> FloatArray:
    """The sum of the chosen entries: latents [B, U, E] of codes [B, K, U]."""
    return jax.vmap(lambda table_CE, codes_BU: table_CE[codes_BU], in_axes=(0, 1))(codebooks_KCE, codes_BKU).sum(axis=0)


@dataclasses.dataclass(frozen=True)
class ResidualCodebooks:
    """The quantizer of K codebooks, as a trainer uses it (see `training.Quantizer`); its `Codebook` has K first.

    `codebooks_per_batch`: each batch goes through the first n codebooks, n drawn from these numbers (quantizer
    dropout), so that fewer of them decode too; none: always all. All codebooks keep learning where their inputs are,
    whether their output was used or not; commitment counts for those in use.
    """

    num_codes: int
    code_dim: int
    num_codebooks: int
    codebooks_per_batch: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_codes < 1 or self.num_codebooks < 1:
            raise ValueError(f"num_codes {self.num_codes} and num_codebooks {self.num_codebooks} must be at least 1")
        if wrong := [count for count in self.codebooks_per_batch if not 1 <= count <= self.num_codebooks]:
            raise ValueError(f"codebooks_per_batch holds {wrong[0]}; allowed are 1..{self.num_codebooks}")

    def empty(self) -> Codebook:
        """A place for the k-means start."""
        one = quantize.empty_codebook(self.num_codes, self.code_dim)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.num_codebooks, *leaf.shape)), one)

    def start(self, rng: jax.Array, samples_XE: FloatArray, count_per_step: FloatArray) -> Codebook:
        """k-means centres of the samples, then of what these leave over, and so on: see `quantize.kmeans_codebook`."""
        stages = []
        for stage_rng in jax.random.split(rng, self.num_codebooks):
            stage = quantize.kmeans_codebook(stage_rng, samples_XE, count_per_step, self.num_codes)
            samples_XE = samples_XE - stage.embedding_CE[quantize.nearest_codes(stage.embedding_CE, samples_XE)]
            stages.append(stage)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stages)

    def quantize(self, tables_KCE: FloatArray, latents: FloatArray, rng: jax.Array) -> Quantized:
        """The sum of nearest codes of each latent [..., E]; commitment is summed over the codebooks in use."""
        in_use_K = jnp.ones(self.num_codebooks)
        if self.codebooks_per_batch:
            drawn = jax.random.randint(rng, (), 0, len(self.codebooks_per_batch))
            in_use_K = 1.0 * (jnp.arange(self.num_codebooks) < jnp.array(self.codebooks_per_batch)[drawn])

        def stage(carry: tuple[FloatArray, ...], table: tuple[FloatArray, ...]) -> tuple[tuple, tuple]:
            residual, total, commitment = carry
            table_CE, in_use = table
            codes = quantize.nearest_codes(table_CE, jax.lax.stop_gradient(residual))
            chosen = table_CE[codes]
            commitment += in_use * jnp.mean(jnp.square(residual - chosen))
            received = (residual.reshape(-1, self.code_dim), codes.reshape(-1))
            return (residual - chosen, total + in_use * chosen, commitment), received

        start = (latents, jnp.zeros_like(latents), jnp.float32(0))
        tables = (jax.lax.stop_gradient(tables_KCE), in_use_K)
        (_, chosen, commitment), (inputs_KXE, codes_KX) = jax.lax.scan(stage, start, tables)
        return Quantized(chosen, commitment, inputs_KXE, codes_KX)

    def update(self, codebook: Codebook, quantized: Quantized, decay: float) -> Codebook:
        """The codebooks after one step of their moving averages."""

        def one(stage: Codebook, inputs_XE: FloatArray, codes_X: IntArray) -> Codebook:
            return quantize.update(stage, inputs_XE, codes_X, decay)

        return jax.vmap(one)(codebook, quantized.inputs_XE, quantized.codes_X)

    def revive(self, codebook: Codebook, quantized: Quantized, rng: jax.Array, below: float) -> Codebook:
        """The codebooks with dead codes started anew, each from its own inputs: see `quantize.revive`."""

        # One after another: a draw is as large as codes times latents.
        def one(stage: tuple[Codebook, FloatArray, jax.Array]) -> Codebook:
            return quantize.revive(*stage, below)

        return jax.lax.map(one, (codebook, quantized.inputs_XE, jax.random.split(rng, self.num_codebooks)))

    def perplexity(self, quantized: Quantized) -> FloatArray:
        """Mean over codebooks of `quantize.perplexity`."""
        return jnp.mean(jax.vmap(lambda codes_X: quantize.perplexity(codes_X, self.num_codes))(quantized.codes_X))
