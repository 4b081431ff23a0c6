"""The multi-scale STFT discriminator that EnCodec is trained against: convolutions over complex spectra.

Source: Défossez et al. 2022, "High Fidelity Neural Audio Compression" (section 3.4, figure 2). Real and imaginary part
are two channels of a picture [B, frames, bins, 2]; the dilations are in time, the strides in frequency. The published
one has weight norm on its convolutions; these have none: at the first step both are the same function.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from aromni_jax.arrays import FloatArray
from aromni_jax.tokenizers.nets import spectral

_OVERLAP = 4
"""Windows per hop, as published."""


@dataclasses.dataclass(frozen=True)
class StftDiscriminatorConfig:
    """Published: 32 channels, windows 2048, 1024, 512, 256 and 128 samples, dilations 1, 2 and 4."""

    channels: int
    windows: tuple[int, ...]
    dilations: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self) -> None:
        if self.channels < 1 or not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"channels {self.channels} and dilations {self.dilations} must be at least 1, and be some")
        if not self.windows or any(window < 2 * _OVERLAP or window % _OVERLAP for window in self.windows):
            raise ValueError(
                f"windows {self.windows} must be some multiples of {_OVERLAP}, each at least {2 * _OVERLAP}"
            )


class StftDiscriminator(nn.Module):
    """Waveforms [B, T], T at least the largest window, to what each window's net thinks of them.

    Returns one (scores [B, frames, bins, 1], features) per window: scores above zero mean taken for real, features
    are the hidden layers [B, frames, bins, channels] from first to last.
    """

    config: StftDiscriminatorConfig

    @nn.compact
    def __call__(self, waveform_BT: FloatArray) -> list[tuple[FloatArray, list[FloatArray]]]:
        return [_OneWindow(self.config, window, name=f"window_{window}")(waveform_BT) for window in self.config.windows]


class _OneWindow(nn.Module):
    config: StftDiscriminatorConfig
    window: int

    @nn.compact
    def __call__(self, waveform_BT: FloatArray) -> tuple[FloatArray, list[FloatArray]]:
        width = self.config.channels
        x = nn.leaky_relu(_conv(width, (3, 9), "conv_in")(_spectra(waveform_BT, self.window)), 0.2)
        features = [x]
        for i, dilation in enumerate(self.config.dilations):
            x = nn.leaky_relu(_conv(width, (3, 9), f"conv_{i}", stride=2, dilation=dilation)(x), 0.2)
            features.append(x)
        x = nn.leaky_relu(_conv(width, (3, 3), "conv_out")(x), 0.2)
        return _conv(1, (3, 3), "score")(x), [*features, x]


def _conv(features: int, size: tuple[int, int], name: str, stride: int = 1, dilation: int = 1) -> nn.Conv:
    """Over time and frequency; keeps the number of frames, and of bins divides it by the stride, rounded up."""
    time, frequency = (size[0] - 1) * dilation // 2, (size[1] - 1) // 2
    return nn.Conv(
        features,
        size,
        strides=(1, stride),
        kernel_dilation=(dilation, 1),
        padding=((time, time), (frequency, frequency)),
        name=name,
    )


def _spectra(waveform_BT: FloatArray, window: int) -> FloatArray:
    """[B, frames, window/2 + 1, 2] of whole windows inside the waveform, scaled so that white noise keeps its power."""
    hop = window // _OVERLAP
    length = waveform_BT.shape[1] // hop * hop
    hann = spectral.hann_window(window)
    frames = spectral.causal_frames(waveform_BT[:, :length], window, hop)[:, _OVERLAP - 1 :]
    spectra = jnp.fft.rfft(frames * (hann / np.sqrt(np.sum(np.square(hann)))), axis=-1)
    return jnp.stack([spectra.real, spectra.imag], axis=-1)
