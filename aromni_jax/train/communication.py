"""How many bytes a device sends in a training step, per mesh axis, from the sharding rules.

What the compilers make of the rules was read from compiled programs, and tests compare them with this, for CPUs and for
TPUs. Of n devices, each sends (n - 1) / n of an array that is gathered, scattered or exchanged, and twice that of one
that is summed everywhere. Left out, because they are small: ids, gains of norms, metrics.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.sharding import Mesh

from aromni_jax import losses
from aromni_jax.config import TrainConfig
from aromni_jax.models.config import ModelConfig
from aromni_jax.partitioning import MESH_AXES

_FLOAT32 = 4
_RING_OF_PARTS = range(8, 33)
"""Over fsdp of so many TPUs, and no data beside it, products pass parts of matrices around a ring."""


def communication_bytes(model: ModelConfig, train: TrainConfig, mesh: Mesh) -> dict[str, float]:
    """Bytes that one device sends in a step over each axis of `mesh`, whose devices need not be here.

    fsdp: matrices gathered for the forward and for the backward pass, their gradients summed, rows of the embedding and
    their gradients exchanged. On TPUs a device gets its part of a sum alone, but where fsdp takes the whole of a large
    slice: there the compiler prefers an all-reduce, which goes along all dimensions at once, and with three of them it
    gathers by one, too. On CPUs sums are all-reduces always.
    data, context: gradients of what a device keeps summed, after fsdp. tensor: activations summed behind each pair of
    split matrices, and the gradient of the hidden states, on TPUs once, on CPUs for every block of the vocabulary.
    context: keys and values gathered, their gradients summed where they came from.
    """
    data, fsdp, context, tensor = (mesh.shape[axis] for axis in MESH_AXES)
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    in_ring = on_tpu and data == context == 1 and fsdp in _RING_OF_PARTS
    takes_slice = on_tpu and fsdp == mesh.size // train.mesh.num_slices and fsdp >= _RING_OF_PARTS.stop
    gathering = 2 if takes_slice and _dimensions(mesh) == 3 else 1
    summing = 2 if takes_slice or not on_tpu else 1
    size = jnp.dtype(model.dtype).itemsize
    micro = train.gradient_accumulation_steps
    tokens = train.global_batch_size * train.sequence_length / (data * fsdp * context)
    matrices = _matrix_parameters(model) / tensor * size
    table = model.vocab_size * model.d_model / (tensor * fsdp) * _FLOAT32
    blocks = losses.count_blocks(model.vocab_size, tokens / (tensor * micro), train.loss.chunk_tokens, tensor)
    rows = tokens * model.d_model * size
    hidden = rows if on_tpu else blocks * tokens * model.d_model * _FLOAT32
    # q, k and v are gathered once more where attention is computed again, as the compiler for TPUs does not keep them.
    again = _attention_inputs(model) / tensor * size if on_tpu and model.remat == "full" else 0
    # Gradients of matrices are summed over fsdp whole, then over the other axes the part that a device keeps.
    kept = micro * (matrices / fsdp + table)
    # A ring passes every part once more than needed, back to where it came from.
    passed = 1.0 if in_ring else _share(fsdp)
    return {
        "data": 2 * _share(data) * kept / context,
        "fsdp": passed * micro * (gathering * (2 * matrices + again) + summing * matrices) + 2 * _share(fsdp) * rows,
        "context": 2 * _share(context) * kept + _keys_and_values(model, context, tensor, tokens) * size,
        "tensor": 2 * _share(tensor) * rows * (1 + model.num_layers * _summed_activations(model, on_tpu))
        + 2 * _share(tensor) * (hidden + blocks * tokens * 3 * _FLOAT32),
    }


def _dimensions(mesh: Mesh) -> int:
    """In how many directions the TPUs of a mesh are wired."""
    return sum(len(set(line)) > 1 for line in zip(*(device.coords for device in mesh.devices.flat), strict=True))


def _share(ways: int) -> float:
    return (ways - 1) / ways


def _matrix_parameters(c: ModelConfig) -> int:
    """Of the layers and the unembedding."""
    layer = c.d_model * (2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.mlp_dim)
    return c.num_layers * layer + c.vocab_size * c.d_model


def _attention_inputs(c: ModelConfig) -> int:
    """Parameters of q, k and v in all layers."""
    return c.num_layers * c.d_model * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim


def _summed_activations(c: ModelConfig, on_tpu: bool) -> int:
    """Arrays [B, L, D] of a layer that are summed over tensor: what attention and MLP return, again where that is
    computed again, and the gradients that q, k, v, gate and up each send back (on TPUs gate and up one between them).
    """
    forward = {"none": 2, "dots": 2}.get(c.remat, 4)
    return forward + (4 if on_tpu else 5)


def _keys_and_values(c: ModelConfig, context: int, tensor: int, tokens: float) -> float:
    """Values sent over context for attention: gathered whenever attention runs or its backward pass begins."""
    width = 2 * c.num_kv_heads / tensor * c.head_dim
    gathers = {"none": 1, "dots": 2, "attention": 2}.get(c.remat, 3)
    return c.num_layers * (gathers + 1) * (context - 1) * tokens * width
