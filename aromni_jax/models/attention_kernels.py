"""Ways to compute causal attention on one device: blocks of queries in XLA, splash on TPU, cuDNN's flash on GPU.

They share one signature: queries [B, L, N, H], keys and values [B, S, K, H], the segments of both, and where in the row
of S tokens the L queries stand. None keeps scores for the backward pass.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ATTENDED = "attended"
"""Checkpoint name of what attention returns, and of the log-sum that its backward pass needs besides."""

_CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"
"""How jax calls the operation whose results are both, where cuDNN computes them."""

MASKED = -1e30
"""Score of a forbidden pair: finite, so that a row without any allowed key stays a number."""

BLOCK_LENGTH = 128
MAX_BLOCKS = 8
"""Blocked attention takes blocks of at least 128 queries and at most 8 of them (each is compiled on its own)."""

_SPLASH_LANES = 128
_SPLASH_BLOCK_LENGTH = 512
"""Splash works on blocks of queries and keys: multiples of 128, here at most 512 long (scores of 1 MiB in VMEM)."""


MAX_DOCUMENTS = 16
"""Documents of a row, its padding counted as one, up to which cuDNN gets lists of them."""


def same_segment(queries_BL: jax.Array, keys_BS: jax.Array) -> jax.Array:
    """bool [B, L, S]: query and key are of one document (or both padding)."""
    return queries_BL[:, :, None] == keys_BS[:, None, :]


def takes_splash(num_queries: int, head_dim: int) -> bool:
    """Whether the splash kernel has these shapes: whole lanes of queries, heads that fill at least half of a lane."""
    return num_queries % _SPLASH_LANES == 0 and head_dim >= 64 and head_dim % 32 == 0


def splash_kernel(num_queries: int, num_keys: int, *, num_parts: int, interpret: bool) -> Any:
    """The kernel for rows of `num_keys` tokens, of which each of `num_parts` devices holds `num_queries` queries.

    It carries which blocks each device may skip. `splash_attention` takes it as `where`; inside `shard_map` its spec is
    `kernel.manual_sharding_spec`. `interpret` runs it step by step on any device: for tests.
    """
    # Imported here, because Pallas takes long to load and few runs have a TPU.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def block(length: int) -> int:
        lengths = range(_SPLASH_LANES, _SPLASH_BLOCK_LENGTH + 1, _SPLASH_LANES)
        return max(size for size in lengths if length % size == 0)

    q, kv = block(num_queries), block(num_keys)
    sizes = splash.BlockSizes(
        block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv, block_q_dq=q, block_kv_dq=kv
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((num_keys, num_keys))]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=num_parts,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )


def splash_attention(
    kernel: Any, q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, queries_BL: jax.Array, keys_BS: jax.Array
) -> jax.Array:
    """The Pallas kernel of `splash_kernel`, for every row. Returns [B, L, N, H]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    scaled_BLNH = (q_BLNH.astype(jnp.float32) * q_BLNH.shape[-1] ** -0.5).astype(q_BLNH.dtype)
    q_BNLH, k_BKSH, v_BKSH = (x.swapaxes(1, 2) for x in (scaled_BLNH, k_BSKH, v_BSKH))
    return jax.vmap(kernel)(q_BNLH, k_BKSH, v_BKSH, SegmentIds(queries_BL, keys_BS)).swapaxes(1, 2)


def takes_cudnn(num_queries: int, head_dim: int, dtype: Any) -> bool:
    """Whether cuDNN's flash attention has these shapes on every GPU it runs on (Ampere and later)."""
    is_half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return is_half and num_queries % 2 == 0 and head_dim <= 128 and head_dim % 8 == 0


def cudnn_attention(
    indices_L: jax.Array,
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    queries_BL: jax.Array,
    keys_BS: jax.Array,
) -> jax.Array:
    """cuDNN's flash attention. Rows of one document each are all it has to know; of few documents it gets lists of
    where each stands; else a bias of one number per pair, shared by all heads.

    The bias costs several times what the others do (configs/LOG.md): it is read for pairs of two documents too. Only
    GPUs from Hopper on take the lists, and only whole rows of as many key as query heads; the gradient needs memory for
    each of `MAX_DOCUMENTS`. The bias is 32 MiB for a row of 4096 tokens.
    """
    has_all_queries = q_BLNH.shape[1] == k_BSKH.shape[1]

    def with_bias(q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        mask_BLS = same_segment(queries_BL, keys_BS)
        if not has_all_queries:
            mask_BLS &= indices_L[:, None] >= jnp.arange(k_BSKH.shape[1])
        return jax.nn.dot_product_attention(
            q_BLNH, k_BSKH, v_BSKH, mask=mask_BLS[:, None], is_causal=has_all_queries, implementation="cudnn"
        )

    if not has_all_queries or q_BLNH.shape != k_BSKH.shape or not _takes_lists():
        return with_bias(q_BLNH, k_BSKH, v_BSKH)

    def alone(q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q_BLNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn")

    starts_BM, lengths_BM, num_documents = document_lists(queries_BL, MAX_DOCUMENTS)

    def with_lists(q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
        # jax.nn.dot_product_attention, the public name, does not pass these lists on.
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

        offsets_BM = jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=-1)
        out_BLNH: jax.Array = dot_product_attention(
            q_BLNH,
            k_BSKH,
            v_BSKH,
            q_seqlen=lengths_BM,
            kv_seqlen=lengths_BM,
            q_offsets=offsets_BM,
            kv_offsets=offsets_BM,
            scale=q_BLNH.shape[-1] ** -0.5,
            mask_type=MaskType.PADDING_CAUSAL,
        )
        return out_BLNH

    which = jnp.where(num_documents == 1, 0, jnp.where(num_documents <= MAX_DOCUMENTS, 1, 2))
    out_BLNH: jax.Array = jax.lax.switch(which, (alone, with_lists, with_bias), q_BLNH, k_BSKH, v_BSKH)
    return out_BLNH


def keep_attended(primitive: Any, *avals: Any, **params: Any) -> Any:
    """A policy for `jax.checkpoint`: what attention returns and its log-sum stay, whichever way computes them."""
    is_named = jax.checkpoint_policies.save_only_these_names(ATTENDED)(primitive, *avals, **params)
    return is_named or primitive.name == _CUDNN_FORWARD


def document_lists(segment_ids_BL: jax.Array, max_documents: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(starts [B, M], lengths [B, M], number): where the documents of each row stand, padding among them.

    Unused places hold -1. `number` is that of the fullest row; when it is above `max_documents` (M) the lists are cut.
    """
    num_rows, length = segment_ids_BL.shape
    is_start_BL = jnp.diff(segment_ids_BL, axis=1, prepend=-1) != 0
    numbers_BL = jnp.cumsum(is_start_BL, axis=1) - 1
    counts_B = numbers_BL[:, -1] + 1
    places_M = jnp.arange(max_documents + 1)
    starts_BM = (numbers_BL[:, :, None] < places_M).sum(axis=1)
    lengths_BM = jnp.diff(starts_BM, axis=1)
    is_used_BM = places_M[:-1] < counts_B[:, None]
    starts_BM, lengths_BM = (
        jnp.where(is_used_BM, x_BM, -1).astype(jnp.int32) for x_BM in (starts_BM[:, :-1], lengths_BM)
    )
    return starts_BM, lengths_BM, counts_B.max()


def _takes_lists() -> bool:
    """Whether every GPU here is a Hopper or later."""
    try:
        devices = jax.local_devices(backend="gpu")
    except RuntimeError:
        return False
    return all(float(getattr(device, "compute_capability", "0")) >= 9.0 for device in devices)


def blocked_attention(
    indices_L: jax.Array,
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    queries_BL: jax.Array,
    keys_BS: jax.Array,
) -> jax.Array:
    """Scores of one block of queries at a time, computed again in the backward pass. Returns [B, L, N, H].

    `indices_L` are the places of the queries in their row. When they are the whole row, keys after a block are skipped.
    """
    groups = q_BLNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x, groups, axis=2) if groups > 1 else x for x in (k_BSKH, v_BSKH))
    q_BNLH, k_BNSH, v_BNSH = (x.swapaxes(1, 2) for x in (q_BLNH, k_BSNH, v_BSNH))
    return _blocked(q_BNLH, k_BNSH, v_BNSH, (indices_L, queries_BL, keys_BS)).swapaxes(1, 2)


_Places = tuple[jax.Array, jax.Array, jax.Array]
"""(places of the queries in the row [L], their segments [B, L], segments of the keys [B, S])."""


def _blocks(num_queries: int, num_keys: int) -> list[tuple[int, int, int]]:
    """(first query, end of queries, end of the keys that they may see) of every block."""
    size = max(BLOCK_LENGTH, -(-num_queries // MAX_BLOCKS))
    ends = [(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]
    return [(start, stop, stop if num_queries == num_keys else num_keys) for start, stop in ends]


def _block_scores(
    q_BNLH: jax.Array, k_BNSH: jax.Array, places: _Places, start: int, stop: int, num_keys: int
) -> jax.Array:
    """Scores of queries start..stop-1 with keys 0..num_keys-1, masked, float32."""
    indices_L, queries_BL, keys_BS = places
    scores_BNLS = jnp.einsum(
        "BNLH,BNSH->BNLS", q_BNLH[:, :, start:stop], k_BNSH[:, :, :num_keys], preferred_element_type=jnp.float32
    )
    causal_LS = indices_L[start:stop, None] >= jnp.arange(num_keys)
    mask_BLS = causal_LS & same_segment(queries_BL[:, start:stop], keys_BS[:, :num_keys])
    return jnp.where(mask_BLS[:, None], scores_BNLS * q_BNLH.shape[-1] ** -0.5, MASKED)


@jax.custom_vjp
def _blocked(q_BNLH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, places: _Places) -> jax.Array:
    return _blocked_forward(q_BNLH, k_BNSH, v_BNSH, places)[0]


def _blocked_forward(
    q_BNLH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, places: _Places
) -> tuple[jax.Array, tuple[Any, ...]]:
    outs, log_zs = [], []
    for start, stop, num_keys in _blocks(q_BNLH.shape[2], k_BNSH.shape[2]):
        scores_BNLS = _block_scores(q_BNLH, k_BNSH, places, start, stop, num_keys)
        largest_BNL1 = scores_BNLS.max(axis=-1, keepdims=True)
        weights_BNLS = jnp.exp(scores_BNLS - largest_BNL1)
        z_BNL1 = weights_BNLS.sum(axis=-1, keepdims=True)
        out_BNLH = jnp.einsum(
            "BNLS,BNSH->BNLH",
            weights_BNLS.astype(v_BNSH.dtype),
            v_BNSH[:, :, :num_keys],
            preferred_element_type=jnp.float32,
        )
        outs.append((out_BNLH / z_BNL1).astype(q_BNLH.dtype))
        log_zs.append(largest_BNL1 + jnp.log(z_BNL1))
    out_BNLH = checkpoint_name(jnp.concatenate(outs, axis=2), ATTENDED)
    log_z_BNL1 = checkpoint_name(jnp.concatenate(log_zs, axis=2), ATTENDED)
    return out_BNLH, (q_BNLH, k_BNSH, v_BNSH, places, out_BNLH, log_z_BNL1)


def _blocked_backward(saved: tuple[Any, ...], d_out_BNLH: jax.Array) -> tuple[jax.Array | None, ...]:
    q_BNLH, k_BNSH, v_BNSH, places, out_BNLH, log_z_BNL1 = saved
    length, scale, dtype = k_BNSH.shape[2], q_BNLH.shape[-1] ** -0.5, q_BNLH.dtype
    inner_BNL1 = jnp.sum(out_BNLH.astype(jnp.float32) * d_out_BNLH.astype(jnp.float32), axis=-1, keepdims=True)
    # Sums over queries are taken as [H, L] by [L, S]: on CPU an operand that has to be turned around is slow, and what
    # is turned here is small.
    q_BNHL, d_out_BNHL = q_BNLH.swapaxes(2, 3), d_out_BNLH.swapaxes(2, 3)
    d_q = []
    d_k_BNHS = d_v_BNHS = jnp.zeros((*k_BNSH.shape[:2], k_BNSH.shape[3], length), jnp.float32)
    for start, stop, num_keys in _blocks(q_BNLH.shape[2], length):
        scores_BNLS = _block_scores(q_BNLH, k_BNSH, places, start, stop, num_keys)
        weights_BNLS = jnp.exp(scores_BNLS - log_z_BNL1[:, :, start:stop])
        d_out = d_out_BNLH[:, :, start:stop]
        d_weights = jnp.einsum("BNLH,BNSH->BNLS", d_out, v_BNSH[:, :, :num_keys], preferred_element_type=jnp.float32)
        d_scores = (weights_BNLS * (d_weights - inner_BNL1[:, :, start:stop]) * scale).astype(dtype)
        d_q.append(jnp.einsum("BNLS,BNSH->BNLH", d_scores, k_BNSH[:, :, :num_keys]))
        of_keys, of_values = (
            jnp.einsum("BNHL,BNLS->BNHS", x_BNHL[..., start:stop], x_BNLS, preferred_element_type=jnp.float32)
            for x_BNHL, x_BNLS in ((q_BNHL, d_scores), (d_out_BNHL, weights_BNLS.astype(dtype)))
        )
        d_k_BNHS, d_v_BNHS = _add_to_first(d_k_BNHS, of_keys), _add_to_first(d_v_BNHS, of_values)
    d_k_BNSH, d_v_BNSH = (x.swapaxes(2, 3).astype(dtype) for x in (d_k_BNHS, d_v_BNHS))
    return jnp.concatenate(d_q, axis=2), d_k_BNSH, d_v_BNSH, None


def _add_to_first(total_BNHS: jax.Array, part_BNHT: jax.Array) -> jax.Array:
    """Adds to the first T of S keys, in place: a sum of padded parts would be left to whoever reads it."""
    first_BNHT = total_BNHS[..., : part_BNHT.shape[3]] + part_BNHT
    return jax.lax.dynamic_update_slice_in_dim(total_BNHS, first_BNHT, 0, axis=3)


_blocked.defvjp(_blocked_forward, _blocked_backward)
