"""Causal attention inside documents, and attention over a cache: one meaning, several ways to compute it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aromni_jax.arrays import BoolArray, IntArray

MASKED = -1e30
"""Score of a forbidden pair: finite, so that a row without any allowed key stays a number."""


def attention(
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    segment_ids_BL: IntArray,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """Self-attention of packed rows: query l sees key s when s <= l and both are of one segment. Returns [B, L, N, H].

    Scores are scaled by 1 / sqrt(H); softmax is in float32; N must be a multiple of K (grouped queries).
    `implementation` is "reference" (plain, any platform) or "auto".
    """
    length = q_BLNH.shape[1]
    causal_LS = jnp.tril(jnp.ones((length, length), bool))
    mask_BLS = causal_LS & (segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :])
    return masked_attention(q_BLNH, k_BLKH, v_BLKH, mask_BLS)


def cached_attention(
    q_BLNH: jax.Array, keys_BSKH: jax.Array, values_BSKH: jax.Array, positions_BL: IntArray
) -> jax.Array:
    """Attention over a `KVCache`: a query at position p sees slots 0..p. Returns [B, L, N, H]."""
    slots_S = jnp.arange(keys_BSKH.shape[1])
    return masked_attention(q_BLNH, keys_BSKH, values_BSKH, slots_S <= positions_BL[:, :, None])


def masked_attention(q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BLS: BoolArray) -> jax.Array:
    """Attention where `mask_BLS` allows it, with all scores in memory: the reference every other way must equal."""
    B, L, N, H = q_BLNH.shape
    K = k_BSKH.shape[2]
    q_BLKGH = q_BLNH.reshape(B, L, K, N // K, H)
    scores_BKGLS = jnp.einsum("BLKGH,BSKH->BKGLS", q_BLKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    scores_BKGLS = jnp.where(mask_BLS[:, None, None], scores_BKGLS, MASKED)
    weights_BKGLS = jax.nn.softmax(scores_BKGLS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGLS,BSKH->BLKGH", weights_BKGLS, v_BSKH).reshape(B, L, N, H)
