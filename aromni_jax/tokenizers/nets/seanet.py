"""SEANet: strided convolutions from waveform to latents and back, the net of SoundStream, EnCodec and WavTokenizer.

One parameterised net. Rows of a batch may have any lengths: each is padded where its own end is, so a row's result is
that of the row alone. Causal nets stream: applied with `mutable=["stream"]`, every layer keeps what it needs of the
past in that collection, and a call without it is the first chunk.

Sources: Tagliasacchi et al. 2020, "SEANet"; Zeghidour et al. 2021, "SoundStream"; Défossez et al. 2022, "High
Fidelity Neural Audio Compression". Padding rules as in transformers' `EncodecModel` (Apache-2.0), whose numbers this
net reproduces. Weight norm is folded into the kernels when published weights are read.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from aromni_jax.arrays import FloatArray, IntArray
from aromni_jax.tokenizers.nets import streaming


@dataclasses.dataclass(frozen=True)
class SeanetConfig:
    """Shape of the net; `ratios` are the encoder's strides from the waveform down, `code_dim` the width of latents.

    Published shapes: EnCodec 24 kHz is `ENCODEC_24KHZ`; SoundStream pads with zeros and has neither LSTM nor
    convolutions beside its residual units; the encoder of WavTokenizer is not causal.
    """

    sample_rate_hz: int
    filters: int
    ratios: tuple[int, ...]
    code_dim: int
    kernel_size: int
    last_kernel_size: int
    residual_kernel_size: int
    residual_layers: int
    dilation_growth: int
    compress: int
    lstm_layers: int
    causal: bool
    padding: Literal["reflect", "zero"]
    conv_shortcut: bool

    def __post_init__(self) -> None:
        if not self.ratios or min(self.ratios) < 1:
            raise ValueError(f"ratios {self.ratios} must be at least one stride, each at least 1")
        if self.filters % self.compress:
            raise ValueError(f"filters {self.filters} must be a multiple of compress {self.compress}")

    @property
    def hop(self) -> int:
        """Samples per code."""
        return math.prod(self.ratios)

    @property
    def start_codes(self) -> int:
        """Codes the first chunk of a stream needs: reflected padding shows the first layers their near future."""
        if self.padding == "zero":
            return 1
        widest = max(self.kernel_size, self.last_kernel_size)
        return max(widest, (self.residual_kernel_size - 1) * self.dilation_growth ** (self.residual_layers - 1) + 1)


ENCODEC_24KHZ = SeanetConfig(
    sample_rate_hz=24_000,
    filters=32,
    ratios=(2, 4, 5, 8),
    code_dim=128,
    kernel_size=7,
    last_kernel_size=7,
    residual_kernel_size=3,
    residual_layers=1,
    dilation_growth=2,
    compress=2,
    lstm_layers=2,
    causal=True,
    padding="reflect",
    conv_shortcut=True,
)
SOUNDSTREAM_24KHZ = dataclasses.replace(
    ENCODEC_24KHZ,
    residual_kernel_size=7,
    residual_layers=3,
    dilation_growth=3,
    compress=1,
    lstm_layers=0,
    padding="zero",
    conv_shortcut=False,
)


def silence_after(x_BTD: FloatArray, lengths_B: IntArray) -> FloatArray:
    """Zeros at and after each row's length."""
    return jnp.where(jnp.arange(x_BTD.shape[1])[None, :, None] < lengths_B[:, None, None], x_BTD, 0.0)


class Conv(nn.Module):
    """Convolution over time whose padding keeps ceil(length / stride) steps of every row."""

    features: int
    kernel_size: int
    config: SeanetConfig
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x_BTD: FloatArray, lengths_B: IntArray) -> tuple[FloatArray, IntArray]:
        _, num_steps, width = x_BTD.shape
        assert num_steps % self.stride == 0, "callers pad to whole hops"
        span = (self.kernel_size - 1) * self.dilation + 1
        right = 0 if self.config.causal else (span - self.stride) // 2
        left = span - self.stride - right
        shape = (self.kernel_size, width, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(in_axis=(0, 1)), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        if left or right:
            x_BTD = self._padded(silence_after(x_BTD, lengths_B), lengths_B, left, right)
        y = jax.lax.conv_general_dilated(
            x_BTD,
            kernel,
            (self.stride,),
            "VALID",
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return y + bias, -(-lengths_B // self.stride)

    def _padded(self, x_BTD: FloatArray, lengths_B: IntArray, left: int, right: int) -> FloatArray:
        batch, num_steps, width = x_BTD.shape
        continued = streaming.is_continuing(self, "past")
        if self.config.padding == "reflect" and not continued:
            assert num_steps > left, f"{num_steps} steps cannot be reflected over {left}"
            before = jnp.flip(x_BTD[:, 1 : left + 1], axis=1)
        else:
            before = streaming.recall(self, "past", jnp.zeros((batch, left, width), x_BTD.dtype))
        padded = jnp.concatenate([before, x_BTD], axis=1)
        streaming.remember(self, "past", padded[:, num_steps:])
        # The last window of a row reaches this far beyond its end.
        beyond = right + self.stride - 1
        if not beyond:
            return padded
        padded = jnp.pad(padded, ((0, 0), (0, beyond), (0, 0)))
        if self.config.padding == "reflect":
            padded = _reflect_ends(padded, lengths_B, left, right, self.stride, short_rows=not continued)
        return padded[:, : left + num_steps + right]


def _reflect_ends(
    padded: FloatArray, lengths_B: IntArray, left: int, right: int, stride: int, short_rows: bool
) -> FloatArray:
    """Mirrors each row at its own last step; a row too short for that is lengthened with zeros first.

    length 4, right 2:  . . a b c d | 0 0  ->  . . a b c d | c b
    """
    if short_rows:
        extra_B = -lengths_B % stride
        mirror_B = jnp.maximum(lengths_B, jnp.maximum(left, right + extra_B) + 1) - 1
    else:
        mirror_B = lengths_B - 1
    steps = lengths_B[:, None] + jnp.arange(right + stride - 1)[None]
    sources = jnp.where(steps > mirror_B[:, None], 2 * mirror_B[:, None] - steps, steps)
    # Steps from the row's end to the mirror are zeros already, being beyond its length.
    rows = jnp.arange(padded.shape[0])[:, None]
    values = padded[rows, jnp.clip(sources + left, 0, padded.shape[1] - 1)]
    values = jnp.where((sources < lengths_B[:, None])[..., None], values, 0.0)
    return padded.at[rows, steps + left].set(values)


class ConvTranspose(nn.Module):
    """Transposed convolution of kernel 2 * stride, trimmed to stride steps per step: what overhangs is dropped."""

    features: int
    stride: int
    config: SeanetConfig

    @nn.compact
    def __call__(self, x_BTD: FloatArray, lengths_B: IntArray) -> tuple[FloatArray, IntArray]:
        batch, num_steps, width = x_BTD.shape
        shape = (2 * self.stride, width, self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(in_axis=(0, 1)), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel = kernel.transpose(1, 0, 2).reshape(width, -1)
        y = (silence_after(x_BTD, lengths_B) @ kernel).reshape(batch, num_steps, 2, self.stride, self.features)
        first, second = y[:, :, 0], y[:, :, 1]
        before = streaming.recall(self, "past", jnp.zeros_like(second[:, :1]))
        streaming.remember(self, "past", second[:, -1:])
        overlap = jnp.concatenate([before, second], axis=1)
        if self.config.causal:
            y = first + overlap[:, :-1]
        else:
            y = jnp.pad(first, ((0, 0), (0, 1), (0, 0), (0, 0))) + overlap
        y = y.reshape(batch, -1, self.features)
        if not self.config.causal:
            cut = self.stride - self.stride // 2
            y = y[:, cut : cut + num_steps * self.stride]
        return y + bias, lengths_B * self.stride


class Lstm(nn.Module):
    """LSTM layers over time beside the identity; gates in the order input, forget, cell, output."""

    num_layers: int

    @nn.compact
    def __call__(self, x_BTD: FloatArray) -> FloatArray:
        batch, _, width = x_BTD.shape
        y_TBD = x_TBD = jnp.swapaxes(x_BTD, 0, 1)
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        for layer in range(self.num_layers):
            kernel_input = self.param(f"kernel_input_{layer}", init, (width, 4 * width), jnp.float32)
            kernel_hidden = self.param(f"kernel_hidden_{layer}", init, (width, 4 * width), jnp.float32)
            bias = self.param(f"bias_{layer}", nn.initializers.zeros, (4 * width,), jnp.float32)
            name = f"memory_{layer}"
            memory = streaming.recall(self, name, jnp.zeros((2, batch, width), x_BTD.dtype))
            memory, y_TBD = _lstm_layer(memory, y_TBD @ kernel_input + bias, kernel_hidden)
            streaming.remember(self, name, memory)
        return jnp.swapaxes(y_TBD + x_TBD, 0, 1)


def _lstm_layer(memory: FloatArray, inputs: FloatArray, kernel_hidden: FloatArray) -> tuple[FloatArray, FloatArray]:
    """memory [2, B, D] (hidden, cell), inputs [T, B, 4D] -> (memory after, hidden states [T, B, D])."""

    def step(memory: FloatArray, gates: FloatArray) -> tuple[FloatArray, FloatArray]:
        enter, forget, fresh, leave = jnp.split(gates + memory[0] @ kernel_hidden, 4, axis=-1)
        cell = nn.sigmoid(forget) * memory[1] + nn.sigmoid(enter) * jnp.tanh(fresh)
        hidden = nn.sigmoid(leave) * jnp.tanh(cell)
        return jnp.stack([hidden, cell]), hidden

    return jax.lax.scan(step, memory, inputs)


class ResidualUnit(nn.Module):
    """A dilated and a pointwise convolution, each after an ELU, beside the identity or a pointwise convolution."""

    dilation: int
    config: SeanetConfig

    @nn.compact
    def __call__(self, x_BTD: FloatArray, lengths_B: IntArray) -> FloatArray:
        cfg, width = self.config, x_BTD.shape[-1]
        wide = Conv(width // cfg.compress, cfg.residual_kernel_size, cfg, dilation=self.dilation, name="wide")
        y, _ = wide(nn.elu(x_BTD), lengths_B)
        y, _ = Conv(width, 1, cfg, name="pointwise")(nn.elu(y), lengths_B)
        if cfg.conv_shortcut:
            x_BTD, _ = Conv(width, 1, cfg, name="shortcut")(x_BTD, lengths_B)
        return x_BTD + y


class SeanetEncoder(nn.Module):
    """Waveform [B, U*hop] to latents [B, U, code_dim]; rows end at `lengths_B` samples."""

    config: SeanetConfig

    @nn.compact
    def __call__(self, waveform_BT: FloatArray, lengths_B: IntArray) -> FloatArray:
        cfg = self.config
        x, lengths_B = Conv(cfg.filters, cfg.kernel_size, cfg, name="conv_in")(waveform_BT[..., None], lengths_B)
        for stage, ratio in enumerate(cfg.ratios):
            for layer in range(cfg.residual_layers):
                x = ResidualUnit(cfg.dilation_growth**layer, cfg, name=f"stage_{stage}_unit_{layer}")(x, lengths_B)
            down = Conv(2 * x.shape[-1], 2 * ratio, cfg, stride=ratio, name=f"stage_{stage}_down")
            x, lengths_B = down(nn.elu(x), lengths_B)
        if cfg.lstm_layers:
            x = Lstm(cfg.lstm_layers, name="lstm")(x)
        x, _ = Conv(cfg.code_dim, cfg.last_kernel_size, cfg, name="conv_out")(nn.elu(x), lengths_B)
        return x


class SeanetDecoder(nn.Module):
    """Latents [B, U, code_dim] to waveform [B, U*hop]; rows end at `lengths_B` codes."""

    config: SeanetConfig

    @nn.compact
    def __call__(self, latents_BUE: FloatArray, lengths_B: IntArray) -> FloatArray:
        cfg = self.config
        width = cfg.filters * 2 ** len(cfg.ratios)
        x, _ = Conv(width, cfg.kernel_size, cfg, name="conv_in")(latents_BUE, lengths_B)
        if cfg.lstm_layers:
            x = Lstm(cfg.lstm_layers, name="lstm")(x)
        for stage, ratio in enumerate(reversed(cfg.ratios)):
            width //= 2
            x, lengths_B = ConvTranspose(width, ratio, cfg, name=f"stage_{stage}_up")(nn.elu(x), lengths_B)
            for layer in range(cfg.residual_layers):
                x = ResidualUnit(cfg.dilation_growth**layer, cfg, name=f"stage_{stage}_unit_{layer}")(x, lengths_B)
        x, _ = Conv(1, cfg.last_kernel_size, cfg, name="conv_out")(nn.elu(x), lengths_B)
        return x[..., 0]


class Seanet(nn.Module):
    """Encoder and decoder in one parameter tree; the quantizer between them lives outside."""

    config: SeanetConfig

    def setup(self) -> None:
        self.encoder = SeanetEncoder(self.config)
        self.decoder = SeanetDecoder(self.config)

    def encode(self, waveform_BT: FloatArray, lengths_B: IntArray | None = None) -> FloatArray:
        return self.encoder(waveform_BT, _full(waveform_BT) if lengths_B is None else lengths_B)

    def decode(self, latents_BUE: FloatArray, lengths_B: IntArray | None = None) -> FloatArray:
        return self.decoder(latents_BUE, _full(latents_BUE) if lengths_B is None else lengths_B)

    def __call__(self, waveform_BT: FloatArray) -> FloatArray:
        """Without a quantizer: for parameter initialisation."""
        return self.decode(self.encode(waveform_BT))


def _full(x: FloatArray) -> IntArray:
    return jnp.full(x.shape[0], x.shape[1], jnp.int32)
