"""The VQGAN encoder and decoder as published, every size a parameter, with an optional patch stem for small budgets.

Source: Esser et al. 2021, "Taming Transformers" (architecture of `taming-transformers`, MIT). Chameleon's 512-pixel
tokenizer is `VQGANConfig(image_size=512, patch_size=1, channels=128, multipliers=(1, 1, 2, 2, 4), num_res_blocks=2,
latent_channels=256, code_dim=256, groups=32)`. Layout is [B, H, W, channels]; pixels are floats in [-1, 1].
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from aromni_jax.arrays import FloatArray
from aromni_jax.tokenizers.nets import winograd


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """`patch_size` 4 sees an image as 4x4 pixel patches of 48 channels: the published net at a sixteenth of the cost.

    Each step between `multipliers` halves height and width; `num_res_blocks` counts per level (the decoder has one
    more, as published). `linear_path` adds a linear map from patches to latents and back beside the net, which
    saves a short training the steps it would spend on finding one; the published nets have none.
    `attention_resolutions` are the sides of feature maps on which every residual block is followed by attention
    (taming's ImageNet net has 16; Chameleon's none but the one in the middle, which is always there).
    """

    image_size: int
    patch_size: int
    channels: int
    multipliers: tuple[int, ...]
    num_res_blocks: int
    latent_channels: int
    code_dim: int
    groups: int
    linear_path: bool = False
    attention_resolutions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.image_size % self.code_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of {self.code_size}, the pixels of a code"
            )
        if self.channels % self.groups:
            raise ValueError(f"channels {self.channels} is not a multiple of groups {self.groups}")

    @property
    def code_size(self) -> int:
        """Pixels along one side of the patch that a code stands for."""
        return self.patch_size * 2 ** (len(self.multipliers) - 1)

    @property
    def grid_size(self) -> int:
        """Codes along one side of an image."""
        return self.image_size // self.code_size

    def attends(self, level: int) -> bool:
        """Whether the residual blocks of a level, 0 being the finest, are followed by attention."""
        return self.image_size // self.patch_size // 2**level in self.attention_resolutions


def _conv(features: int, size: int, name: str, stride: int = 1, padding: int | tuple = 1) -> nn.Conv:
    pads = padding if isinstance(padding, tuple) else ((padding, padding), (padding, padding))
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=pads,
        conv_general_dilated=winograd.conv_general_dilated,
        name=name,
    )


class GroupNorm(nn.Module):
    """As `nn.GroupNorm`, over pictures [B, H, W, C].

    Sums by channel, then by group, and from the mean: on a CPU in half the time, and at 512 pixels nearer to float64 by
    an order of magnitude.
    """

    groups: int

    @nn.compact
    def __call__(self, x: FloatArray) -> FloatArray:
        channels, width = x.shape[-1], x.shape[-1] // self.groups
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)

        def mean(values: FloatArray) -> FloatArray:
            """Of each group, for every channel: [B, 1, 1, C]."""
            by_channel = jnp.mean(values, axis=(1, 2), dtype=jnp.float32).reshape(-1, self.groups, width)
            by_group = jnp.broadcast_to(by_channel.mean(axis=-1, keepdims=True), by_channel.shape)
            return by_group.reshape(-1, 1, 1, channels)

        centred = x - mean(x)
        normal = centred * (jax.lax.rsqrt(mean(jnp.square(centred)) + 1e-6) * scale) + bias
        return normal.astype(x.dtype)


class ResBlock(nn.Module):
    """Norm, swish, conv, twice, beside the identity (or a 1x1 convolution where the width changes)."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: FloatArray) -> FloatArray:
        h = nn.swish(GroupNorm(self.groups, name="norm1")(x))
        h = _conv(self.features, 3, "conv1")(h)
        h = nn.swish(GroupNorm(self.groups, name="norm2")(h))
        h = _conv(self.features, 3, "conv2")(h)
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, "nin_shortcut", padding=0)(x)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head attention over all places of the grid."""

    groups: int

    @nn.compact
    def __call__(self, x: FloatArray) -> FloatArray:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.groups, name="norm")(x)
        q, k, v = (_conv(channels, 1, name, padding=0)(h).reshape(batch, -1, channels) for name in "qkv")
        weights_BLS = jax.nn.softmax(jnp.einsum("BLE,BSE->BLS", q, k) * channels**-0.5, axis=-1)
        h = jnp.einsum("BLS,BSE->BLE", weights_BLS, v).reshape(x.shape)
        return x + _conv(channels, 1, "proj_out", padding=0)(h)


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: FloatArray) -> FloatArray:
        x = ResBlock(self.features, self.groups, name="block_1")(x)
        x = AttentionBlock(self.groups, name="attn_1")(x)
        return ResBlock(self.features, self.groups, name="block_2")(x)


class Encoder(nn.Module):
    """Pixels [B, S, S, 3] in [-1, 1] to latents [B, grid, grid, code_dim] (quant_conv included)."""

    config: VQGANConfig

    @nn.compact
    def __call__(self, pixels_BHWC: FloatArray) -> FloatArray:
        cfg = self.config
        x = _conv(cfg.channels, 3, "conv_in")(space_to_depth(pixels_BHWC, cfg.patch_size))
        for level, multiplier in enumerate(cfg.multipliers):
            for block in range(cfg.num_res_blocks):
                x = ResBlock(cfg.channels * multiplier, cfg.groups, name=f"down_{level}_block_{block}")(x)
                if cfg.attends(level):
                    x = AttentionBlock(cfg.groups, name=f"down_{level}_attn_{block}")(x)
            if level + 1 < len(cfg.multipliers):
                # The published net pads right and bottom only.
                x = _conv(x.shape[-1], 3, f"down_{level}_downsample", stride=2, padding=((0, 1), (0, 1)))(x)
        x = Middle(x.shape[-1], cfg.groups, name="mid")(x)
        x = nn.swish(GroupNorm(cfg.groups, name="norm_out")(x))
        x = _conv(cfg.latent_channels, 3, "conv_out")(x)
        latents = _conv(cfg.code_dim, 1, "quant_conv", padding=0)(x)
        if cfg.linear_path:
            latents += nn.Dense(cfg.code_dim, name="linear_path")(space_to_depth(pixels_BHWC, cfg.code_size))
        return latents


class Decoder(nn.Module):
    """Latents [B, grid, grid, code_dim] to pixels [B, S, S, 3], not clipped (post_quant_conv included)."""

    config: VQGANConfig

    @nn.compact
    def __call__(self, latents_BHWE: FloatArray) -> FloatArray:
        cfg = self.config
        x = _conv(cfg.latent_channels, 1, "post_quant_conv", padding=0)(latents_BHWE)
        x = _conv(cfg.channels * cfg.multipliers[-1], 3, "conv_in")(x)
        x = Middle(x.shape[-1], cfg.groups, name="mid")(x)
        for level, multiplier in reversed(list(enumerate(cfg.multipliers))):
            for block in range(cfg.num_res_blocks + 1):
                x = ResBlock(cfg.channels * multiplier, cfg.groups, name=f"up_{level}_block_{block}")(x)
                if cfg.attends(level):
                    x = AttentionBlock(cfg.groups, name=f"up_{level}_attn_{block}")(x)
            if level > 0:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = _conv(x.shape[-1], 3, f"up_{level}_upsample")(x)
        x = nn.swish(GroupNorm(cfg.groups, name="norm_out")(x))
        pixels = depth_to_space(_conv(3 * cfg.patch_size**2, 3, "conv_out")(x), cfg.patch_size)
        if cfg.linear_path:
            patches = nn.Dense(3 * cfg.code_size**2, name="linear_path")(latents_BHWE)
            pixels += depth_to_space(patches, cfg.code_size)
        return pixels


class VQGAN(nn.Module):
    """Encoder and decoder in one parameter tree; the quantizer between them is not differentiated and lives outside."""

    config: VQGANConfig

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(self, pixels_BHWC: FloatArray) -> FloatArray:
        return self.encoder(pixels_BHWC)

    def decode(self, latents_BHWE: FloatArray) -> FloatArray:
        return self.decoder(latents_BHWE)

    def __call__(self, pixels_BHWC: FloatArray) -> FloatArray:
        """Without a quantizer: for parameter initialisation."""
        return self.decode(self.encode(pixels_BHWC))


def space_to_depth(x: FloatArray, size: int) -> FloatArray:
    """[B, H, W, c] to [B, H/size, W/size, size*size*c]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // size, width // size, size * size * channels)


def depth_to_space(x: FloatArray, size: int) -> FloatArray:
    """Inverse of `space_to_depth`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, size, size, channels // size**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * size, width * size, channels // size**2)
