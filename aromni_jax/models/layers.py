"""Norms, attention block, SwiGLU and the decoder layer, in Linen; parameters carry logical axis names."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from aromni_jax.models.attention import attention, cached_attention
from aromni_jax.models.attention_kernels import keep_attended
from aromni_jax.models.config import ModelConfig
from aromni_jax.models.gated_down import gated, gated_down, gated_gradients
from aromni_jax.models.gradient_order import gradients_together
from aromni_jax.models.int8 import read_here, scaled_in
from aromni_jax.models.kv_cache import KVCache
from aromni_jax.models.rope import Rotation, rotate
from aromni_jax.partitioning import constrain, logical

QK_NORM_EPS = 1e-5
"""Fixed in Chameleon, whatever `norm_eps` is."""

_LAYER_INPUT = "layer_input"
_TO_HOST = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_LAYER_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
)
REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": _TO_HOST,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, keep_attended
    ),
    "attention": keep_attended,
}
"""What a layer keeps for its backward pass: nothing but its input ("full"), what attention returns ("attention"), that
and each matmul with weights ("dots"); "none" keeps all. "offload" moves the input to host memory until then."""

KEEP_LAYER_INPUTS = frozenset({"full", "offload"})
"""Policies that are after memory: inside a layer, too, what is cheap is computed again and gradients come in an order
that frees activations early. None of it adds a matrix product."""


def _fan_in(fan_in_axes: tuple[int, ...], out_axes: tuple[int, ...]) -> nn.initializers.Initializer:
    return nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=fan_in_axes, out_axis=out_axes)


class RMSNorm(nn.Module):
    """x / rms(x) * scale; the mean square is taken in float32, the gain applied in the type of x."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        c = self.config
        scale_D = self.param("scale", logical(nn.initializers.ones, "norm"), (c.d_model,), jnp.dtype(c.param_dtype))
        if c.remat in KEEP_LAYER_INPUTS:
            x_BLD, scale_D = gradients_together(x_BLD, scale_D)
        x32_BLD = x_BLD.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True) + c.norm_eps)
        return (x32_BLD * inverse_rms).astype(x_BLD.dtype) * scale_D.astype(x_BLD.dtype)


class HeadNorm(nn.Module):
    """LayerNorm over the head width with one scale and bias per head; statistics in float32."""

    config: ModelConfig
    head_axis: str

    @nn.compact
    def __call__(self, x_BLNH: jax.Array) -> jax.Array:
        shape, dtype = x_BLNH.shape[2:], jnp.dtype(self.config.param_dtype)
        scale_NH = self.param("scale", logical(nn.initializers.ones, self.head_axis, "head_dim"), shape, dtype)
        bias_NH = self.param("bias", logical(nn.initializers.zeros, self.head_axis, "head_dim"), shape, dtype)
        if self.config.remat in KEEP_LAYER_INPUTS:
            x_BLNH, (scale_NH, bias_NH) = gradients_together(x_BLNH, (scale_NH, bias_NH))
        x32_BLNH = x_BLNH.astype(jnp.float32)
        centred = x32_BLNH - jnp.mean(x32_BLNH, axis=-1, keepdims=True)
        inverse_std = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + QK_NORM_EPS)
        return (centred * inverse_std * scale_NH + bias_NH).astype(x_BLNH.dtype)


class Attention(nn.Module):
    """Grouped-query attention with QK-norm and RoPE; returns [B, L, D] and the cache it was given, filled."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        layer: jax.Array,
        turn: Rotation,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        c = self.config
        D, N, K, H = c.d_model, c.num_heads, c.num_kv_heads, c.head_dim
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)

        def projected(name: str, heads: int, axis: str) -> jax.Array:
            init = logical(_fan_in((0,), (1, 2)), "embed", axis, "head_dim")
            y_BLD, w_DNH = read_here(x_BLD, self.param(name, init, (D, heads, H), param_dtype), dtype)
            return scaled_in(self, name, jnp.einsum("BLD,DNH->BLNH", y_BLD, w_DNH))

        q_BLNH = projected("q", N, "heads")
        k_BLKH, v_BLKH = projected("k", K, "kv_heads"), projected("v", K, "kv_heads")

        def turned(module: Attention, q_BLNH: jax.Array, k_BLKH: jax.Array) -> tuple[jax.Array, jax.Array]:
            if c.qk_norm:
                q_BLNH = HeadNorm(c, "heads", name="q_norm")(q_BLNH)
                k_BLKH = HeadNorm(c, "kv_heads", name="k_norm")(k_BLKH)
            q_BLNH = constrain(rotate(q_BLNH, turn), "batch", "length", "heads", None)
            return q_BLNH, constrain(rotate(k_BLKH, turn), "batch", "length", "kv_heads", None)

        def attend(module: Attention, q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array) -> jax.Array:
            q_BLNH, k_BLKH = turned(module, q_BLNH, k_BLKH)
            return attention(q_BLNH, k_BLKH, v_BLKH, segment_ids_BL, implementation=c.attention)

        v_BLKH = constrain(v_BLKH, "batch", "length", "kv_heads", None)
        if cache is None:
            if c.remat in KEEP_LAYER_INPUTS:
                # Norms and rotations again, attention not: the MLP's backward pass finds q and k of one kind only.
                attend = nn.remat(attend, policy=REMAT_POLICIES["attention"])
            attended_BLNH = attend(self, q_BLNH, k_BLKH, v_BLKH)
        else:
            q_BLNH, k_BLKH = turned(self, q_BLNH, k_BLKH)
            slots_BL = cache.slots(positions_BL, segment_ids_BL)
            cache, keys_BSKH, values_BSKH = cache.write(layer, slots_BL, k_BLKH, v_BLKH)
            attended_BLNH = cached_attention(q_BLNH, keys_BSKH, values_BSKH, positions_BL)
        init = logical(_fan_in((0, 1), (2,)), "heads", "head_dim", "embed")
        attended_BLNH, w_NHD = read_here(attended_BLNH, self.param("o", init, (N, H, D), param_dtype), dtype)
        if cache is not None:
            # As one matrix: XLA on CPUs would contract over H first, and for that turn w around at every token.
            y_BLD = attended_BLNH.reshape(*x_BLD.shape[:2], N * H) @ w_NHD.reshape(N * H, D)
        else:
            y_BLD = jnp.einsum("BLNH,NHD->BLD", attended_BLNH, w_NHD)
        return scaled_in(self, "o", y_BLD), cache


@jax.custom_vjp
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, keeping only its two inputs for the backward pass."""
    return gated(gate, up)


def _gated_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _gated(gate, up), (gate, up)


def _gated_backward(saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gated_gradients(*saved, d_out)


_gated.defvjp(_gated_forward, _gated_backward)


@jax.custom_vjp
def _linear(x_BLD: jax.Array, w_DF: jax.Array) -> jax.Array:
    """x w, whose weight gradient has x on the left: XLA CPU transposes the left operand, and d_out is the wider one."""
    return jnp.einsum("BLD,DF->BLF", x_BLD, w_DF)


def _linear_forward(x_BLD: jax.Array, w_DF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not `_linear` itself: inside that, a policy that keeps matrix products does not see one.
    return jnp.einsum("BLD,DF->BLF", x_BLD, w_DF), (x_BLD, w_DF)


def _linear_backward(saved: tuple[jax.Array, jax.Array], d_out_BLF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BLD, w_DF = saved
    d_x_BLD = jnp.einsum("BLF,DF->BLD", d_out_BLF, w_DF)
    return d_x_BLD, jnp.einsum("BLD,BLF->DF", x_BLD, d_out_BLF)


_linear.defvjp(_linear_forward, _linear_backward)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        c = self.config
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)

        def weight(x: jax.Array, name: str, shape: tuple[int, int], *axes: str) -> tuple[jax.Array, jax.Array]:
            return read_here(x, self.param(name, logical(_fan_in((0,), (1,)), *axes), shape, param_dtype), dtype)

        x_BLD, gate_DF = weight(x_BLD, "gate", (c.d_model, c.mlp_dim), "embed", "mlp")
        x_BLD, up_DF = weight(x_BLD, "up", (c.d_model, c.mlp_dim), "embed", "mlp")
        if c.remat in KEEP_LAYER_INPUTS:
            x_BLD, (gate_DF, up_DF) = gradients_together(x_BLD, (gate_DF, up_DF))
        gate_BLF = scaled_in(self, "gate", _linear(x_BLD, gate_DF))
        up_BLF = scaled_in(self, "up", _linear(x_BLD, up_DF))
        gate_BLF, w_FD = weight(gate_BLF, "down", (c.mlp_dim, c.d_model), "mlp", "embed")
        if c.remat in KEEP_LAYER_INPUTS:
            return gated_down(gate_BLF, up_BLF, w_FD)
        inner_BLF = constrain(_gated(gate_BLF, up_BLF), "batch", "length", "mlp")
        return scaled_in(self, "down", jnp.einsum("BLF,FD->BLD", inner_BLF, w_FD))


def _between(swin_share: jax.Array, norm: nn.Module, x_BLD: jax.Array, *, normed_at: int) -> jax.Array:
    """x on its way to norm(x) or back: norm(x) where `swin_share` is `normed_at`, x at the other end."""
    share = swin_share.astype(x_BLD.dtype)
    normed = share if normed_at else 1 - share
    return normed * norm(x_BLD) + (1 - normed) * x_BLD


class DecoderLayer(nn.Module):
    """One layer, shaped for `nn.scan`: carries (hidden, cache), reads its layer index.

    Swin-Norm is `h = x + Norm(Attn(x))`, `y = h + Norm(MLP(h))`; pre-norm is `h = x + Attn(Norm(x))`,
    `y = h + MLP(Norm(h))`. With `swin_share` a, a Swin-Norm layer is on its way from one to the other:
    `h = x + Out(Attn(In(x)))` where `In(x) = (1 - a) Norm(x) + a x` and `Out(y) = (1 - a) y + a Norm(y)`, with one gain
    for both norms. At a = 0 that is the pre-norm layer, at a = 1 the Swin-Norm layer, of the same parameters.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, KVCache | None],
        layer: jax.Array,
        turn: Rotation,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        swin_share: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, KVCache | None], None]:
        c = self.config
        x_BLD, cache = carry
        x_BLD = checkpoint_name(x_BLD, _LAYER_INPUT)
        is_swin = c.norm_position == "swin"

        def after_attention(module: DecoderLayer, x_BLD: jax.Array, y_BLD: jax.Array) -> jax.Array:
            if is_swin:
                x_BLD = x_BLD + RMSNorm(c, name="attention_norm")(y_BLD)
                return x_BLD + RMSNorm(c, name="mlp_norm")(MLP(c, name="mlp")(x_BLD))
            x_BLD = x_BLD + y_BLD
            return x_BLD + MLP(c, name="mlp")(RMSNorm(c, name="mlp_norm")(x_BLD))

        if c.remat in KEEP_LAYER_INPUTS:
            # Its result is not needed again, so that all of it is computed again only here, and once.
            after_attention = nn.remat(after_attention)
        attend = Attention(c, name="attention")
        if swin_share is not None and is_swin:
            attention_norm, mlp_norm = RMSNorm(c, name="attention_norm"), RMSNorm(c, name="mlp_norm")
            read_BLD = _between(swin_share, attention_norm, x_BLD, normed_at=0)
            y_BLD, cache = attend(read_BLD, layer, turn, positions_BL, segment_ids_BL, cache)
            x_BLD = x_BLD + _between(swin_share, attention_norm, y_BLD, normed_at=1)
            y_BLD = MLP(c, name="mlp")(_between(swin_share, mlp_norm, x_BLD, normed_at=0))
            x_BLD = x_BLD + _between(swin_share, mlp_norm, y_BLD, normed_at=1)
        else:
            read_BLD = x_BLD if is_swin else RMSNorm(c, name="attention_norm")(x_BLD)
            y_BLD, cache = attend(read_BLD, layer, turn, positions_BL, segment_ids_BL, cache)
            x_BLD = after_attention(self, x_BLD, y_BLD)
        return (constrain(x_BLD, "batch", "length", None), cache), None
