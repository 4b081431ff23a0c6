"""One training step as a pure function of (state, batch, learning rate): loss, gradients, update, metrics.

Every term of the objective is normalised by its weight over the whole global batch, which is known before the first
microbatch, so that no split into microbatches or devices changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aromni_jax import losses, optim, partitioning
from aromni_jax.arrays import PyTree
from aromni_jax.config import LossConfig, TrainConfig
from aromni_jax.models.config import ModelConfig
from aromni_jax.models.decoder import Decoder
from aromni_jax.models.gradient_order import gradients_together
from aromni_jax.structs import PackedBatch, WeightedSum
from aromni_jax.train.state import Frozen, TrainState, abstract_state, state_shardings
from aromni_jax.train.update import Updated, as_float32, make_update, streamed
from aromni_jax.vocab import JointVocab

StepMetrics = dict[str, Any]
"""What a step reports. WeightedSums, to be added over steps and divided by the reader: `next_token` (weighted by the
loss weights), `z_loss`, `perceptual`, and over targets that count `modality` [3], `task` [tasks], `task_modality`
[tasks, 3] (cross-entropy in nats) and `accuracy` [tasks, 3]. Sums: `weight_share` [tasks, 3] (sum of loss weights),
`num_tokens`, `num_pairs` (real tokens and attended query-key pairs, for `train_flops`), `num_rows_tokens` (padding
included). Scalars of a training step: `loss`, `grad_norm`, `learning_rate`, `is_finite`."""

_AFTER_LAYERS = ("unembedding", "perceptual_head")
"""Parameters that meet the last hidden states."""


def swin_share(train: TrainConfig, step: jax.Array) -> jax.Array | None:
    """How much of Swin-Norm the model has at `step` (batches seen): 0 at the first, 1 from `norm_blend_steps` on."""
    if not train.norm_blend_steps:
        return None
    return jnp.clip(step.astype(jnp.float32) / train.norm_blend_steps, 0.0, 1.0)


def _terms(
    decoder: Decoder,
    loss: LossConfig,
    vocab: JointVocab,
    params: PyTree,
    frozen: Frozen,
    batch: PackedBatch,
    share: jax.Array | None,
) -> tuple[losses.NextTokenSums, WeightedSum]:
    """Next-token sums and the perceptual (sum, weight) of one microbatch."""
    cast = {"params": cast_matrices(decoder.config, params)}
    hidden_BLD: Any = decoder.apply(cast, batch.inputs_BL, batch.positions_BL, batch.segment_ids_BL, swin_share=share)
    hidden_BLD, last = gradients_together(hidden_BLD, {name: params[name] for name in _AFTER_LAYERS if name in params})
    params = params | last
    next_token = losses.next_token_loss(
        hidden_BLD,
        params["unembedding"],
        batch,
        valid_mask_V=vocab.valid_mask_V,
        chunk_tokens=loss.chunk_tokens,
        z_loss_weight=loss.z_loss_weight,
    )
    if vocab.image is None or not _is_aligned(decoder.config, loss):
        return next_token, WeightedSum.zero()
    projected_BLE: Any = decoder.apply({"params": params}, hidden_BLD, method=Decoder.project)
    perceptual = losses.perceptual_loss(
        projected_BLE, batch, frozen["image_codebook"], image_start=vocab.image.start, mode=loss.perceptual_mode
    )
    return next_token, perceptual


def cast_matrices(model: ModelConfig, params: PyTree) -> PyTree:
    """`params` with the matrices of all layers in the compute type, in which a layer would use them anyway.

    Cast before the loop over layers, each device casts its own part and gathers move the narrower type.
    """

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(model.dtype) if optim.parameter_name(path) in optim.LAYER_MATRICES else leaf

    return params | {"layers": jax.tree_util.tree_map_with_path(cast, params["layers"])}


def _is_aligned(model: ModelConfig, loss: LossConfig) -> bool:
    return bool(model.perceptual_dim and loss.perceptual_weight)


def _metrics(next_token: losses.NextTokenSums, perceptual: WeightedSum, batch: PackedBatch) -> StepMetrics:
    is_real_BL = batch.segment_ids_BL > 0
    return {
        "next_token": next_token.total,
        "z_loss": next_token.z_loss,
        "perceptual": perceptual,
        "modality": next_token.modality,
        "task": next_token.task,
        "task_modality": next_token.task_modality,
        "accuracy": next_token.correct,
        "weight_share": next_token.weight_share,
        "num_tokens": is_real_BL.sum(dtype=jnp.float32),
        "num_pairs": jnp.where(is_real_BL, batch.positions_BL + 1, 0).sum(dtype=jnp.float32),
        "num_rows_tokens": jnp.float32(batch.inputs_BL.size),
    }


def split_microbatches(batch: PackedBatch, num_microbatches: int) -> PackedBatch:
    """[B, L] -> [A, B / A, L]; microbatch a takes rows a, a + A, ..., so every device keeps its own rows."""

    def split(x_BL: jax.Array) -> jax.Array:
        x_BAL = x_BL.reshape(x_BL.shape[0] // num_microbatches, num_microbatches, *x_BL.shape[1:])
        return partitioning.constrain(x_BAL.swapaxes(0, 1), None, "batch", "length")

    return jax.tree.map(split, batch)


def loss_and_gradients(
    model: ModelConfig,
    train: TrainConfig,
    vocab: JointVocab,
    params: PyTree,
    frozen: Frozen,
    batch: PackedBatch,
    share: jax.Array | None = None,
) -> tuple[jax.Array, PyTree, StepMetrics]:
    """The objective over the global batch [B, L], its float32 gradient, and metrics, in microbatches.

    Pure, and the same for every `gradient_accumulation_steps` up to the order of additions. `share`: `swin_share`.
    """
    decoder, loss = Decoder(model), train.loss
    weight = batch.loss_weights_BL.sum(dtype=jnp.float32)
    code_weight = losses.perceptual_mask(batch, loss.perceptual_mode).sum(dtype=jnp.float32)

    def objective(params: PyTree, micro: PackedBatch) -> tuple[jax.Array, StepMetrics]:
        next_token, perceptual = _terms(decoder, loss, vocab, params, frozen, micro, share)
        part = WeightedSum(next_token.objective, weight).mean()
        part += loss.perceptual_weight * WeightedSum(perceptual.sum, code_weight).mean()
        return part, _metrics(next_token, perceptual, micro)

    compute = jax.value_and_grad(objective, has_aux=True)

    def as_float32(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    if train.gradient_accumulation_steps == 1:
        (value, metrics), gradients = compute(params, batch)
        return value, as_float32(gradients), metrics

    def body(total: tuple[Any, ...], micro: PackedBatch) -> tuple[tuple[Any, ...], None]:
        (value, metrics), gradients = compute(params, micro)
        return jax.tree.map(jnp.add, total, (value, as_float32(gradients), metrics)), None

    micros = split_microbatches(batch, train.gradient_accumulation_steps)
    first = jax.tree.map(lambda x: x[0], micros)
    (value_shape, metric_shapes), _ = jax.eval_shape(compute, params, first)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value_shape, metric_shapes))
    start = (zero[0], jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params), zero[1])
    (value, gradients, metrics), _ = jax.lax.scan(body, start, micros)
    return value, gradients, metrics


def make_train_step(
    model: ModelConfig, train: TrainConfig, mesh: Mesh, vocab: JointVocab, frozen: Frozen | None = None
) -> Callable[[TrainState, PackedBatch, Any], tuple[TrainState, StepMetrics]]:
    """A jitted `(state, batch, rate) -> (state, metrics)`; the state is donated, every leaf has a NamedSharding.

    `batch` is the global batch [B, L] (`partitioning.put_batch`); `frozen` gives the shapes of `state.frozen`;
    `rate` is the learning rate of this step, a float32 scalar (`make_learning_rate`), so that no schedule is part of
    the program. A step whose loss or gradient is not finite leaves parameters, optimizer and average as they were, adds
    one to `skipped_steps`, and still advances `step`. The result has `.lower(*abstract_inputs(...))`.

    Raises:
      ValueError: rows that do not divide over microbatches and devices; a perceptual loss without its codebook.
    """
    optimizer = optim.make_optimizer(train.optimizer)
    _check(model, train, mesh, vocab, frozen)

    def step(state: TrainState, batch: PackedBatch, rate: jax.Array) -> tuple[TrainState, StepMetrics]:
        # Gradients of float32 values, also where these are rounded: an embedding sums those of all its tokens.
        params = as_float32(state.params)
        share = swin_share(train, state.step)
        value, gradients, metrics = loss_and_gradients(model, train, vocab, params, state.frozen, batch, share)
        norm = optim.global_norm(gradients)
        is_finite = jnp.isfinite(value) & jnp.isfinite(norm)
        gradients = optim.clip_by_norm(gradients, norm, train.optimizer.clip_norm)
        update = make_update(optimizer, train.optimizer.ema_decay, rate, is_finite)
        if train.optimizer.offload:
            update = streamed(update)
        updated = update(Updated(state.params, state.opt_state, state.master, state.ema), gradients)
        new_state = TrainState(
            step=state.step + 1,
            rng=state.rng,
            frozen=state.frozen,
            skipped_steps=state.skipped_steps + ~is_finite,
            **updated._asdict(),
        )
        scalars = {"loss": value, "grad_norm": norm, "learning_rate": rate, "is_finite": is_finite}
        return new_state, metrics | scalars

    placement = state_shardings(abstract_state(model, train, mesh, frozen))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        partitioning.on_mesh(step, mesh),
        in_shardings=(placement, partitioning.batch_sharding(mesh), everywhere),
        out_shardings=(placement, everywhere),
        donate_argnums=0,
    )


def make_learning_rate(train: TrainConfig, mesh: Mesh) -> Callable[[int], jax.Array]:
    """`rate(step)`, the learning rate of the step after `step` steps, on all devices of the mesh.

    Nobody waits for it: it is a program of its own that the devices run before the step.

    Raises:
      ValueError: warm-up and decay do not fit into the run.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    schedule = optim.make_schedule(train.optimizer, train.total_steps)
    rate = jax.jit(schedule, in_shardings=everywhere, out_shardings=everywhere)
    return lambda step: rate(np.int32(step))


def abstract_inputs(
    model: ModelConfig, train: TrainConfig, mesh: Mesh, frozen: Frozen | None = None
) -> tuple[TrainState, PackedBatch, Any]:
    """State, global batch and learning rate of a train step as `jax.ShapeDtypeStruct`s with shardings."""
    placement = partitioning.batch_sharding(mesh)
    shape = (train.global_batch_size, train.sequence_length)

    def field(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement)

    ids = field(np.int32)
    batch = PackedBatch(ids, ids, ids, ids, field(np.float32), ids, ids, field(np.bool_))
    rate = jax.ShapeDtypeStruct((), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    return abstract_state(model, train, mesh, frozen), batch, rate


def make_eval_step(
    model: ModelConfig, train: TrainConfig, mesh: Mesh, vocab: JointVocab, frozen: Frozen | None = None
) -> Callable[[PyTree, Frozen, PackedBatch, jax.Array], StepMetrics]:
    """A jitted `(params, frozen, batch, step) -> metrics` without scalars: add them over batches, then divide once."""
    _check(model, train, mesh, vocab, frozen)
    decoder = Decoder(model)

    def evaluate(params: PyTree, frozen: Frozen, batch: PackedBatch, step: jax.Array) -> StepMetrics:
        share = swin_share(train, step)
        next_token, perceptual = _terms(decoder, train.loss, vocab, params, frozen, batch, share)
        return _metrics(next_token, perceptual, batch)

    placement = state_shardings(abstract_state(model, train, mesh, frozen))
    return jax.jit(
        partitioning.on_mesh(evaluate, mesh),
        in_shardings=(placement.params, placement.frozen, partitioning.batch_sharding(mesh), placement.step),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def _check(model: ModelConfig, train: TrainConfig, mesh: Mesh, vocab: JointVocab, frozen: Frozen | None) -> None:
    partitioning.local_rows(mesh, train.global_batch_size)
    rows = train.global_batch_size // train.gradient_accumulation_steps
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        raise ValueError(
            f"global_batch_size {train.global_batch_size} in {train.gradient_accumulation_steps} microbatches gives "
            f"{rows} rows each, which do not divide over data x fsdp = {ways}"
        )
    if train.sequence_length % mesh.shape["context"]:
        raise ValueError(
            f"sequence_length {train.sequence_length} does not divide over the context axis of {mesh.shape['context']}"
        )
    if train.norm_blend_steps and model.norm_position != "swin":
        raise ValueError(
            f"norm_blend_steps = {train.norm_blend_steps} turns a pre-norm model into a Swin-Norm one, but this run "
            f"has norm_position = {model.norm_position!r}; set model.norm_position to 'swin', or norm_blend_steps to 0"
        )
    if model.vocab_size != vocab.size:
        raise ValueError(f"the model has {model.vocab_size} rows, the vocabulary {vocab.size}")
    if not _is_aligned(model, train.loss) or vocab.image is None:
        return
    codebook = (frozen or {}).get("image_codebook")
    wanted = (vocab.image.size, model.perceptual_dim)
    if codebook is None or tuple(codebook.shape) != wanted:
        raise ValueError(
            f"loss.perceptual_weight = {train.loss.perceptual_weight} needs frozen['image_codebook'] {wanted}, "
            f"got {None if codebook is None else tuple(codebook.shape)}; set the weight to 0 to train without alignment"
        )
