"""Ways to compute causal attention on one device: blocks of queries in XLA, splash on TPU, cuDNN's flash on GPU.

They share one signature: queries [B, L, N, H], keys and values [B, S, K, H], the segments of both, and where in the row
of S tokens the L queries stand. None keeps scores for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
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

SHORT_ROW = 128
"""Rows up to this long are not worth blocks."""

MAX_BLOCKS = 8
"""Blocks of queries in blocked attention: each is compiled on its own."""

WHOLE_KEYS = 1024
WHOLE_QUERIES = 128
"""Up to 1024 keys are one block, for at least 128 queries at a time: what two CPU cores are fastest with."""

KEYS_LENGTH = 256
QUERIES_LENGTH = 512
"""More go through blocks of 256, for at least 512 queries at a time. Scores of 8 heads of one row are 4 MiB, and stay
in the cache."""

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
    """Scores of one block of queries with one of keys at a time, computed again in the backward pass: [B, L, N, H].

    `indices_L` are the places of the queries in their row. Blocks of keys after the last query of a block are skipped,
    and those before the first document of it. In a short row keys are one block, and it ends with the queries where
    these are the whole row.
    """
    groups = q_BLNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x, groups, axis=2) if groups > 1 else x for x in (k_BSKH, v_BSKH))
    q_BNLH, k_BNSH, v_BNSH = (x.swapaxes(1, 2) for x in (q_BLNH, k_BSNH, v_BSNH))
    return _blocked(q_BNLH, k_BNSH, v_BNSH, (indices_L, queries_BL, keys_BS)).swapaxes(1, 2)


_Places = tuple[jax.Array, jax.Array, jax.Array]
"""(places of the queries in the row [L], their segments [B, L], segments of the keys [B, S])."""


def _blocks(num_queries: int, num_keys: int) -> list[tuple[slice, slice]]:
    """(a block of queries, the keys that it may see)."""
    is_short = num_keys <= WHOLE_KEYS
    size = max(WHOLE_QUERIES if is_short else QUERIES_LENGTH, -(-num_queries // MAX_BLOCKS))
    blocks = [slice(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]
    return [(block, slice(block.stop if is_short and num_queries == num_keys else num_keys)) for block in blocks]


def _places_of(block: slice, keys: slice, places: _Places) -> _Places:
    indices_L, queries_BL, keys_BS = places
    return indices_L[block], queries_BL[:, block], keys_BS[:, keys]


def _block_of_keys(num_keys: int) -> int:
    return num_keys if num_keys <= WHOLE_KEYS else min(KEYS_LENGTH, num_keys)


def _keys_of(places: _Places) -> tuple[jax.Array, jax.Array]:
    """(first, end) of the blocks of keys that a block of queries may see. A query sees itself: they are never none."""
    indices_L, queries_BL, keys_BS = places
    size = _block_of_keys(keys_BS.shape[1])
    # Padding last, which puts the documents of a packed row in order. In any other order fewer blocks are skipped.
    queries_BL, keys_BS = (jnp.where(x == 0, jnp.iinfo(x.dtype).max, x) for x in (queries_BL, keys_BS))
    keys_BjS = jnp.pad(keys_BS, ((0, 0), (0, -keys_BS.shape[1] % size)), mode="edge").reshape(len(keys_BS), -1, size)
    lowest_B1, highest_B1 = queries_BL.min(1, keepdims=True), queries_BL.max(1, keepdims=True)
    is_seen_Bj = (keys_BjS.min(2) <= highest_B1) & (keys_BjS.max(2) >= lowest_B1)
    return is_seen_Bj.any(0).argmax(), indices_L.max() // size + 1


def _over_keys(
    places: _Places,
    step: Callable[[jax.Array | int, tuple[jax.Array, ...]], tuple[jax.Array, ...]],
    so_far: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """`so_far` after `step` with the number of each block of keys that a block of queries may see."""
    num_keys = places[2].shape[1]
    if _block_of_keys(num_keys) == num_keys:
        return step(0, so_far)
    return jax.lax.fori_loop(*_keys_of(places), step, so_far)


def _cut(number: jax.Array | int, x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """(one block of keys along `axis`, its first key). The last block of a row that does not divide begins earlier."""
    size = _block_of_keys(x.shape[axis])
    start = jnp.minimum(number * size, x.shape[axis] - size)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis), start


def _block_scores(q_BNLH: jax.Array, k_BNSH: jax.Array, places: _Places, number: jax.Array | int) -> jax.Array:
    """Scores of a block of queries with one of keys, masked, float32. `places` are those of the block."""
    indices_L, queries_BL, keys_BS = places
    keys_BT, start = _cut(number, keys_BS, 1)
    scores_BNLT = jnp.einsum("BNLH,BNTH->BNLT", q_BNLH, _cut(number, k_BNSH, 2)[0], preferred_element_type=jnp.float32)
    indices_T = start + jnp.arange(keys_BT.shape[1])
    is_here_T = indices_T >= number * keys_BT.shape[1]  # What two blocks share is the earlier one's.
    mask_BLT = (indices_L[:, None] >= indices_T) & is_here_T & same_segment(queries_BL, keys_BT)
    return jnp.where(mask_BLT[:, None], scores_BNLT * q_BNLH.shape[-1] ** -0.5, MASKED)


@jax.custom_vjp
def _blocked(q_BNLH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, places: _Places) -> jax.Array:
    return _blocked_forward(q_BNLH, k_BNSH, v_BNSH, places)[0]


def _blocked_forward(
    q_BNLH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, places: _Places
) -> tuple[jax.Array, tuple[Any, ...]]:
    blocks = [
        _block_forward(q_BNLH[:, :, block], k_BNSH[:, :, keys], v_BNSH[:, :, keys], _places_of(block, keys, places))
        for block, keys in _blocks(q_BNLH.shape[2], k_BNSH.shape[2])
    ]
    out_BNLH, log_z_BNL1 = (checkpoint_name(jnp.concatenate(parts, axis=2), ATTENDED) for parts in zip(*blocks))
    return out_BNLH, (q_BNLH, k_BNSH, v_BNSH, places, out_BNLH, log_z_BNL1)


def _block_forward(
    q_BNLH: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, places: _Places
) -> tuple[jax.Array, jax.Array]:
    """(what a block of queries gets, logarithm of the sum of its powers)."""

    def attend(number: jax.Array | int, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out_BNLH, largest_BNL1, z_BNL1 = so_far
        scores_BNLT = _block_scores(q_BNLH, k_BNSH, places, number)
        larger_BNL1 = jnp.maximum(largest_BNL1, scores_BNLT.max(axis=-1, keepdims=True))
        weights_BNLT = jnp.exp(scores_BNLT - larger_BNL1)
        v_BNTH = _cut(number, v_BNSH, 2)[0]
        part_BNLH = jnp.einsum(
            "BNLT,BNTH->BNLH", weights_BNLT.astype(v_BNTH.dtype), v_BNTH, preferred_element_type=jnp.float32
        )
        shrink_BNL1 = jnp.exp(largest_BNL1 - larger_BNL1)
        z_BNL1 = z_BNL1 * shrink_BNL1 + weights_BNLT.sum(axis=-1, keepdims=True)
        return out_BNLH * shrink_BNL1 + part_BNLH, larger_BNL1, z_BNL1

    zeros_BNLH, zeros_BNL1 = jnp.zeros(q_BNLH.shape, jnp.float32), jnp.zeros((*q_BNLH.shape[:3], 1), jnp.float32)
    start = (zeros_BNLH, zeros_BNL1 + MASKED, zeros_BNL1)
    out_BNLH, largest_BNL1, z_BNL1 = _over_keys(places, attend, start)
    return (out_BNLH / z_BNL1).astype(q_BNLH.dtype), largest_BNL1 + jnp.log(z_BNL1)


def _blocked_backward(saved: tuple[Any, ...], d_out_BNLH: jax.Array) -> tuple[jax.Array | None, ...]:
    q_BNLH, k_BNSH, v_BNSH, places, out_BNLH, log_z_BNL1 = saved
    inner_BNL1 = jnp.sum(out_BNLH.astype(jnp.float32) * d_out_BNLH.astype(jnp.float32), axis=-1, keepdims=True)
    # Sums over queries are taken as [H, L] by [L, T]: on CPU an operand that has to be turned around is slow, and what
    # is turned here is small.
    q_BNHL, d_out_BNHL = q_BNLH.swapaxes(2, 3), d_out_BNLH.swapaxes(2, 3)
    d_q = []
    d_k_BNHS = d_v_BNHS = jnp.zeros((*k_BNSH.shape[:2], k_BNSH.shape[3], k_BNSH.shape[2]), jnp.float32)
    for block, keys in _blocks(q_BNLH.shape[2], k_BNSH.shape[2]):
        of_queries = tuple(x[:, :, block] for x in (q_BNLH, d_out_BNLH, inner_BNL1, log_z_BNL1))
        of_queries += tuple(x[..., block] for x in (q_BNHL, d_out_BNHL))
        d_q_BNLH, *of_keys = _block_backward(
            of_queries,
            k_BNSH[:, :, keys],
            v_BNSH[:, :, keys],
            _places_of(block, keys, places),
            d_k_BNHS[..., keys],
            d_v_BNHS[..., keys],
        )
        d_k_BNHS, d_v_BNHS = (
            jax.lax.dynamic_update_slice_in_dim(total, part, 0, axis=3)
            for total, part in zip((d_k_BNHS, d_v_BNHS), of_keys)
        )
        d_q.append(d_q_BNLH)
    d_k_BNSH, d_v_BNSH = (x.swapaxes(2, 3).astype(q_BNLH.dtype) for x in (d_k_BNHS, d_v_BNHS))
    return jnp.concatenate(d_q, axis=2), d_k_BNSH, d_v_BNSH, None


def _block_backward(
    of_queries: tuple[jax.Array, ...],
    k_BNSH: jax.Array,
    v_BNSH: jax.Array,
    places: _Places,
    d_k_BNHS: jax.Array,
    d_v_BNHS: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(gradient of a block of queries, both totals with what it adds to those of keys and values)."""
    q_BNLH, d_out_BNLH, inner_BNL1, log_z_BNL1, q_BNHL, d_out_BNHL = of_queries
    scale, dtype = q_BNLH.shape[-1] ** -0.5, q_BNLH.dtype

    def pull(number: jax.Array | int, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_q_BNLH, d_k_BNHS, d_v_BNHS = so_far
        k_BNTH, v_BNTH = (_cut(number, x, 2)[0] for x in (k_BNSH, v_BNSH))
        weights_BNLT = jnp.exp(_block_scores(q_BNLH, k_BNSH, places, number) - log_z_BNL1)
        d_weights_BNLT = jnp.einsum("BNLH,BNTH->BNLT", d_out_BNLH, v_BNTH, preferred_element_type=jnp.float32)
        d_scores_BNLT = (weights_BNLT * (d_weights_BNLT - inner_BNL1) * scale).astype(dtype)
        d_q_BNLH += jnp.einsum("BNLT,BNTH->BNLH", d_scores_BNLT, k_BNTH, preferred_element_type=jnp.float32)
        d_k_BNHS = _added(d_k_BNHS, number, q_BNHL, d_scores_BNLT)
        return d_q_BNLH, d_k_BNHS, _added(d_v_BNHS, number, d_out_BNHL, weights_BNLT.astype(dtype))

    start = (jnp.zeros(q_BNLH.shape, jnp.float32), d_k_BNHS, d_v_BNHS)
    d_q_BNLH, d_k_BNHS, d_v_BNHS = _over_keys(places, pull, start)
    return d_q_BNLH.astype(dtype), d_k_BNHS, d_v_BNHS


def _added(total_BNHS: jax.Array, number: jax.Array | int, x_BNHL: jax.Array, y_BNLT: jax.Array) -> jax.Array:
    """The total with the product of `x` and `y` added to one block of keys, in place."""
    part_BNHT, start = _cut(number, total_BNHS, 3)
    part_BNHT += jnp.einsum("BNHL,BNLT->BNHT", x_BNHL, y_BNLT, preferred_element_type=jnp.float32)
    return jax.lax.dynamic_update_slice_in_dim(total_BNHS, part_BNHT, start, axis=3)


_blocked.defvjp(_blocked_forward, _blocked_backward)
