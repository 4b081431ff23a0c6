"""WavTokenizer: a SEANet encoder that is not causal, one codebook, and a Vocos decoder that attends over everything.

The decoder's attention and group norms look at the whole utterance, so its sound depends on the length of what is
decoded at once. Rows of a batch may have any lengths; a row's result is that of the row alone.

Sources: Ji et al. 2024, "WavTokenizer"; Siuzdak 2023, "Vocos". Layer order as in `jishengpeng/WavTokenizer` (MIT).
"""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax.arrays import FloatArray, IntArray
from aromni_jax.tokenizers.nets import spectral
from aromni_jax.tokenizers.nets.seanet import ENCODEC_24KHZ, SeanetConfig, SeanetEncoder, silence_after

_NORM_EPSILON = 1e-6
_LARGEST_MAGNITUDE = 100.0


@dataclasses.dataclass(frozen=True)
class WavTokenizerConfig:
    """`encoder` gives rate, hop and width of the codes; `window` is that of the decoder's inverse STFT.

    Every norm of the decoder has one row of scale and shift per condition; the published models use the first only.
    """

    encoder: SeanetConfig
    width: int
    mlp_dim: int
    num_layers: int
    num_conditions: int
    num_groups: int
    window: int

    def __post_init__(self) -> None:
        if self.window % self.encoder.hop or (self.window - self.encoder.hop) % 2:
            raise ValueError(f"window {self.window} must be a multiple of hop {self.encoder.hop}, and overlap evenly")
        if self.width % self.num_groups:
            raise ValueError(f"width {self.width} must be a multiple of num_groups {self.num_groups}")


SMALL_600_24KHZ_4096 = WavTokenizerConfig(
    encoder=dataclasses.replace(ENCODEC_24KHZ, ratios=(4, 5, 5, 6), code_dim=512, causal=False),
    width=768,
    mlp_dim=2304,
    num_layers=12,
    num_conditions=4,
    num_groups=32,
    window=2400,
)
"""The shape of the released model of 40 codes a second, 4,096 codes."""


class _Conv(nn.Module):
    """Convolution over time, zeros around each row; `depthwise` keeps every channel to itself."""

    features: int
    kernel_size: int
    depthwise: bool = False

    @nn.compact
    def __call__(self, x_BUD: FloatArray, lengths_B: IntArray) -> FloatArray:
        inputs = 1 if self.depthwise else x_BUD.shape[-1]
        shape = (self.kernel_size, inputs, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=(0, 1)), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x_BUD = silence_after(x_BUD, lengths_B)
        if self.depthwise:
            num_steps, half = x_BUD.shape[1], self.kernel_size // 2
            padded = jnp.pad(x_BUD, ((0, 0), (half, half), (0, 0)))
            return sum((padded[:, k : k + num_steps] * kernel[k, 0] for k in range(self.kernel_size)), start=bias)
        dims = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x_BUD, kernel, (1,), "SAME", dimension_numbers=dims) + bias


class _GroupNorm(nn.Module):
    """Group norm over the channels of a group and all steps of a row."""

    num_groups: int

    @nn.compact
    def __call__(self, x_BUD: FloatArray, lengths_B: IntArray) -> FloatArray:
        batch, num_steps, width = x_BUD.shape
        scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        grouped = x_BUD.reshape(batch, num_steps, self.num_groups, -1)
        inside = (jnp.arange(num_steps)[None] < lengths_B[:, None])[..., None, None]
        mean = partial(jnp.mean, axis=(1, 3), keepdims=True, where=inside)
        centred = grouped - mean(grouped)
        normal = centred * jax.lax.rsqrt(mean(jnp.square(centred)) + _NORM_EPSILON)
        return normal.reshape(x_BUD.shape) * scale + bias


class _ConditionedNorm(nn.Module):
    """Layer norm whose scale and shift are rows of a table; the first row is used."""

    num_conditions: int

    @nn.compact
    def __call__(self, x_BUD: FloatArray) -> FloatArray:
        shape = (self.num_conditions, x_BUD.shape[-1])
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        shift = self.param("shift", nn.initializers.zeros, shape, jnp.float32)
        normal = nn.LayerNorm(epsilon=_NORM_EPSILON, use_scale=False, use_bias=False, use_fast_variance=False)(x_BUD)
        return normal * scale[0] + shift[0]


class _ResidualBlock(nn.Module):
    """Two convolutions of kernel 3, each after group norm and swish, beside the identity."""

    num_groups: int

    @nn.compact
    def __call__(self, x_BUD: FloatArray, lengths_B: IntArray) -> FloatArray:
        h = x_BUD
        for i in (1, 2):
            h = nn.swish(_GroupNorm(self.num_groups, name=f"norm{i}")(h, lengths_B))
            h = _Conv(x_BUD.shape[-1], 3, name=f"conv{i}")(h, lengths_B)
        return x_BUD + h


class _Attention(nn.Module):
    """Single-head attention over all steps of a row, beside the identity."""

    num_groups: int

    @nn.compact
    def __call__(self, x_BUD: FloatArray, lengths_B: IntArray) -> FloatArray:
        width = x_BUD.shape[-1]
        h = _GroupNorm(self.num_groups, name="norm")(x_BUD, lengths_B)
        q_BLD, k_BSD, v_BSD = (nn.Dense(width, name=name)(h) for name in ("q", "k", "v"))
        scores_BLS = jnp.einsum("BLD,BSD->BLS", q_BLD, k_BSD) * width**-0.5
        inside = jnp.arange(x_BUD.shape[1])[None, None] < lengths_B[:, None, None]
        weights_BLS = nn.softmax(jnp.where(inside, scores_BLS, -jnp.inf), axis=-1)
        return x_BUD + nn.Dense(width, name="out")(jnp.einsum("BLS,BSD->BLD", weights_BLS, v_BSD))


class _ConvNextBlock(nn.Module):
    """Depthwise convolution of kernel 7, conditioned norm, widening MLP, scaled, beside the identity."""

    config: WavTokenizerConfig

    @nn.compact
    def __call__(self, x_BUD: FloatArray, lengths_B: IntArray) -> FloatArray:
        cfg = self.config
        h = _Conv(cfg.width, 7, depthwise=True, name="dwconv")(x_BUD, lengths_B)
        h = _ConditionedNorm(cfg.num_conditions, name="norm")(h)
        h = nn.Dense(cfg.width, name="pwconv2")(nn.gelu(nn.Dense(cfg.mlp_dim, name="pwconv1")(h), approximate=False))
        return x_BUD + h * self.param("gamma", nn.initializers.constant(1 / cfg.num_layers), (cfg.width,), jnp.float32)


class WavTokenizerDecoder(nn.Module):
    """Latents [B, U, E] to waveform [B, U*hop]; rows end at `lengths_B` codes, all at least 1."""

    config: WavTokenizerConfig

    @nn.compact
    def __call__(self, latents_BUE: FloatArray, lengths_B: IntArray) -> FloatArray:
        cfg = self.config
        x = _Conv(cfg.width, 7, name="embed")(latents_BUE, lengths_B)
        for i, kind in enumerate((_ResidualBlock, _ResidualBlock, _Attention, _ResidualBlock, _ResidualBlock)):
            x = kind(cfg.num_groups, name=f"pos_net_{i}")(x, lengths_B)
        x = _GroupNorm(cfg.num_groups, name="pos_net_norm")(x, lengths_B)
        x = _ConditionedNorm(cfg.num_conditions, name="norm")(x)
        for layer in range(cfg.num_layers):
            x = _ConvNextBlock(cfg, name=f"convnext_{layer}")(x, lengths_B)
        x = nn.LayerNorm(epsilon=_NORM_EPSILON, use_fast_variance=False, name="final_layer_norm")(x)
        log_magnitude, phase = jnp.split(nn.Dense(cfg.window + 2, name="head")(x), 2, axis=-1)
        magnitude = jnp.minimum(jnp.exp(log_magnitude), _LARGEST_MAGNITUDE)
        magnitude = silence_after(magnitude, lengths_B)
        return self._waveform(jax.lax.complex(magnitude * jnp.cos(phase), magnitude * jnp.sin(phase)), lengths_B)

    def _waveform(self, spectra_BUF: FloatArray, lengths_B: IntArray) -> FloatArray:
        """Inverse STFT with frames around the middle of their hop, divided by the squared windows that are there."""
        window, hop = self.config.window, self.config.encoder.hop
        hann = spectral.hann_window(window)
        frames = jnp.fft.irfft(spectra_BUF, n=window, axis=-1) * hann
        there = jnp.broadcast_to(np.square(hann), frames.shape)
        cut, length = (window - hop) // 2, frames.shape[1] * hop
        sums_BT = spectral.overlap_add_all(frames, hop)[:, cut : cut + length]
        envelope_BT = spectral.overlap_add_all(silence_after(there, lengths_B), hop)[:, cut : cut + length]
        return sums_BT / jnp.maximum(envelope_BT, 1e-11)


class WavTokenizer(nn.Module):
    """Encoder and decoder in one parameter tree; the codebook between them lives outside."""

    config: WavTokenizerConfig

    def setup(self) -> None:
        self.encoder = SeanetEncoder(self.config.encoder)
        self.decoder = WavTokenizerDecoder(self.config)

    def encode(self, waveform_BT: FloatArray, lengths_B: IntArray) -> FloatArray:
        return self.encoder(waveform_BT, lengths_B)

    def decode(self, latents_BUE: FloatArray, lengths_B: IntArray) -> FloatArray:
        return self.decoder(latents_BUE, lengths_B)

    def __call__(self, waveform_BT: FloatArray) -> FloatArray:
        """Without a quantizer: for parameter initialisation."""
        lengths_B = jnp.full(waveform_BT.shape[0], waveform_BT.shape[1], jnp.int32)
        return self.decode(self.encode(waveform_BT, lengths_B), lengths_B // self.config.encoder.hop)
