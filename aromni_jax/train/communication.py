"""How many bytes a device sends in a training step, per mesh axis, from the sharding rules.

What the compiler makes of the rules was read from compiled programs, and a test compares them with this. Of n devices,
each sends (n - 1) / n of an array that is gathered, scattered or exchanged, and twice that of one that is summed
everywhere. Left out, because they are small: ids, gains of norms, metrics.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from aromni_jax import losses
from aromni_jax.config import TrainConfig
from aromni_jax.models.config import ModelConfig
from aromni_jax.partitioning import MESH_AXES

_FLOAT32 = 4


def communication_bytes(model: ModelConfig, train: TrainConfig, shape: Mapping[str, int]) -> dict[str, float]:
    """Bytes that one device sends in a step over each axis of a mesh of this `shape`.

    fsdp: matrices gathered for the forward and for the backward pass, their gradients summed (the compiler makes
    all-reduces of these, also where a device keeps only its part), rows of the embedding and their gradients exchanged.
    data, context: gradients of what a device keeps summed, after fsdp. tensor: activations summed behind each pair of
    split matrices, and the gradient of the hidden states once a block of the vocabulary. context: keys and values
    gathered, their gradients summed where they came from.
    """
    data, fsdp, context, tensor = (shape[axis] for axis in MESH_AXES)
    size = jnp.dtype(model.dtype).itemsize
    micro = train.gradient_accumulation_steps
    tokens = train.global_batch_size * train.sequence_length / (data * fsdp * context)
    matrices = _matrix_parameters(model) / tensor * size
    table = model.vocab_size * model.d_model / (tensor * fsdp) * _FLOAT32
    blocks = losses.count_blocks(model.vocab_size, tokens / (tensor * micro), train.loss.chunk_tokens, tensor)
    rows = tokens * model.d_model * size
    # Gradients of matrices are summed over fsdp whole, then over the other axes the part that a device keeps.
    kept = micro * (matrices / fsdp + table)
    return {
        "data": 2 * _share(data) * kept / context,
        "fsdp": _share(fsdp) * (micro * 4 * matrices + 2 * rows),
        "context": 2 * _share(context) * kept + _keys_and_values(model, context, tensor, tokens) * size,
        "tensor": 2 * _share(tensor) * rows * (1 + model.num_layers * _summed_activations(model))
        + 2 * _share(tensor) * tokens * _FLOAT32 * blocks * (model.d_model + 3),
    }


def _share(ways: int) -> float:
    return (ways - 1) / ways


def _matrix_parameters(c: ModelConfig) -> int:
    """Of the layers and the unembedding."""
    layer = c.d_model * (2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.mlp_dim)
    return c.num_layers * layer + c.vocab_size * c.d_model


def _summed_activations(c: ModelConfig) -> int:
    """Arrays [B, L, D] of a layer that are summed over tensor: what attention and MLP return, again where that is
    computed again, and the gradients that q, k, v, gate and up each send back."""
    forward = {"none": 2, "dots": 2}.get(c.remat, 4)
    return forward + 5


def _keys_and_values(c: ModelConfig, context: int, tensor: int, tokens: float) -> float:
    """Values sent over context for attention: gathered whenever attention runs or its backward pass begins."""
    width = 2 * c.num_kv_heads / tensor * c.head_dim
    gathers = {"none": 1, "dots": 2, "attention": 2}.get(c.remat, 3)
    return c.num_layers * (gathers + 1) * (context - 1) * tokens * width
