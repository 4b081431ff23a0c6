"""Causal attention inside documents, and attention over a cache: one meaning, several ways to compute it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aromni_jax.arrays import BoolArray, IntArray

MASKED = -1e30
"""Score of a forbidden pair: finite, so that a row without any allowed key stays a number."""

BLOCK_LENGTH = 128
MAX_BLOCKS = 8
"""Blocked attention takes blocks of at least 128 queries and at most 8 of them (each is compiled on its own)."""


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
    `implementation`: "reference" keeps all scores in memory; "blocked" works on blocks of queries, skips the keys after
    them, and computes scores again for the backward pass; "auto" is blocked for rows longer than one block.
    """
    length = q_BLNH.shape[1]
    if implementation == "reference" or (implementation == "auto" and length <= BLOCK_LENGTH):
        causal_LS = jnp.tril(jnp.ones((length, length), bool))
        return masked_attention(q_BLNH, k_BLKH, v_BLKH, causal_LS & _same_segment(segment_ids_BL, segment_ids_BL))
    groups = q_BLNH.shape[2] // k_BLKH.shape[2]
    k_BLNH, v_BLNH = (jnp.repeat(x, groups, axis=2) if groups > 1 else x for x in (k_BLKH, v_BLKH))
    q_BNLH, k_BNLH, v_BNLH = (x.swapaxes(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
    return _blocked_attention(q_BNLH, k_BNLH, v_BNLH, jnp.asarray(segment_ids_BL)).swapaxes(1, 2)


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


def _same_segment(queries_BL: jax.Array, keys_BS: jax.Array) -> jax.Array:
    return queries_BL[:, :, None] == keys_BS[:, None, :]


def _blocks(length: int) -> list[tuple[int, int]]:
    size = max(BLOCK_LENGTH, -(-length // MAX_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _block_scores(q_BNLH: jax.Array, k_BNSH: jax.Array, segment_ids_BL: jax.Array, start: int, stop: int) -> jax.Array:
    """Scores of queries start..stop-1 with keys 0..stop-1, masked, float32."""
    scores_BNLS = jnp.einsum(
        "BNLH,BNSH->BNLS", q_BNLH[:, :, start:stop], k_BNSH[:, :, :stop], preferred_element_type=jnp.float32
    )
    causal_LS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
    mask_BLS = causal_LS & _same_segment(segment_ids_BL[:, start:stop], segment_ids_BL[:, :stop])
    return jnp.where(mask_BLS[:, None], scores_BNLS * q_BNLH.shape[-1] ** -0.5, MASKED)


@jax.custom_vjp
def _blocked_attention(q_BNLH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    return _blocked_forward(q_BNLH, k_BNSH, v_BNSH, segment_ids_BL)[0]


def _blocked_forward(
    q_BNLH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, segment_ids_BL: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    outs, log_zs = [], []
    for start, stop in _blocks(q_BNLH.shape[2]):
        scores_BNLS = _block_scores(q_BNLH, k_BNSH, segment_ids_BL, start, stop)
        largest_BNL1 = scores_BNLS.max(axis=-1, keepdims=True)
        weights_BNLS = jnp.exp(scores_BNLS - largest_BNL1)
        z_BNL1 = weights_BNLS.sum(axis=-1, keepdims=True)
        out_BNLH = jnp.einsum(
            "BNLS,BNSH->BNLH",
            weights_BNLS.astype(v_BNSH.dtype),
            v_BNSH[:, :, :stop],
            preferred_element_type=jnp.float32,
        )
        outs.append((out_BNLH / z_BNL1).astype(q_BNLH.dtype))
        log_zs.append(largest_BNL1 + jnp.log(z_BNL1))
    out_BNLH, log_z_BNL1 = jnp.concatenate(outs, axis=2), jnp.concatenate(log_zs, axis=2)
    return out_BNLH, (q_BNLH, k_BNSH, v_BNSH, segment_ids_BL, out_BNLH, log_z_BNL1)


def _blocked_backward(saved: tuple[jax.Array, ...], d_out_BNLH: jax.Array) -> tuple[jax.Array | None, ...]:
    q_BNLH, k_BNSH, v_BNSH, segment_ids_BL, out_BNLH, log_z_BNL1 = saved
    length, scale, dtype = q_BNLH.shape[2], q_BNLH.shape[-1] ** -0.5, q_BNLH.dtype
    inner_BNL1 = jnp.sum(out_BNLH.astype(jnp.float32) * d_out_BNLH.astype(jnp.float32), axis=-1, keepdims=True)
    d_q, d_k_BNHS, d_v_BNHS = [], jnp.zeros(()), jnp.zeros(())
    for start, stop in _blocks(length):
        scores_BNLS = _block_scores(q_BNLH, k_BNSH, segment_ids_BL, start, stop)
        weights_BNLS = jnp.exp(scores_BNLS - log_z_BNL1[:, :, start:stop])
        d_out = d_out_BNLH[:, :, start:stop]
        d_weights = jnp.einsum("BNLH,BNSH->BNLS", d_out, v_BNSH[:, :, :stop], preferred_element_type=jnp.float32)
        d_scores = (weights_BNLS * (d_weights - inner_BNL1[:, :, start:stop]) * scale).astype(dtype)
        d_q.append(jnp.einsum("BNLS,BNSH->BNLH", d_scores, k_BNSH[:, :, :stop]))
        # Summed as [H, S]: the big operand is then never transposed, which is slow on CPU.
        padding = ((0, 0), (0, 0), (0, 0), (0, length - stop))
        d_k = jnp.einsum("BNLH,BNLS->BNHS", q_BNLH[:, :, start:stop], d_scores, preferred_element_type=jnp.float32)
        d_v = jnp.einsum("BNLH,BNLS->BNHS", d_out, weights_BNLS.astype(dtype), preferred_element_type=jnp.float32)
        d_k_BNHS, d_v_BNHS = d_k_BNHS + jnp.pad(d_k, padding), d_v_BNHS + jnp.pad(d_v, padding)
    d_k_BNSH, d_v_BNSH = (x.swapaxes(2, 3).astype(dtype) for x in (d_k_BNHS, d_v_BNHS))
    return jnp.concatenate(d_q, axis=2), d_k_BNSH, d_v_BNSH, None


_blocked_attention.defvjp(_blocked_forward, _blocked_backward)
