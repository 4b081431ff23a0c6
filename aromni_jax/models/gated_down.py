"""The second half of SwiGLU with a backward pass that needs little memory: down(silu(gate) * up)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from aromni_jax import partitioning

_CHUNK_TOKENS = 2048
"""Tokens of a device whose gradients with respect to what `down` reads exist at once."""


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up."""
    return jax.nn.silu(gate) * up


def gated_gradients(gate: jax.Array, up: jax.Array, d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of `gated` with respect to its two inputs."""
    share = jax.nn.sigmoid(gate)
    silu = gate * share
    return d_out * up * (share + silu * (1 - share)), d_out * silu


@jax.custom_vjp
def gated_down(gate_BLF: jax.Array, up_BLF: jax.Array, w_FD: jax.Array) -> jax.Array:
    """(silu(gate) * up) w, [B, L, D]. Its backward pass writes the gradients of `gate` and `up` over them.

    So it holds two arrays [B, L, F] and not four, at no more arithmetic: a chunk of tokens at a time.
    """
    inner_BLF = partitioning.constrain(gated(gate_BLF, up_BLF), "batch", "length", "mlp")
    return jnp.einsum("BLF,FD->BLD", inner_BLF, w_FD)


_Saved = tuple[jax.Array, jax.Array, jax.Array]


def _forward(gate_BLF: jax.Array, up_BLF: jax.Array, w_FD: jax.Array) -> tuple[jax.Array, _Saved]:
    return gated_down(gate_BLF, up_BLF, w_FD), (gate_BLF, up_BLF, w_FD)


def _backward(saved: _Saved, d_out_BLD: jax.Array) -> _Saved:
    gate_BLF, up_BLF, w_FD = saved
    d_w_FD = jnp.einsum("BLF,BLD->FD", gated(gate_BLF, up_BLF), d_out_BLD)
    # Whoever still reads gate and up has to be done before they are written over, else the compiler copies them.
    d_w_FD, gate_BLF, up_BLF = jax.lax.optimization_barrier((d_w_FD, gate_BLF, up_BLF))
    mesh = jax.sharding.get_abstract_mesh()
    written_over = _written_over
    if not mesh.empty and mesh.size > 1:
        wide, narrow = partitioning.spec(("batch", "length", "mlp")), partitioning.spec(("batch", "length", None))
        specs = (wide, wide, narrow, partitioning.spec(("mlp", None)))
        written_over = jax.shard_map(_written_over, mesh=mesh, in_specs=specs, out_specs=(wide, wide), check_vma=False)
    d_gate_BLF, d_up_BLF = written_over(gate_BLF, up_BLF, d_out_BLD, w_FD)
    return d_gate_BLF, d_up_BLF, d_w_FD


def _written_over(
    gate_BLF: jax.Array, up_BLF: jax.Array, d_out_BLD: jax.Array, w_FD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of gate and up, in their place."""
    shape, num_tokens = gate_BLF.shape, gate_BLF.shape[0] * gate_BLF.shape[1]
    chunk = min(_CHUNK_TOKENS, num_tokens)
    # XLA's GPU backend copies both arrays for every chunk: an eighth of the step.
    if num_tokens % chunk or partitioning.device_kind().startswith("NVIDIA"):
        chunk = num_tokens
    d_out_TD = d_out_BLD.reshape(num_tokens, -1)

    def body(index: jax.Array, both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = index * chunk
        gate, up, d_out = (jax.lax.dynamic_slice_in_dim(x, start, chunk) for x in (*both, d_out_TD))
        d_gate, d_up = gated_gradients(gate, up, jnp.einsum("TD,FD->TF", d_out, w_FD))
        update = jax.lax.dynamic_update_slice_in_dim
        return update(both[0], d_gate, start, 0), update(both[1], d_up, start, 0)

    both = gate_BLF.reshape(num_tokens, -1), up_BLF.reshape(num_tokens, -1)
    d_gate, d_up = jax.lax.fori_loop(0, num_tokens // chunk, body, both)
    return d_gate.reshape(shape), d_up.reshape(shape)


gated_down.defvjp(_forward, _backward)
