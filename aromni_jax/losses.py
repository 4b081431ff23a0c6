"""The objective as sums and weights: chunked next-token loss with z-loss, and perceptual alignment.

Nothing here divides by a weight: a sum and its weight are returned, added over chunks, microbatches and devices by the
caller, and divided once (`WeightedSum.mean`). The loss owns the unembedding, so logits exist for one chunk at a time.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from aromni_jax.arrays import BoolArray, FloatArray
from aromni_jax.partitioning import constrain, num_batch_shards
from aromni_jax.structs import Modality, PackedBatch, Task, WeightedSum

INVALID_LOGIT = -1e30
"""Logit of rows that pad the embedding table: probability 0 and gradient 0, yet finite."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NextTokenSums:
    """What one pass over the targets yields.

    `total` and `z_loss` are weighted by the loss weights and are what is trained: total.sum is the sum of w * CE, its
    weight the sum of w. `task_modality` [tasks, modalities] is plain cross-entropy over the targets that count (w > 0),
    its weight their number; `correct` likewise counts targets whose logit is the largest. `weight_share`
    [tasks, modalities] is the sum of w: who owns the objective.
    """

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
) -> NextTokenSums:
    """Weighted cross-entropy of the next token and the square of the log-partition (z-loss), both in float32.

    `chunk_tokens` bounds how many tokens of one device have logits in memory at once. Rows of the table outside
    `valid_mask_V` get probability zero. Only `total.sum` and `z_loss.sum` carry gradients.
    """
    B, L, D = hidden_BLD.shape
    chunk_length = _chunk_length(L, max(1, chunk_tokens * num_batch_shards() // B))
    table_VD = unembedding_VD.astype(hidden_BLD.dtype)
    bias_V = jnp.where(valid_mask_V, 0.0, INVALID_LOGIT)

    def chunked(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, L // chunk_length, chunk_length, *x.shape[2:]), 1, 0)

    def body(sums: NextTokenSums, chunk: tuple[jax.Array, ...]) -> tuple[NextTokenSums, None]:
        return jax.tree.map(jnp.add, sums, _chunk_sums(table_VD, bias_V, *chunk)), None

    cells = (len(Task), len(Modality))
    zero = NextTokenSums(
        WeightedSum.zero(), WeightedSum.zero(), WeightedSum.zero(cells), WeightedSum.zero(cells), jnp.zeros(cells)
    )
    facts = (batch.targets_BL, batch.loss_weights_BL, batch.task_BL, batch.modality_BL)
    if chunk_length < L:
        # Logits of one chunk at a time, computed again for the backward pass.
        body = jax.checkpoint(body, prevent_cse=False)
    sums, _ = jax.lax.scan(body, zero, tuple(map(chunked, (hidden_BLD, *facts))))
    return sums


def _chunk_length(length: int, wanted: int) -> int:
    """The largest divisor of `length` that is at most `wanted`."""
    return max(size for size in range(1, min(length, wanted) + 1) if length % size == 0)


def _chunk_sums(
    table_VD: jax.Array,
    bias_V: jax.Array,
    hidden_BLD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    task_BL: jax.Array,
    modality_BL: jax.Array,
) -> NextTokenSums:
    logits_BLV = jnp.einsum("BLD,VD->BLV", hidden_BLD, table_VD, preferred_element_type=jnp.float32) + bias_V
    logits_BLV = constrain(logits_BLV, "batch", None, "vocab")
    largest_BL = jax.lax.stop_gradient(logits_BLV.max(axis=-1))
    log_z_BL = largest_BL + jnp.log(jnp.exp(logits_BLV - largest_BL[..., None]).sum(axis=-1))
    # Comparing with iota instead of gathering keeps a vocabulary split over devices where it is.
    is_target_BLV = jnp.arange(logits_BLV.shape[-1]) == targets_BL[..., None]
    target_logit_BL = jnp.where(is_target_BLV, logits_BLV, 0).sum(axis=-1)
    loss_BL = log_z_BL - target_logit_BL
    weights_BL = weights_BL.astype(jnp.float32)
    weight = weights_BL.sum()

    cell_BL = task_BL.astype(jnp.int32) * len(Modality) + modality_BL
    cells_BLX = jax.nn.one_hot(cell_BL, len(Task) * len(Modality), dtype=jnp.float32)

    def by_cell(values_BL: jax.Array) -> jax.Array:
        return jnp.einsum("BL,BLX->X", values_BL, cells_BLX).reshape(len(Task), len(Modality))

    counts_BL = (weights_BL > 0).astype(jnp.float32)
    counted = by_cell(counts_BL)
    plain_loss_BL = jax.lax.stop_gradient(loss_BL)
    correct_BL = (target_logit_BL >= largest_BL).astype(jnp.float32)
    return NextTokenSums(
        total=WeightedSum((weights_BL * loss_BL).sum(), weight),
        z_loss=WeightedSum((weights_BL * jnp.square(log_z_BL)).sum(), weight),
        task_modality=WeightedSum(by_cell(counts_BL * plain_loss_BL), counted),
        correct=WeightedSum(by_cell(counts_BL * jax.lax.stop_gradient(correct_BL)), counted),
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
