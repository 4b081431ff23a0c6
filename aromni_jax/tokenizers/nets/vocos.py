"""A causal speech codec of frames: log-mel frames, ConvNeXt blocks, and a head that predicts short-time spectra.

All work happens at the code rate, which makes it cheap. The encoder looks at no future sample; a decoded hop is final
once `lookahead_codes` more codes have come. Sources: Siuzdak 2023, "Vocos" (ConvNeXt backbone, ISTFT head); Liu et
al. 2022, "A ConvNet for the 2020s". Made causal here: convolutions are padded on the left, norms are per frame.
Applied with `mutable=["stream"]`, layers keep the past in that collection; its zeros are the start of a stream.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from aromni_jax.arrays import FloatArray, IntArray
from aromni_jax.tokenizers.nets import spectral, streaming


@dataclasses.dataclass(frozen=True)
class VocosConfig:
    """`hop` samples make one code; `window` (a multiple of hop / frames_per_code) is the length of analysis and
    synthesis frames, of which `frames_per_code` make one code."""

    sample_rate_hz: int
    hop: int
    window: int
    frames_per_code: int
    num_mels: int
    encoder_dim: int
    encoder_layers: int
    decoder_dim: int
    decoder_layers: int
    expansion: int
    kernel_size: int
    code_dim: int

    def __post_init__(self) -> None:
        if self.hop % self.frames_per_code or self.window % self.frame_hop:
            raise ValueError(
                f"hop {self.hop} must be a multiple of frames_per_code {self.frames_per_code}, "
                f"and window {self.window} of their ratio"
            )

    @property
    def frame_hop(self) -> int:
        return self.hop // self.frames_per_code

    @property
    def lookahead_codes(self) -> int:
        """How many codes after its own a decoded hop still depends on."""
        return -(-(self.window - self.frame_hop) // self.hop)


class CausalDepthwise(nn.Module):
    """Depthwise convolution over time that sees the present and `kernel_size` - 1 frames before it."""

    kernel_size: int

    @nn.compact
    def __call__(self, x_BUD: FloatArray) -> FloatArray:
        num_frames, features = x_BUD.shape[1:]
        kernel_KD = self.param(
            "kernel", nn.initializers.normal(self.kernel_size**-0.5), (self.kernel_size, features), jnp.float32
        )
        bias_D = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
        # Shifted sums fuse on every backend; XLA's grouped convolution is many times slower on CPU.
        padded = streaming.after_past(self, x_BUD, self.kernel_size - 1)
        return sum((padded[:, k : k + num_frames] * kernel_KD[k] for k in range(self.kernel_size)), start=bias_D)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm, widening MLP, beside the identity; `layer_scale` starts each branch small."""

    expansion: int
    kernel_size: int
    layer_scale: float

    @nn.compact
    def __call__(self, x_BUD: FloatArray) -> FloatArray:
        width = x_BUD.shape[-1]
        h = nn.LayerNorm(epsilon=1e-6, name="norm")(CausalDepthwise(self.kernel_size, name="dwconv")(x_BUD))
        h = nn.Dense(width, name="pwconv2")(nn.gelu(nn.Dense(self.expansion * width, name="pwconv1")(h)))
        return x_BUD + h * self.param("gamma", nn.initializers.constant(self.layer_scale), (width,), jnp.float32)


class Backbone(nn.Module):
    """Frames of any width [B, U, *] to hidden frames [B, U, width]."""

    width: int
    num_layers: int
    expansion: int
    kernel_size: int

    @nn.compact
    def __call__(self, x: FloatArray) -> FloatArray:
        x = streaming.after_past(self, x, 2)
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(nn.Conv(self.width, (3,), padding="VALID", name="embed")(x))
        for layer in range(self.num_layers):
            block = ConvNeXtBlock(self.expansion, self.kernel_size, 1 / self.num_layers, name=f"convnext_{layer}")
            x = block(x)
        return nn.LayerNorm(epsilon=1e-6, name="final_layer_norm")(x)


class Encoder(nn.Module):
    """Waveform [B, U*hop] to latents [B, U, code_dim]."""

    config: VocosConfig

    @nn.compact
    def __call__(self, waveform_BT: FloatArray) -> FloatArray:
        cfg = self.config
        past = cfg.window - cfg.frame_hop
        if streaming.is_streaming(self):
            waveform_BT = streaming.after_past(self, waveform_BT, past)
        mel = spectral.log_mel(waveform_BT, cfg.sample_rate_hz, cfg.window, cfg.frame_hop, cfg.num_mels)
        if streaming.is_streaming(self):
            mel = mel[:, past // cfg.frame_hop :]
        frames = 0.5 * mel.reshape(mel.shape[0], mel.shape[1] // cfg.frames_per_code, -1) + 1.0
        hidden = Backbone(cfg.encoder_dim, cfg.encoder_layers, cfg.expansion, cfg.kernel_size, name="backbone")(frames)
        return nn.Dense(cfg.code_dim, name="out")(hidden)


class Decoder(nn.Module):
    """Latents [B, U, code_dim] to waveform [B, U*hop]; frames at or after `lengths_B` codes are silent.

    In a stream the waveform comes window - frame_hop samples late.
    """

    config: VocosConfig

    @nn.compact
    def __call__(self, latents_BUE: FloatArray, lengths_B: IntArray | None = None) -> FloatArray:
        cfg = self.config
        batch, num_codes = latents_BUE.shape[:2]
        hidden = Backbone(cfg.decoder_dim, cfg.decoder_layers, cfg.expansion, cfg.kernel_size, name="backbone")(
            latents_BUE
        )
        num_bins, num_frames = cfg.window // 2 + 1, num_codes * cfg.frames_per_code
        x = nn.Dense(cfg.frames_per_code * 2 * num_bins, name="head")(hidden)
        log_magnitude, phase = jnp.split(x.reshape(batch, num_frames, 2 * num_bins), 2, axis=-1)
        magnitude = jnp.exp(jnp.minimum(log_magnitude, 6.0))
        if lengths_B is not None:
            # A frame past the end would be heard: its window reaches back into the last real hop.
            inside_BU = jnp.arange(num_frames)[None] < lengths_B[:, None] * cfg.frames_per_code
            magnitude = jnp.where(inside_BU[..., None], magnitude, 0.0)
        spectra = jax.lax.complex(magnitude * jnp.cos(phase), magnitude * jnp.sin(phase))
        if streaming.is_streaming(self):
            carry_BT = streaming.recall(self, "carry", jnp.zeros((batch, cfg.window - cfg.frame_hop), jnp.float32))
            carry_BT, waveform_BT = spectral.inverse_frames_onward(carry_BT, spectra, cfg.window, cfg.frame_hop)
            streaming.remember(self, "carry", carry_BT)
            return waveform_BT
        return spectral.inverse_frames(spectra, cfg.window, cfg.frame_hop)


class Vocos(nn.Module):
    """Encoder and decoder in one parameter tree; the quantizer between them lives outside."""

    config: VocosConfig

    def setup(self) -> None:
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(self, waveform_BT: FloatArray) -> FloatArray:
        return self.encoder(waveform_BT)

    def decode(self, latents_BUE: FloatArray, lengths_B: IntArray | None = None) -> FloatArray:
        return self.decoder(latents_BUE, lengths_B)

    def __call__(self, waveform_BT: FloatArray) -> FloatArray:
        """Without a quantizer: for parameter initialisation."""
        return self.decode(self.encode(waveform_BT))
