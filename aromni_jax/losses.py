"""The objective as sums and weights: next-token loss and z-loss without all logits at once, perceptual alignment.

Nothing here divides by a weight: a sum and its weight are returned, added over chunks, microbatches and devices by the
caller, and divided once (`WeightedSum.mean`). The loss owns the unembedding, so logits exist for a part at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from aromni_jax.arrays import BoolArray, FloatArray
from aromni_jax.partitioning import constrain, device_kind
from aromni_jax.structs import Modality, PackedBatch, Task, WeightedSum

INVALID_LOGIT = -1e30
"""Logit of rows that pad the embedding table: probability 0 and gradient 0, yet finite."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NextTokenSums:
    """What one pass over the targets yields.

    `objective` is what is trained, and alone carries gradients: the sum of w * (CE + z_loss_weight * log_z^2).
    `total` and `z_loss` are its two terms, weighted by the loss weights: total.sum is the sum of w * CE, its weight the
    sum of w. `task_modality` [tasks, modalities] is plain cross-entropy over the targets that count (w > 0), its weight
    their number; `correct` likewise counts targets whose logit is the largest. `weight_share` [tasks, modalities] is
    the sum of w: who owns the objective.
    """

    objective: jax.Array
    total: WeightedSum
    z_loss: WeightedSum
    task_modality: WeightedSum
    correct: WeightedSum
    weight_share: jax.Array

    @property
    def modality(self) -> WeightedSum:
        """Cross-entropy per modality [3]."""
        return WeightedSum(self.task_modality.sum.sum(0), self.task_modality.weight.sum(0))

    @property
    def task(self) -> WeightedSum:
        """Cross-entropy per task [len(Task)]."""
        return WeightedSum(self.task_modality.sum.sum(1), self.task_modality.weight.sum(1))


def next_token_loss(
    hidden_BLD: jax.Array,
    unembedding_VD: jax.Array,
    batch: PackedBatch,
    *,
    valid_mask_V: BoolArray,
    chunk_tokens: int,
    z_loss_weight: float,
) -> NextTokenSums:
    """Weighted cross-entropy of the next token and the square of the log-partition (z-loss), both in float32.

    A device holds logits of at most `chunk_tokens` tokens at once, or as many values: with more tokens, one device
    takes chunks of them and (not on a GPU) passes over those that do not count; several go through the vocabulary in
    blocks. Rows of the table outside `valid_mask_V` get probability zero. Only `objective` carries gradients.
    """
    B, L, D = hidden_BLD.shape
    mesh = jax.sharding.get_abstract_mesh()
    devices, tensor = (1, 1) if mesh.empty else (mesh.size, mesh.shape["tensor"])
    bias_V = jnp.where(valid_mask_V, 0.0, INVALID_LOGIT)
    targets_BL = jnp.asarray(batch.targets_BL)
    weights_BL = jnp.asarray(batch.loss_weights_BL, jnp.float32)
    if devices == 1:
        num_chunks = -(-B * L // chunk_tokens)
        chunk = -(-B * L // num_chunks)
        by_token = hidden_BLD.reshape(-1, D), targets_BL.reshape(-1), weights_BL.reshape(-1)
        objective, of_tokens = _chunked(chunk, z_loss_weight, _Inputs(unembedding_VD, bias_V, *by_token))
        log_z_BL, target_logit_BL, largest_BL = (x_T.reshape(B, L) for x_T in of_tokens)
    else:
        num_blocks = count_blocks(unembedding_VD.shape[0], B * L / devices, chunk_tokens, tensor)
        over_vocabulary = _whole if num_blocks == 1 else functools.partial(_blocked, num_blocks)
        table_VD = unembedding_VD.astype(hidden_BLD.dtype)
        log_z_BL, target_logit_BL, largest_BL = over_vocabulary(hidden_BLD, table_VD, bias_V, targets_BL)
        objective = _objective(z_loss_weight, (log_z_BL, target_logit_BL, largest_BL), weights_BL)
    return _sums(objective, jax.lax.stop_gradient((log_z_BL, target_logit_BL, largest_BL)), weights_BL, batch)


def count_blocks(vocab_size: int, tokens_per_device: float, chunk_tokens: int, tensor: int) -> int:
    """The least number of equal blocks of the vocabulary that keeps a device's logits within bounds.

    Logits are split over every axis of the mesh, a block over the `tensor` devices of that axis.
    """
    wanted = tokens_per_device / max(1, chunk_tokens)
    rows = vocab_size // tensor
    return min(count for count in range(1, rows + 1) if rows % count == 0 and (count >= wanted or count == rows))


OverVocabulary = tuple[jax.Array, jax.Array, jax.Array]
"""[B, L] each, float32: log-partition, logit of the target, and largest logit (which carries no gradient)."""


def _logits(hidden_BLD: jax.Array, table_VD: jax.Array, bias_V: jax.Array) -> jax.Array:
    logits_BLV = jnp.einsum("BLD,VD->BLV", hidden_BLD, table_VD, preferred_element_type=jnp.float32) + bias_V
    return constrain(logits_BLV, "batch", "length", "vocab")


def _whole(hidden_BLD: jax.Array, table_VD: jax.Array, bias_V: jax.Array, targets_BL: jax.Array) -> OverVocabulary:
    """With all logits in memory: the reference of `_blocked`."""
    logits_BLV = _logits(hidden_BLD, table_VD, bias_V)
    largest_BL = jax.lax.stop_gradient(logits_BLV.max(axis=-1))
    log_z_BL = largest_BL + jnp.log(jnp.exp(logits_BLV - largest_BL[..., None]).sum(axis=-1))
    # Comparing with iota instead of gathering keeps a vocabulary split over devices where it is.
    is_target_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
    return log_z_BL, jnp.where(is_target_BLV, logits_BLV, 0).sum(axis=-1), largest_BL


def _blocks(num_blocks: int, table_VD: jax.Array, bias_V: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(table [blocks, W, D], bias [blocks, W], ids [blocks, W]): block i has rows i, i + blocks, ..., so that every
    device of the tensor axis owns a part of each block. D stays split over fsdp until a block is used."""
    ids_nW = jnp.arange(table_VD.shape[0]).reshape(-1, num_blocks).T
    table_WnD = table_VD.reshape(-1, num_blocks, table_VD.shape[1])
    table_nWD = constrain(table_WnD.swapaxes(0, 1), None, "vocab", "embed")
    return table_nWD, bias_V.reshape(-1, num_blocks).T, ids_nW


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(
    num_blocks: int, hidden_BLD: jax.Array, table_VD: jax.Array, bias_V: jax.Array, targets_BL: jax.Array
) -> OverVocabulary:
    """`_whole` with logits of one block of the vocabulary at a time, computed again for the backward pass.

    A device gathers the table block by block, forward and backward, and its gradient leaves the device block by block.
    """
    return _blocked_forward(num_blocks, hidden_BLD, table_VD, bias_V, targets_BL)[0]


def _blocked_forward(
    num_blocks: int, hidden_BLD: jax.Array, table_VD: jax.Array, bias_V: jax.Array, targets_BL: jax.Array
) -> tuple[OverVocabulary, tuple[jax.Array, ...]]:
    def body(carry: OverVocabulary, block: tuple[jax.Array, ...]) -> tuple[OverVocabulary, None]:
        largest_BL, z_BL, target_logit_BL = carry
        table_WD, bias_W, ids_W = block
        logits_BLW = _logits(hidden_BLD, constrain(table_WD, "vocab", None), bias_W)
        new_largest_BL = jnp.maximum(largest_BL, logits_BLW.max(axis=-1))
        z_BL = z_BL * jnp.exp(largest_BL - new_largest_BL) + jnp.exp(logits_BLW - new_largest_BL[..., None]).sum(
            axis=-1
        )
        target_logit_BL += jnp.where(ids_W == targets_BL[..., None], logits_BLW, 0).sum(axis=-1)
        return (new_largest_BL, z_BL, target_logit_BL), None

    zero_BL = jnp.zeros(targets_BL.shape, jnp.float32)
    blocks = _blocks(num_blocks, table_VD, bias_V)
    (largest_BL, z_BL, target_logit_BL), _ = jax.lax.scan(body, (zero_BL + INVALID_LOGIT, zero_BL, zero_BL), blocks)
    log_z_BL = largest_BL + jnp.log(z_BL)
    return (log_z_BL, target_logit_BL, largest_BL), (hidden_BLD, table_VD, bias_V, targets_BL, log_z_BL)


def _blocked_backward(
    num_blocks: int, saved: tuple[jax.Array, ...], d_out: OverVocabulary
) -> tuple[jax.Array | None, ...]:
    hidden_BLD, table_VD, bias_V, targets_BL, log_z_BL = saved
    d_log_z_BL, d_target_logit_BL, _ = d_out

    def body(d_hidden_BLD: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        table_WD, bias_W, ids_W = block
        table_WD = constrain(table_WD, "vocab", None)
        probability_BLW = jnp.exp(_logits(hidden_BLD, table_WD, bias_W) - log_z_BL[..., None])
        d_target_BLW = jnp.where(ids_W == targets_BL[..., None], d_target_logit_BL[..., None], 0)
        d_logits_BLW = (probability_BLW * d_log_z_BL[..., None] + d_target_BLW).astype(hidden_BLD.dtype)
        # XLA on CPUs turns the left operand around, and the other one is far larger.
        d_table_WD = jnp.einsum("BLD,BLW->DW", hidden_BLD, d_logits_BLW).T
        d_hidden_BLD += jnp.einsum("BLW,WD->BLD", d_logits_BLW, table_WD, preferred_element_type=jnp.float32)
        return constrain(d_hidden_BLD, "batch", "length", None), constrain(d_table_WD, "vocab", "embed")

    start_BLD = jnp.zeros(hidden_BLD.shape, jnp.float32)
    d_hidden_BLD, d_table_nWD = jax.lax.scan(body, start_BLD, _blocks(num_blocks, table_VD, bias_V))
    return d_hidden_BLD.astype(hidden_BLD.dtype), d_table_nWD.swapaxes(0, 1).reshape(table_VD.shape), None, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


class _Inputs(NamedTuple):
    """What the loss of T tokens on one device is made of. Gradients belong to the first and the third."""

    unembedding_VD: jax.Array
    bias_V: jax.Array
    hidden_TD: jax.Array
    targets_T: jax.Array
    weights_T: jax.Array


OverTokens = tuple[jax.Array, jax.Array, jax.Array]
"""[T] each, float32: what `OverVocabulary` is by row and position. Without meaning where a token does not count."""


def _objective(z_loss_weight: float, over_vocabulary: OverVocabulary | OverTokens, weights: jax.Array) -> jax.Array:
    log_z, target_logit, _ = over_vocabulary
    return (weights * (log_z - target_logit + z_loss_weight * jnp.square(log_z))).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(chunk: int, z_loss_weight: float, inputs: _Inputs) -> tuple[jax.Array, OverTokens]:
    """(objective, by token) with logits of `chunk` tokens at a time, of which the gradient is taken at once.

    The objective is one number, so the gradient of what follows is one factor, and no logits are computed twice.
    """
    of_tokens, _ = _walk(chunk, None, inputs)
    return _objective(z_loss_weight, of_tokens, inputs.weights_T), of_tokens


def _walk(chunk: int, z_loss_weight: float | None, inputs: _Inputs) -> tuple[OverTokens, tuple[jax.Array, ...]]:
    """What `_chunked` says of each token and, where a weight of the z-loss is given, the gradient of the table turned
    around [D, V] and that of the hidden states [T, D], both float32.

    Tokens that count come first, and nothing is done for chunks without any: not on a GPU, which stands still until the
    host knows their number and has launched the backward pass (17 of 400 ms on an H200).
    """
    unembedding_VD, bias_V, hidden_TD, targets_T, weights_T = inputs
    T, D = hidden_TD.shape
    padding = (0, -T % chunk)
    weights_T = jnp.pad(weights_T, padding)
    order_T = jnp.argsort(weights_T <= 0, stable=True)
    weights_T, targets_T = weights_T[order_T], jnp.pad(targets_T, padding)[order_T]
    hidden_TD = jnp.pad(hidden_TD, (padding, (0, 0)))[order_T]
    table_VD = unembedding_VD.astype(hidden_TD.dtype)
    ids_V = jnp.arange(table_VD.shape[0])

    def body(number: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        of_tokens, gradients = state
        start = number * chunk
        hidden_CD, targets_C, weights_C = (
            jax.lax.dynamic_slice_in_dim(x, start, chunk) for x in (hidden_TD, targets_T, weights_T)
        )

        def put(whole: jax.Array, part: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0)

        logits_CV = jnp.einsum("CD,VD->CV", hidden_CD, table_VD, preferred_element_type=jnp.float32) + bias_V
        largest_C = logits_CV.max(axis=-1)
        power_CV = jnp.exp(logits_CV - largest_C[:, None])
        z_C = power_CV.sum(axis=-1)
        log_z_C = largest_C + jnp.log(z_C)
        target_logit_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1)[:, 0]
        of_tokens = tuple(map(put, of_tokens, (log_z_C, target_logit_C, largest_C)))
        if z_loss_weight is not None:
            d_table_DV, d_hidden_TD = gradients
            d_log_z_C = weights_C * (1 + 2 * z_loss_weight * log_z_C)
            d_target_CV = jnp.where(ids_V == targets_C[:, None], weights_C[:, None], 0)
            d_logits_CV = (power_CV * (d_log_z_C / z_C)[:, None] - d_target_CV).astype(hidden_CD.dtype)
            hidden_DC = hidden_CD.T
            if device_kind() == "cpu":
                # In memory, too: else XLA takes a product that is three times slower with an output that wide.
                hidden_DC = jax.lax.optimization_barrier(hidden_DC)
            d_table_DV += jnp.einsum("DC,CV->DV", hidden_DC, d_logits_CV, preferred_element_type=jnp.float32)
            d_hidden_CD = jnp.einsum("CV,VD->CD", d_logits_CV, table_VD, preferred_element_type=jnp.float32)
            gradients = d_table_DV, put(d_hidden_TD, d_hidden_CD)
        return of_tokens, gradients

    zero_T = jnp.zeros(len(order_T), jnp.float32)
    gradients: tuple[jax.Array, ...] = ()
    if z_loss_weight is not None:
        gradients = jnp.zeros(table_VD.shape[::-1], jnp.float32), jnp.zeros(hidden_TD.shape, jnp.float32)
    num_chunks: int | jax.Array = len(order_T) // chunk
    if not device_kind().startswith("NVIDIA"):
        num_chunks = -(-(weights_T > 0).sum() // chunk)
    of_tokens, gradients = jax.lax.fori_loop(0, num_chunks, body, ((zero_T,) * 3, gradients))
    back_T = jnp.argsort(order_T)[:T]
    if gradients:
        gradients = gradients[0], gradients[1][back_T]
    return tuple(x_T[back_T] for x_T in of_tokens), gradients


def _chunked_forward(
    chunk: int, z_loss_weight: float, inputs: _Inputs
) -> tuple[tuple[jax.Array, OverTokens], tuple[jax.Array, ...]]:
    of_tokens, gradients = _walk(chunk, z_loss_weight, inputs)
    # Of the inputs only their types are needed.
    saved = (*gradients, inputs.unembedding_VD[:0], inputs.hidden_TD[:0])
    return (_objective(z_loss_weight, of_tokens, inputs.weights_T), of_tokens), saved


def _chunked_backward(
    chunk: int, z_loss_weight: float, saved: tuple[jax.Array, ...], d_out: tuple[jax.Array, OverTokens]
) -> tuple[tuple[jax.Array | None, ...]]:
    d_table_DV, d_hidden_TD, unembedding, hidden = saved
    factor, _ = d_out
    d_table_VD = (factor * d_table_DV.T).astype(unembedding.dtype)
    return (_Inputs(d_table_VD, None, (factor * d_hidden_TD).astype(hidden.dtype), None, None),)  # type: ignore[arg-type]


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _sums(
    objective: jax.Array, over_vocabulary: OverVocabulary, weights_BL: jax.Array, batch: PackedBatch
) -> NextTokenSums:
    log_z_BL, target_logit_BL, largest_BL = over_vocabulary
    loss_BL = log_z_BL - target_logit_BL
    weight = weights_BL.sum()

    cell_BL = batch.task_BL.astype(jnp.int32) * len(Modality) + batch.modality_BL
    cells_BLX = jax.nn.one_hot(cell_BL, len(Task) * len(Modality), dtype=jnp.float32)

    def by_cell(values_BL: jax.Array) -> jax.Array:
        return jnp.einsum("BL,BLX->X", values_BL, cells_BLX).reshape(len(Task), len(Modality))

    counts_BL = (weights_BL > 0).astype(jnp.float32)
    counted = by_cell(counts_BL)
    correct_BL = (target_logit_BL >= largest_BL).astype(jnp.float32)
    return NextTokenSums(
        objective=objective,
        total=WeightedSum((weights_BL * loss_BL).sum(), weight),
        z_loss=WeightedSum((weights_BL * jnp.square(log_z_BL)).sum(), weight),
        task_modality=WeightedSum(by_cell(counts_BL * loss_BL), counted),
        correct=WeightedSum(by_cell(counts_BL * correct_BL), counted),
        weight_share=by_cell(weights_BL),
    )


def perceptual_mask(batch: PackedBatch, mode: Literal["predict", "official"]) -> jax.Array:
    """bool [B, L]: positions whose state is compared with an image code that counts (see `perceptual_loss`)."""
    if mode == "predict":
        return jnp.asarray(batch.perceptual_mask_BL)
    same_document = batch.segment_ids_BL[:, 1:] == batch.segment_ids_BL[:, :-1]
    read_mask = batch.perceptual_mask_BL[:, :-1] & same_document
    return jnp.pad(read_mask, ((0, 0), (1, 0)))


def perceptual_loss(
    projected_BLE: jax.Array,
    batch: PackedBatch,
    codebook_CE: FloatArray,
    *,
    image_start: int,
    mode: Literal["predict", "official"],
) -> WeightedSum:
    """Squared distance, averaged over E, between projected states and the frozen embedding of their image code.

    With image codes 7 8 9 in a document,

        inputs   boi  7   8   9  eoi          "predict" compares the state at boi with 7, at 7 with 8, at 8 with 9
        targets    7  8   9  eoi ...          "official" compares the state at 7 with 7, at 8 with 8, at 9 with 9

    The second is what the released code does (METHOD 8.2): the state has read the code it is compared with. The weight
    is the number of compared codes. Source: paper equation 3.
    """
    tokens_BL = batch.targets_BL if mode == "predict" else batch.inputs_BL
    mask_BL = perceptual_mask(batch, mode)
    codes_BL = jnp.where(mask_BL, tokens_BL - image_start, 0)
    wanted_BLE = jax.lax.stop_gradient(jnp.asarray(codebook_CE, jnp.float32))[codes_BL]
    distance_BL = jnp.mean(jnp.square(projected_BLE.astype(jnp.float32) - wanted_BLE), axis=-1)
    return WeightedSum(jnp.where(mask_BL, distance_BL, 0).sum(), mask_BL.sum(dtype=jnp.float32))
