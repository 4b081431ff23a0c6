"""The speech tokenizer: a causal codec and its codebook. Mono sound to codes at a fixed rate, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax import config as config_lib
from aromni_jax.arrays import FloatArray, PyTree
from aromni_jax.tokenizers import storage
from aromni_jax.tokenizers.adversarial import AdaptiveCriterion
from aromni_jax.tokenizers.nets import quantize, spectral
from aromni_jax.tokenizers.nets.vocos import Vocos, VocosConfig
from aromni_jax.tokenizers.replicas import Batch, Replicas, ReplicatedFunction
from aromni_jax.tokenizers.speech_codecs import Codec, SeanetCodec, VocosCodec, WavTokenizerCodec, streaming_codec
from aromni_jax.tokenizers.speech_input import RandomCrops, Report, checked_waveform, prepare_sound
from aromni_jax.tokenizers.speech_stream import DecoderStream, EncoderStream, Window, WindowedDecoder, WindowedEncoder
from aromni_jax.tokenizers.training import CodecRecipe, Progress, train_codec

_SMALLEST_BUCKET = 64
_CODES_PER_DEVICE = 1024
"""In a call every device has as many utterances of a bucket as make this many codes (at least one): the shape of its
work depends on the length of an utterance only, so codes depend neither on what stands beside them nor on how many
devices there are."""
_LONGEST_CALL = 4096
"""Codes of the longest utterance that is worked on as a whole: what bounds memory."""
STREAM_WINDOW = Window(chunk_codes=8, context_codes=64, lookahead_codes=8)
"""Of codecs that are not causal, in conversation."""
_LONG_WINDOW = Window(chunk_codes=1024, context_codes=256, lookahead_codes=64)
"""Of codecs that are not causal, for utterances beyond `_LONGEST_CALL`."""
_MEL_WINDOWS = ((256, 32), (512, 64), (1024, 80))
"""(window, number of mel bands) of the loss; hops are a quarter of the window."""


@dataclasses.dataclass(frozen=True)
class SpeechTokenizerConfig:
    """Net, codebook size, and how it is trained: mel and spectral losses at three resolutions on random crops."""

    net: VocosConfig
    num_codes: int
    mel_weight: float
    spectral_weight: float
    crop_codes: int
    recipe: CodecRecipe


QUICKSTART = SpeechTokenizerConfig(
    net=VocosConfig(
        sample_rate_hz=16_000,
        hop=400,
        window=800,
        frames_per_code=1,
        num_mels=80,
        encoder_dim=128,
        encoder_layers=3,
        decoder_dim=192,
        decoder_layers=5,
        expansion=2,
        kernel_size=7,
        code_dim=32,
    ),
    num_codes=1024,
    mel_weight=1.0,
    spectral_weight=1.0,
    crop_codes=40,
    recipe=CodecRecipe(
        total_steps=1000,
        batch_size=8,
        learning_rate=4e-3,
        warmup_fraction=0.03,
        continuous_fraction=0.15,
        commitment_weight=0.25,
        codebook_decay=0.98,
        revive_every_steps=25,
        revive_below=0.05,
        clip_norm=1.0,
        log_every_steps=25,
    ),
)
"""16 kHz, 40 codes a second of 1024: about two minutes on one CPU core."""


class SpeechTokenizer:
    """Sound to codes and back, any number of utterances of any length, by a codec of any family.

    `config` is a codec, or the recipe one was trained by; `codebook` is [C, E], or [K, C, E] of a residual quantizer.
    All local devices take part, or those given; what becomes of an utterance does not depend on their number.
    """

    def __init__(
        self,
        config: SpeechTokenizerConfig | SeanetCodec | WavTokenizerCodec,
        params: PyTree,
        codebook: np.ndarray,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self.config = config
        self.codec: Codec = (
            VocosCodec(config.net, config.num_codes) if isinstance(config, SpeechTokenizerConfig) else config
        )
        self.params = params
        self.codebook = np.asarray(codebook, np.float32)
        self._replicas = Replicas(self._variables, devices)
        self._encode = ReplicatedFunction(self.codec.encode, self._replicas)
        self._decode = ReplicatedFunction(self.codec.decode, self._replicas)
        self._streams: dict[tuple[str, Window], Any] = {}

    @property
    def num_codes(self) -> int:
        """Codes in each codebook."""
        return self.codec.num_codes

    @property
    def num_codebooks(self) -> int:
        """Codes that each hop has, one per codebook."""
        return self.codec.num_codebooks

    @property
    def sample_rate_hz(self) -> int:
        return self.codec.sample_rate_hz

    @property
    def hop(self) -> int:
        """Samples per code."""
        return self.codec.hop

    @property
    def codes_per_second(self) -> float:
        """Hops in a second, each with a code per codebook."""
        return self.sample_rate_hz / self.hop

    @property
    def lookahead_codes(self) -> int | None:
        """A decoded hop is final once this many codes after its own are known; None: once all are."""
        codec = streaming_codec(self.codec)
        return None if codec is None else -(-codec.delay_samples // codec.hop)

    @property
    def num_devices(self) -> int:
        """Devices that work on a batch, each on utterances of its own."""
        return self._replicas.num_devices

    @property
    def fingerprint(self) -> str:
        """Equal exactly when the same codes mean the same sound."""
        return storage.fingerprint(self._variables, _description(self.codec))

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """float32 waveforms [T] at `sample_rate_hz` to int32 codes [K, ceil(T / hop)]; use `prepare` for other sound.

        Utterances of more than 4,096 codes go through a stream in bounded memory; where the codec is not causal, that
        is near the whole, not equal to it.

        Raises:
          ValueError: an empty waveform, more than one dimension, NaN or infinity; the message gives its index.
        """
        checked = [checked_waveform(waveform, f"waveform {i}") for i, waveform in enumerate(waveforms)]
        num_codes = [-(-len(waveform) // self.hop) for waveform in checked]
        codes: list[np.ndarray] = [np.zeros(0)] * len(checked)
        whole, long = self._calls(num_codes)
        for i in long:
            codes[i] = _through(self.stream_encoder(_LONG_WINDOW), checked[i], bucket_size=1024 * self.hop)

        def batches() -> Iterator[Batch]:
            for indices, num_rows, bucket in whole:
                waveform_BT = np.zeros((num_rows, bucket * self.hop), np.float32)
                lengths_B = np.zeros(num_rows, np.int32)
                for row, i in enumerate(indices):
                    waveform_BT[row, : len(checked[i])] = checked[i]
                    lengths_B[row] = len(checked[i])
                yield (waveform_BT, lengths_B), len(indices)

        for (indices, _, _), codes_BKU in zip(whole, self._encode.in_turn(batches())):
            for row, i in enumerate(indices):
                codes[i] = codes_BKU[row, :, : num_codes[i]].copy()
        return codes

    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """int codes [K, U] to float32 waveforms of exactly U * hop samples; ValueError for codes out of range."""
        checked = [_checked_codes(item, self.codec, f"codes {i}") for i, item in enumerate(codes)]
        waveforms: list[np.ndarray] = [np.zeros(0, np.float32)] * len(checked)
        whole, long = self._calls([codes_KU.shape[1] for codes_KU in checked])
        for i in long:
            waveforms[i] = _through(self.stream_decoder(_LONG_WINDOW), checked[i], bucket_size=1024)

        def batches() -> Iterator[Batch]:
            for indices, num_rows, bucket in whole:
                codes_BKU = np.zeros((num_rows, self.num_codebooks, bucket), np.int32)
                lengths_B = np.zeros(num_rows, np.int32)
                for row, i in enumerate(indices):
                    lengths_B[row] = checked[i].shape[1]
                    codes_BKU[row, :, : lengths_B[row]] = checked[i]
                yield (codes_BKU, lengths_B), len(indices)

        for (indices, _, _), waveform_BT in zip(whole, self._decode.in_turn(batches())):
            for row, i in enumerate(indices):
                waveforms[i] = waveform_BT[row, : checked[i].shape[1] * self.hop].copy()
        return waveforms

    def prepare(
        self, sound: np.ndarray | str | Path, rate_hz: int | None = None, report: Report = lambda line: None
    ) -> np.ndarray:
        """Any sound, or the path of one, as float32 mono at `sample_rate_hz`: see `prepare_sound`."""
        return prepare_sound(sound, rate_hz, self.sample_rate_hz, report)

    def stream_encoder(self, window: Window = STREAM_WINDOW) -> EncoderStream | WindowedEncoder:
        """Encodes a waveform as it comes: exactly where the codec is causal, else within `window` (see there)."""
        codec, key = streaming_codec(self.codec), ("encoder", window)
        if key not in self._streams:
            # Kept, since a stream owns compiled functions; its states are values that callers hold.
            self._streams[key] = (
                EncoderStream(codec, self._variables) if codec else WindowedEncoder(self.codec, self._variables, window)
            )
        return self._streams[key]

    def stream_decoder(self, window: Window = STREAM_WINDOW) -> DecoderStream | WindowedDecoder:
        """Decodes codes as they come: exactly where the codec is causal, else within `window` (see there)."""
        codec, key = streaming_codec(self.codec), ("decoder", window)
        if key not in self._streams:
            self._streams[key] = (
                DecoderStream(codec, self._variables) if codec else WindowedDecoder(self.codec, self._variables, window)
            )
        return self._streams[key]

    def with_codebooks(self, num_codebooks: int) -> SpeechTokenizer:
        """The same residual codec with its first codebooks only: fewer codes a second, coarser sound."""
        if not isinstance(self.config, SeanetCodec):
            raise ValueError("this codec has a single codebook; only a residual quantizer can do with fewer")
        if not 1 <= num_codebooks <= self.num_codebooks:
            raise ValueError(f"num_codebooks must lie in 1..{self.num_codebooks}, not {num_codebooks}")
        config = dataclasses.replace(self.config, num_codebooks=num_codebooks)
        return SpeechTokenizer(config, self.params, self.codebook[:num_codebooks])

    def save(self, directory: str | Path, dtype: str = "float32") -> None:
        """Writes `config.json` and `params.safetensors`; with `dtype` float16 in half the size, rounded."""
        directory = Path(directory)
        storage.save_tree(
            directory / "params.safetensors", self._variables, identity=_description(self.codec), dtype=dtype
        )
        (directory / "config.json").write_text(config_lib.to_json(self.config))

    @classmethod
    def load(cls, directory: str | Path) -> SpeechTokenizer:
        """Inverse of `save`, for every family; ValueError naming the file and the tensor when they do not fit."""
        raw = storage.read_json(Path(directory) / "config.json")
        families = {None: SpeechTokenizerConfig, "seanet": SeanetCodec, "wavtokenizer": WavTokenizerCodec}
        if raw.get("family") not in families:
            known = ", ".join(name for name in families if name)
            raise ValueError(f"{directory}/config.json: family {raw['family']!r} is not one of {known}")
        config: Any = config_lib.from_mapping(families[raw.get("family")], raw)
        tokenizer = cls(config, {}, np.zeros(0))
        path = Path(directory) / "params.safetensors"
        tree = storage.load_tree(path, tokenizer.codec.shapes(), identity=_description(tokenizer.codec))
        return cls(config, tree["params"], np.asarray(tree[tokenizer.codec.codebook_name]))

    def _calls(self, lengths: Sequence[int]) -> tuple[list[tuple[list[int], int, int]], list[int]]:
        """(indices of utterances, rows, bucket) of each compiled call; and the indices of those too long for one."""
        buckets: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            if length:
                buckets.setdefault(_bucket(length), []).append(index)
        calls = []
        for bucket, indices in sorted(buckets.items()):
            num_rows = max(1, _CODES_PER_DEVICE // bucket) * self._replicas.num_devices
            if bucket <= _LONGEST_CALL:
                calls += [
                    (indices[start : start + num_rows], num_rows, bucket) for start in range(0, len(indices), num_rows)
                ]
        return calls, [index for bucket, indices in buckets.items() if bucket > _LONGEST_CALL for index in indices]

    @property
    def _variables(self) -> dict[str, Any]:
        return {"params": self.params, self.codec.codebook_name: self.codebook}


def train_speech_tokenizer(
    waveforms: Sequence[np.ndarray],
    config: SpeechTokenizerConfig,
    seed: int,
    workdir: str | Path,
    progress: Progress = lambda metrics: None,
) -> SpeechTokenizer:
    """Trains on float32 waveforms [T] at the config's rate; goes on where an interrupted call with `workdir` stopped.

    `progress` receives step, total_steps, loss, mel_distance (natural log units, on the training batch) and
    perplexity. Equal arguments give an equal tokenizer on the same kind of device.

    Raises:
      ValueError: no or bad waveforms, or a `workdir` used with other settings or waveforms.
    """
    if 8 * config.recipe.batch_size * config.crop_codes < config.num_codes:
        raise ValueError(f"{config.num_codes} codes need larger batches or crops to start from")
    crops = RandomCrops(waveforms, config.crop_codes * config.net.hop, config.recipe.batch_size)
    description = {"config": storage.describe(config), "seed": seed, "waveforms": crops.fingerprint}
    params, codebook_CE = train_codec(
        Vocos(config.net),
        crops.batch,
        AdaptiveCriterion(_reconstruction_loss(config)),
        config.recipe,
        quantizer=quantize.OneCodebook(config.num_codes, config.net.code_dim),
        seed=seed,
        workdir=workdir,
        identity=json.dumps(description, sort_keys=True),
        progress=progress,
    )
    return SpeechTokenizer(config, params, codebook_CE)


def mel_distance(decoded_T: np.ndarray, target_T: np.ndarray, sample_rate_hz: int) -> float:
    """Mean absolute difference of log-mel frames (window 1024, hop 256, 80 bands), natural log units."""
    length = min(len(decoded_T), len(target_T)) // 256 * 256
    pair = jnp.asarray(np.stack([decoded_T[:length], target_T[:length]]))
    mel = np.asarray(spectral.log_mel(pair, sample_rate_hz, 1024, 256, 80))
    return float(np.abs(mel[0] - mel[1]).mean())


def _reconstruction_loss(
    config: SpeechTokenizerConfig,
) -> Callable[[FloatArray, FloatArray], tuple[FloatArray, dict[str, FloatArray]]]:
    def loss(decoded: FloatArray, target: FloatArray) -> tuple[FloatArray, dict[str, FloatArray]]:
        mel_total, spectral_total = jnp.float32(0), jnp.float32(0)
        for window, num_mels in _MEL_WINDOWS:
            length = target.shape[1] // window * window
            both = jnp.concatenate([decoded[:, :length], target[:, :length]])
            magnitude = spectral.magnitudes(both, window, window // 4)
            mel = magnitude @ spectral.mel_filters(config.net.sample_rate_hz, window, num_mels)
            log_decoded, log_target = jnp.split(jnp.log(jnp.maximum(mel, 1e-3)), 2)
            mel_total += jnp.mean(jnp.abs(log_decoded - log_target)) / len(_MEL_WINDOWS)
            fine_decoded, fine_target = jnp.split(magnitude, 2)
            error = jnp.sqrt(jnp.mean(jnp.square(fine_decoded - fine_target), axis=(1, 2)) + 1e-8)
            scale = jnp.sqrt(jnp.mean(jnp.square(fine_target), axis=(1, 2)) + 1e-4)
            spectral_total += jnp.mean(error / scale) / len(_MEL_WINDOWS)
        total = config.mel_weight * mel_total + config.spectral_weight * spectral_total
        return total, {"mel_distance": mel_total, "spectral_convergence": spectral_total}

    return loss


def _description(codec: Codec) -> str:
    return json.dumps(dataclasses.asdict(cast(Any, codec)), sort_keys=True)


def _through(stream: Any, sequence: np.ndarray, bucket_size: int) -> np.ndarray:
    """A whole sequence through a stream, some of its last axis at a time."""
    state, results = stream.start(), []
    for start in range(0, sequence.shape[-1], bucket_size):
        state, result = stream.step(state, sequence[..., start : start + bucket_size])
        results.append(result)
    return np.concatenate([*results, stream.finish(state)], axis=-1)


def _bucket(num_codes: int) -> int:
    return max(_SMALLEST_BUCKET, 1 << (num_codes - 1).bit_length())


def _checked_codes(codes_KU: np.ndarray, codec: Codec, name: str) -> np.ndarray:
    codes_KU = np.asarray(codes_KU, np.int32)
    if codes_KU.ndim != 2 or len(codes_KU) != codec.num_codebooks:
        raise ValueError(f"{name} have shape {codes_KU.shape}, expected [{codec.num_codebooks}, number of frames]")
    if codes_KU.size and (codes_KU.min() < 0 or codes_KU.max() >= codec.num_codes):
        raise ValueError(f"{name} must lie in 0..{codec.num_codes - 1}, found {codes_KU.min()}..{codes_KU.max()}")
    return codes_KU
