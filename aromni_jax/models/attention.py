"""Causal attention inside documents, and attention over a cache: one meaning, several ways to compute it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from aromni_jax import partitioning
from aromni_jax.arrays import BoolArray, IntArray
from aromni_jax.models import attention_kernels as kernels


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
    `implementation`: "reference" keeps all scores in memory; "blocked" works on blocks of queries and, in long rows, of
    keys, skips keys that come later and, in long rows, those of earlier documents, and computes scores again for the
    backward pass; "splash" is the Pallas kernel of TPUs, interpreted on other devices (for tests); "cudnn" is cuDNN's
    flash attention. "auto" takes the kernel of the devices of the mesh in context where it has the shapes, else blocked
    for rows that are not short; without a mesh no kernel, because nothing says where the program will run.

    On a mesh each device attends for its own rows, heads and queries; where rows are split (the context axis), it
    gathers their keys and values.
    """
    num_rows, length, _, head_dim = q_BLNH.shape
    num_parts = partitioning.num_shards("length")
    is_even = (
        num_rows % partitioning.num_shards("batch") == 0
        and length % num_parts == 0
        and k_BLKH.shape[2] % partitioning.num_shards("kv_heads") == 0
    )
    kind = partitioning.device_kind()
    if implementation == "auto":
        if is_even and kind.startswith("TPU") and kernels.takes_splash(length // num_parts, head_dim):
            implementation = "splash"
        elif is_even and kind.startswith("NVIDIA") and kernels.takes_cudnn(length // num_parts, head_dim, q_BLNH.dtype):
            implementation = "cudnn"
        else:
            implementation = "blocked" if length > kernels.SHORT_ROW else "reference"
    segment_ids_BL = jnp.asarray(segment_ids_BL)
    if implementation == "reference":
        causal_LS = jnp.tril(jnp.ones((length, length), bool))
        mask_BLS = causal_LS & kernels.same_segment(segment_ids_BL, segment_ids_BL)
        return checkpoint_name(masked_attention(q_BLNH, k_BLKH, v_BLKH, mask_BLS), kernels.ATTENDED)
    mesh = jax.sharding.get_abstract_mesh()
    is_split = not mesh.empty and mesh.size > 1 and is_even
    if implementation == "splash":
        num_parts = num_parts if is_split else 1
        where: Any = kernels.splash_kernel(
            length // num_parts, length, num_parts=num_parts, interpret=not kind.startswith("TPU")
        )
        compute: Callable[..., jax.Array] = kernels.splash_attention
    else:
        where = jnp.arange(length)
        compute = kernels.cudnn_attention if implementation == "cudnn" else kernels.blocked_attention
    if not is_split:
        return compute(where, q_BLNH, k_BLKH, v_BLKH, segment_ids_BL, segment_ids_BL)

    def on_device(where: Any, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        row = (k, v, segment_ids)
        if num_parts > 1:
            row = jax.tree.map(lambda x: jax.lax.all_gather(x, partitioning.RULES["length"], axis=1, tiled=True), row)
        return compute(where, q, row[0], row[1], segment_ids, row[2])

    along = partitioning.spec(("length",))
    if implementation == "splash":
        along = where.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, *along)))
    queries, keys = (partitioning.spec(("batch", "length", heads, None)) for heads in ("heads", "kv_heads"))
    # Pallas kernels say nothing about how their results vary over the mesh, hence no check of it.
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(along, queries, keys, keys, partitioning.spec(("batch", "length"))),
        out_specs=queries,
        check_vma=False,
    )(where, q_BLNH, k_BLKH, v_BLKH, segment_ids_BL)


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
    scores_BKGLS = jnp.where(mask_BLS[:, None, None], scores_BKGLS, kernels.MASKED)
    weights_BKGLS = jax.nn.softmax(scores_BKGLS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGLS,BSKH->BLKGH", weights_BKGLS, v_BSKH).reshape(B, L, N, H)
