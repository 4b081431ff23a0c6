"""The patch discriminator that VQGANs are trained against: one score per overlapping patch of a picture.

Source: Isola et al. 2017, "Image-to-Image Translation" (section 3.2.2), in the form of Esser et al. 2021. Layout is
[B, H, W, channels]. Norms use the statistics of the batch they are given, as the published one does while it trains;
it is never used otherwise, so no running averages are kept.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from aromni_jax.arrays import FloatArray


@dataclasses.dataclass(frozen=True)
class PatchGANConfig:
    """Published: 64 channels, 3 layers, a receptive field of 70 pixels; 2 layers see 34 pixels, 1 layer 16."""

    channels: int
    num_layers: int

    def __post_init__(self) -> None:
        if self.channels < 1 or self.num_layers < 1:
            raise ValueError(f"channels {self.channels} and num_layers {self.num_layers} must be at least 1")


class BatchStatisticsNorm(nn.Module):
    """Zero mean and unit variance per channel over this batch, then a gain and an offset."""

    @nn.compact
    def __call__(self, x: FloatArray) -> FloatArray:
        scale = self.param("scale", lambda rng, shape: 1 + 0.02 * jax.random.normal(rng, shape), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        mean = jnp.mean(x, axis=(0, 1, 2))
        variance = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2))
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


class PatchGAN(nn.Module):
    """Pictures [B, S, S, 3] in [-1, 1] to scores [B, s, s, 1]: above zero means taken for real."""

    config: PatchGANConfig

    @nn.compact
    def __call__(self, pixels_BHWC: FloatArray) -> FloatArray:
        cfg = self.config
        x = nn.leaky_relu(_conv(cfg.channels, 2, "conv_0")(pixels_BHWC), 0.2)
        for layer in range(1, cfg.num_layers + 1):
            stride = 2 if layer < cfg.num_layers else 1
            x = _conv(cfg.channels * min(2**layer, 8), stride, f"conv_{layer}", use_bias=False)(x)
            x = nn.leaky_relu(BatchStatisticsNorm(name=f"norm_{layer}")(x), 0.2)
        return _conv(1, 1, "score")(x)


def _conv(features: int, stride: int, name: str, use_bias: bool = True) -> nn.Conv:
    start = nn.initializers.normal(0.02)
    return nn.Conv(
        features, (4, 4), (stride, stride), padding=((1, 1), (1, 1)), use_bias=use_bias, kernel_init=start, name=name
    )
