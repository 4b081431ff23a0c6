"""The families of speech codecs, as pure functions behind one interface: a net, its codebooks, whole or in chunks.

A codec is a frozen dataclass, and its fields are its identity: codes of equal codecs with equal weights mean the same.
`variables` holds {"params": ..., codebook_name: ...}. Batches are padded to any whole number of hops; rows say where
they end, and their results do not depend on the padding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from aromni_jax.arrays import FloatArray, IntArray, PyTree
from aromni_jax.tokenizers.nets import quantize, residual_vq
from aromni_jax.tokenizers.nets.seanet import Seanet, SeanetConfig
from aromni_jax.tokenizers.nets.streaming import STREAM
from aromni_jax.tokenizers.nets.vocos import Vocos, VocosConfig
from aromni_jax.tokenizers.nets.wavtokenizer import WavTokenizer, WavTokenizerConfig

Variables = Mapping[str, PyTree]
_exact = functools.partial(jax.default_matmul_precision, "highest")
"""Published codes are those of float32; accelerators multiply in less unless told."""


class Codec(Protocol):
    """What `SpeechTokenizer` and the streams need to know of a family.

    `codebook_name`: what `variables` calls the codebooks.
    """

    @property
    def sample_rate_hz(self) -> int: ...

    @property
    def hop(self) -> int: ...

    @property
    def num_codes(self) -> int: ...

    @property
    def num_codebooks(self) -> int: ...

    @property
    def codebook_name(self) -> str: ...

    def shapes(self) -> dict[str, PyTree]:
        """ShapeDtypeStructs of `variables`."""

    def encode(self, variables: Variables, waveform_BT: FloatArray, lengths_B: IntArray) -> IntArray:
        """[B, U*hop], ending at `lengths_B` samples, to int32 codes [B, K, U]."""

    def decode(self, variables: Variables, codes_BKU: IntArray, lengths_B: IntArray) -> FloatArray:
        """[B, K, U], ending at `lengths_B` codes, to waveform [B, U*hop]."""


class StreamingCodec(Codec, Protocol):
    """A causal codec, which also works chunk by chunk; chunks of one state, put together, are the whole.

    `delay_samples`: how late decoded sound comes. `start_codes`: how many codes the first chunk needs at least; where
    it is 1, a state of zeros is the start too.
    """

    @property
    def start_codes(self) -> int: ...

    @property
    def delay_samples(self) -> int: ...

    def encode_chunk(
        self, variables: Variables, state: PyTree | None, waveform_BT: FloatArray, lengths_B: IntArray
    ) -> tuple[PyTree, IntArray]:
        """The next chunk of each row; state None: the first. Only the last chunk may end before its hops do."""

    def decode_chunk(
        self, variables: Variables, state: PyTree | None, codes_BKU: IntArray, lengths_B: IntArray
    ) -> tuple[PyTree, FloatArray]:
        """The next chunk of each row; codes at and past `lengths_B` are the silence that brings out what is late."""


def _chunk(net: Any, variables: Variables, state: PyTree | None, *args: Any, method: str) -> tuple[PyTree, FloatArray]:
    held = {"params": variables["params"]} | ({} if state is None else {STREAM: state})
    result, after = net.apply(held, *args, method=method, mutable=[STREAM])
    return after[STREAM], result


def _param_shapes(net: Any, num_samples: int) -> PyTree:
    waveform = jax.ShapeDtypeStruct((1, num_samples), jnp.float32)
    return jax.eval_shape(net.init, jax.random.key(0), waveform)["params"]


@dataclasses.dataclass(frozen=True)
class VocosCodec:
    """Our small causal codec of frames, one codebook of normalised latents: what the quickstart trains."""

    net: VocosConfig
    num_codes: int

    num_codebooks = 1
    codebook_name = "codebook_CE"
    start_codes = 1

    @property
    def sample_rate_hz(self) -> int:
        return self.net.sample_rate_hz

    @property
    def hop(self) -> int:
        return self.net.hop

    @property
    def delay_samples(self) -> int:
        return self.net.window - self.net.frame_hop

    def shapes(self) -> dict[str, PyTree]:
        table = jax.ShapeDtypeStruct((self.num_codes, self.net.code_dim), jnp.float32)
        return {"params": _param_shapes(Vocos(self.net), 8 * self.hop), self.codebook_name: table}

    def _codes(self, variables: Variables, latents_BUE: FloatArray) -> IntArray:
        codes_BU = quantize.nearest_codes(variables[self.codebook_name], quantize.normalize(latents_BUE))
        return codes_BU[:, None]

    def encode(self, variables: Variables, waveform_BT: FloatArray, lengths_B: IntArray) -> IntArray:
        latents_BUE = Vocos(self.net).apply({"params": variables["params"]}, waveform_BT, method="encode")
        return self._codes(variables, latents_BUE)

    def decode(self, variables: Variables, codes_BKU: IntArray, lengths_B: IntArray) -> FloatArray:
        latents_BUE = variables[self.codebook_name][codes_BKU[:, 0]]
        waveform_BT: FloatArray = Vocos(self.net).apply(
            {"params": variables["params"]}, latents_BUE, lengths_B, method="decode"
        )
        return jnp.clip(waveform_BT, -1.0, 1.0)

    def encode_chunk(
        self, variables: Variables, state: PyTree | None, waveform_BT: FloatArray, lengths_B: IntArray
    ) -> tuple[PyTree, IntArray]:
        state, latents_BUE = _chunk(Vocos(self.net), variables, state, waveform_BT, method="encode")
        return state, self._codes(variables, latents_BUE)

    def decode_chunk(
        self, variables: Variables, state: PyTree | None, codes_BKU: IntArray, lengths_B: IntArray
    ) -> tuple[PyTree, FloatArray]:
        latents_BUE = variables[self.codebook_name][codes_BKU[:, 0]]
        state, waveform_BT = _chunk(Vocos(self.net), variables, state, latents_BUE, lengths_B, method="decode")
        return state, jnp.clip(waveform_BT, -1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class SeanetCodec:
    """SoundStream and EnCodec: SEANet around a residual quantizer of any number of codebooks."""

    family: Literal["seanet"]
    net: SeanetConfig
    num_codes: int
    num_codebooks: int

    codebook_name = "codebooks_KCE"
    delay_samples = 0

    @property
    def sample_rate_hz(self) -> int:
        return self.net.sample_rate_hz

    @property
    def hop(self) -> int:
        return self.net.hop

    @property
    def start_codes(self) -> int:
        return self.net.start_codes

    def shapes(self) -> dict[str, PyTree]:
        table = jax.ShapeDtypeStruct((self.num_codebooks, self.num_codes, self.net.code_dim), jnp.float32)
        return {"params": _param_shapes(Seanet(self.net), 16 * self.hop), self.codebook_name: table}

    def encode(self, variables: Variables, waveform_BT: FloatArray, lengths_B: IntArray) -> IntArray:
        with _exact():
            params = {"params": variables["params"]}
            latents_BUE = Seanet(self.net).apply(params, waveform_BT, lengths_B, method="encode")
            return residual_vq.encode(variables[self.codebook_name], latents_BUE)

    def decode(self, variables: Variables, codes_BKU: IntArray, lengths_B: IntArray) -> FloatArray:
        with _exact():
            latents_BUE = residual_vq.decode(variables[self.codebook_name], codes_BKU)
            params = {"params": variables["params"]}
            waveform_BT: FloatArray = Seanet(self.net).apply(params, latents_BUE, lengths_B, method="decode")
            return waveform_BT

    def encode_chunk(
        self, variables: Variables, state: PyTree | None, waveform_BT: FloatArray, lengths_B: IntArray
    ) -> tuple[PyTree, IntArray]:
        with _exact():
            net = Seanet(self.net)
            state, latents_BUE = _chunk(net, variables, state, waveform_BT, lengths_B, method="encode")
            return state, residual_vq.encode(variables[self.codebook_name], latents_BUE)

    def decode_chunk(
        self, variables: Variables, state: PyTree | None, codes_BKU: IntArray, lengths_B: IntArray
    ) -> tuple[PyTree, FloatArray]:
        with _exact():
            latents_BUE = residual_vq.decode(variables[self.codebook_name], codes_BKU)
            return _chunk(Seanet(self.net), variables, state, latents_BUE, lengths_B, method="decode")


@dataclasses.dataclass(frozen=True)
class WavTokenizerCodec:
    """WavTokenizer: one codebook, a decoder that attends over the whole utterance; it does not stream exactly."""

    family: Literal["wavtokenizer"]
    net: WavTokenizerConfig
    num_codes: int

    num_codebooks = 1
    codebook_name = "codebook_CE"

    @property
    def sample_rate_hz(self) -> int:
        return self.net.encoder.sample_rate_hz

    @property
    def hop(self) -> int:
        return self.net.encoder.hop

    def shapes(self) -> dict[str, PyTree]:
        table = jax.ShapeDtypeStruct((self.num_codes, self.net.encoder.code_dim), jnp.float32)
        return {"params": _param_shapes(WavTokenizer(self.net), 16 * self.hop), self.codebook_name: table}

    def encode(self, variables: Variables, waveform_BT: FloatArray, lengths_B: IntArray) -> IntArray:
        with _exact():
            params = {"params": variables["params"]}
            latents_BUE = WavTokenizer(self.net).apply(params, waveform_BT, lengths_B, method="encode")
            return quantize.nearest_codes(variables[self.codebook_name], latents_BUE)[:, None]

    def decode(self, variables: Variables, codes_BKU: IntArray, lengths_B: IntArray) -> FloatArray:
        with _exact():
            latents_BUE = variables[self.codebook_name][codes_BKU[:, 0]]
            params = {"params": variables["params"]}
            # Rows that only fill a batch have no codes; one silent code keeps their norms defined.
            lengths_B = jnp.maximum(lengths_B, 1)
            waveform_BT: FloatArray = WavTokenizer(self.net).apply(params, latents_BUE, lengths_B, method="decode")
            return waveform_BT


def streaming_codec(codec: Codec) -> StreamingCodec | None:
    """The codec as one that works chunk by chunk, or None when its net looks into the future without bound."""
    if isinstance(codec, VocosCodec) or (isinstance(codec, SeanetCodec) and codec.net.causal):
        return codec
    return None
