"""Residual vector quantization: each codebook quantizes what the ones before it left over.

Source: Zeghidour et al. 2021, "SoundStream" (algorithm 1). The codebooks are those of `quantize`, stacked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aromni_jax.arrays import FloatArray, IntArray
from aromni_jax.tokenizers.nets import quantize


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
