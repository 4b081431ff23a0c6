"""The speech tokenizer: a causal codec and its codebook. Mono sound to codes at a fixed rate, and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile
from scipy.signal import resample_poly

from aromni_jax import config as config_lib
from aromni_jax.arrays import FloatArray, IntArray, PyTree
from aromni_jax.tokenizers import storage
from aromni_jax.tokenizers.nets import quantize, spectral
from aromni_jax.tokenizers.nets.vocos import Vocos, VocosConfig
from aromni_jax.tokenizers.training import CodecNet, CodecRecipe, Progress, train_codec

_SMALLEST_BUCKET = 64
_CODES_PER_CALL = 1024
"""A call holds as many utterances of a bucket as make this many codes (at least one): the shape of a call depends on
the length of an utterance only, so its codes cannot depend on what stands beside it."""
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
        hop=320,
        window=640,
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
"""16 kHz, 50 codes a second of 1024: about two and a half minutes on one CPU core."""


class SpeechTokenizer:
    """Sound to codes and back, any number of utterances of any length."""

    num_codebooks = 1

    def __init__(self, config: SpeechTokenizerConfig, params: PyTree, codebook_CE: np.ndarray) -> None:
        self.config = config
        self.params = params
        self.codebook_CE = np.asarray(codebook_CE, np.float32)
        net: CodecNet = Vocos(config.net)

        @jax.jit
        def encode(params: PyTree, codebook_CE: FloatArray, waveform_BT: FloatArray) -> IntArray:
            latents = net.apply({"params": params}, waveform_BT, method="encode")
            return quantize.nearest_codes(codebook_CE, quantize.normalize(latents))

        @jax.jit
        def decode(params: PyTree, codebook_CE: FloatArray, codes_BU: IntArray, lengths_B: IntArray) -> FloatArray:
            waveform_BT: FloatArray = net.apply({"params": params}, codebook_CE[codes_BU], lengths_B, method="decode")
            return jnp.clip(waveform_BT, -1.0, 1.0)

        self._encode, self._decode = encode, decode

    @property
    def num_codes(self) -> int:
        """Codes in each codebook."""
        return self.config.num_codes

    @property
    def sample_rate_hz(self) -> int:
        return self.config.net.sample_rate_hz

    @property
    def hop(self) -> int:
        """Samples per code."""
        return self.config.net.hop

    @property
    def codes_per_second(self) -> float:
        return self.sample_rate_hz / self.hop

    @property
    def lookahead_codes(self) -> int:
        """A decoded hop is final once this many codes after its own are known; encoding needs no look-ahead."""
        return self.config.net.lookahead_codes

    @property
    def fingerprint(self) -> str:
        """Equal exactly when the same codes mean the same sound."""
        return storage.fingerprint(self._tree(), _net_description(self.config))

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """float32 waveforms [T] at `sample_rate_hz` to int32 codes [1, ceil(T / hop)]; use `prepare` for other sound.

        Raises:
          ValueError: an empty waveform, more than one dimension, NaN or infinity; the message gives its index.
        """
        checked = [_checked_waveform(waveform, f"waveform {i}") for i, waveform in enumerate(waveforms)]
        num_codes = [-(-len(waveform) // self.hop) for waveform in checked]
        codes: list[np.ndarray] = [np.zeros(0)] * len(checked)
        for indices, bucket in _calls(num_codes):
            waveform_BT = np.zeros((_rows(bucket), bucket * self.hop), np.float32)
            for row, i in enumerate(indices):
                waveform_BT[row, : len(checked[i])] = checked[i]
            codes_BU = np.asarray(self._encode(self.params, self.codebook_CE, waveform_BT))
            for row, i in enumerate(indices):
                codes[i] = codes_BU[row : row + 1, : num_codes[i]].copy()
        return codes

    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """int codes [1, U] to float32 waveforms of exactly U * hop samples; ValueError for codes out of range."""
        checked = [_checked_codes(codes_KU, self.num_codes, f"codes {i}") for i, codes_KU in enumerate(codes)]
        waveforms: list[np.ndarray] = [np.zeros(0, np.float32)] * len(checked)
        for indices, bucket in _calls([len(codes_U) for codes_U in checked]):
            codes_BU = np.zeros((_rows(bucket), bucket), np.int32)
            lengths_B = np.zeros(len(codes_BU), np.int32)
            for row, i in enumerate(indices):
                codes_BU[row, : len(checked[i])] = checked[i]
                lengths_B[row] = len(checked[i])
            waveform_BT = np.asarray(self._decode(self.params, self.codebook_CE, codes_BU, lengths_B))
            for row, i in enumerate(indices):
                waveforms[i] = waveform_BT[row, : lengths_B[row] * self.hop].copy()
        return waveforms

    def prepare(self, sound: np.ndarray | str | Path, rate_hz: int | None = None) -> np.ndarray:
        """Any sound, or the path of one, as float32 mono at `sample_rate_hz`: see `prepare_sound`."""
        return prepare_sound(sound, rate_hz, self.sample_rate_hz)

    def save(self, directory: str | Path) -> None:
        """Writes `config.json` and `params.safetensors`."""
        directory = Path(directory)
        storage.save_tree(directory / "params.safetensors", self._tree(), identity=_net_description(self.config))
        (directory / "config.json").write_text(config_lib.to_json(self.config))

    @classmethod
    def load(cls, directory: str | Path) -> SpeechTokenizer:
        """Inverse of `save`; ValueError naming the file and the tensor when they do not fit."""
        cfg = config_lib.from_mapping(SpeechTokenizerConfig, storage.read_json(Path(directory) / "config.json"))
        waveform = jax.ShapeDtypeStruct((1, cfg.net.hop * 8), jnp.float32)
        like = {
            "params": jax.eval_shape(Vocos(cfg.net).init, jax.random.key(0), waveform)["params"],
            "codebook_CE": jax.ShapeDtypeStruct((cfg.num_codes, cfg.net.code_dim), jnp.float32),
        }
        path = Path(directory) / "params.safetensors"
        tree = storage.load_tree(path, like, identity=_net_description(cfg))
        return cls(cfg, tree["params"], np.asarray(tree["codebook_CE"]))

    def _tree(self) -> Mapping[str, Any]:
        return {"params": self.params, "codebook_CE": self.codebook_CE}


def prepare_sound(sound: np.ndarray | str | Path, rate_hz: int | None, target_rate_hz: int) -> np.ndarray:
    """Sound as float32 mono at `target_rate_hz`: channels averaged, integers scaled to [-1, 1], rate converted.

    Args:
      sound: samples [T] or [T, channels], integer or float; or the path of a WAV, FLAC or Ogg file.
      rate_hz: rate of an array; a file knows its own.

    Raises:
      ValueError: naming the file: not a sound file, no samples, NaN or infinity, no rate.
    """
    name = "sound"
    if isinstance(sound, (str, Path)):
        name = str(sound)
        if not Path(sound).exists():
            raise FileNotFoundError(f"{name} does not exist")
        try:
            sound, rate_hz = soundfile.read(sound, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{name} cannot be read as sound: {error}") from error
    samples = np.asarray(sound)
    if rate_hz is None or rate_hz < 1:
        raise ValueError(f"{name}: sample rate {rate_hz} is not a positive number of hertz")
    if np.issubdtype(samples.dtype, np.integer):
        # Unsigned samples, as in 8-bit WAV, are silent in the middle of their range.
        half_range = 2.0 ** (8 * samples.dtype.itemsize - 1)
        middle = half_range if np.issubdtype(samples.dtype, np.unsignedinteger) else 0.0
        samples = (samples.astype(np.float64) - middle) / half_range
    if samples.ndim == 2 and samples.size:
        samples = samples.mean(axis=1)
    waveform = _checked_waveform(samples.astype(np.float64), name)
    if rate_hz != target_rate_hz:
        divisor = math.gcd(int(rate_hz), target_rate_hz)
        waveform = resample_poly(waveform, target_rate_hz // divisor, int(rate_hz) // divisor)
    return waveform.astype(np.float32)


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
    if not waveforms:
        raise ValueError("cannot train a speech tokenizer on no utterances")
    checked = [_checked_waveform(waveform, f"waveform {i}").astype(np.float32) for i, waveform in enumerate(waveforms)]
    if 8 * config.recipe.batch_size * config.crop_codes < config.num_codes:
        raise ValueError(f"{config.num_codes} codes need larger batches or crops to start from")
    crop = config.crop_codes * config.net.hop
    starts = np.cumsum([0, *(len(waveform) for waveform in checked)])
    everything = np.concatenate([*checked, np.zeros(crop, np.float32)])

    def batch_at(generator: np.random.Generator) -> np.ndarray:
        # Crops run across the border of utterances: sound begins and ends at any place of a crop.
        chosen = generator.integers(0, starts[-1], config.recipe.batch_size)
        return np.stack([everything[start : start + crop] for start in chosen])

    data = hashlib.sha256(everything.tobytes()).hexdigest()[:16]
    identity = json.dumps({"config": dataclasses.asdict(config), "seed": seed, "waveforms": data}, sort_keys=True)
    params, codebook_CE = train_codec(
        Vocos(config.net),
        batch_at,
        _reconstruction_loss(config),
        config.recipe,
        num_codes=config.num_codes,
        code_dim=config.net.code_dim,
        seed=seed,
        workdir=workdir,
        identity=identity,
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


def _net_description(config: SpeechTokenizerConfig) -> str:
    return json.dumps({"net": dataclasses.asdict(config.net), "num_codes": config.num_codes}, sort_keys=True)


def _bucket(num_codes: int) -> int:
    return max(_SMALLEST_BUCKET, 1 << (num_codes - 1).bit_length())


def _rows(bucket: int) -> int:
    return max(1, _CODES_PER_CALL // bucket)


def _calls(lengths: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """(indices of utterances, bucket) of each compiled call."""
    buckets: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        if length:
            buckets.setdefault(_bucket(length), []).append(index)
    for bucket, indices in sorted(buckets.items()):
        for start in range(0, len(indices), _rows(bucket)):
            yield indices[start : start + _rows(bucket)], bucket


def _checked_waveform(waveform: np.ndarray, name: str) -> np.ndarray:
    waveform = np.asarray(waveform)
    if waveform.size == 0:
        raise ValueError(f"{name} has no samples")
    if waveform.ndim != 1:
        raise ValueError(f"{name} has shape {waveform.shape}, expected one dimension of samples")
    if not np.isfinite(waveform).all():
        bad = int(np.flatnonzero(~np.isfinite(waveform))[0])
        raise ValueError(f"{name} has a value that is not a number (sample {bad})")
    return waveform


def _checked_codes(codes_KU: np.ndarray, num_codes: int, name: str) -> np.ndarray:
    codes_KU = np.asarray(codes_KU, np.int32)
    if codes_KU.ndim != 2 or len(codes_KU) != 1:
        raise ValueError(f"{name} have shape {codes_KU.shape}, expected [1, number of frames]")
    if codes_KU.size and (codes_KU.min() < 0 or codes_KU.max() >= num_codes):
        raise ValueError(f"{name} must lie in 0..{num_codes - 1}, found {codes_KU.min()}..{codes_KU.max()}")
    return codes_KU[0]
