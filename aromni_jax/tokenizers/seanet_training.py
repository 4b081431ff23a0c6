"""Training of SoundStream and EnCodec codecs: SEANet, residual codebooks, balanced losses and an STFT discriminator.

Sources: Zeghidour et al. 2021, "SoundStream" (quantizer, form of the mel loss); Défossez et al. 2022, "High Fidelity
Neural Audio Compression" (windows and weights of the losses, discriminator, balancer).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from aromni_jax import config as config_lib
from aromni_jax.arrays import FloatArray
from aromni_jax.tokenizers import storage
from aromni_jax.tokenizers.balancing import BalancedCriterion, BalanceRecipe
from aromni_jax.tokenizers.nets import spectral
from aromni_jax.tokenizers.nets.residual_vq import ResidualCodebooks
from aromni_jax.tokenizers.nets.seanet import ENCODEC_24KHZ, Seanet, SeanetConfig
from aromni_jax.tokenizers.nets.stft_discriminator import StftDiscriminator, StftDiscriminatorConfig
from aromni_jax.tokenizers.speech import SpeechTokenizer
from aromni_jax.tokenizers.speech_codecs import SeanetCodec
from aromni_jax.tokenizers.speech_input import RandomCrops
from aromni_jax.tokenizers.training import CodecRecipe, Progress, train_codec

_MEL_WINDOWS = tuple(2**power for power in range(5, 12))
_MEL_BANDS = 64
_LOG_FLOOR = 1e-4


@dataclasses.dataclass(frozen=True)
class SeanetTraining:
    """Net, codebooks, opponent, and how they are trained, on random crops of `crop_codes` hops.

    `codebooks_per_batch`: numbers of codebooks of which each batch draws one (quantizer dropout); none: always all.
    The codebooks learn by moving averages; latents are compared with them as they are.
    """

    family: Literal["seanet"]
    net: SeanetConfig
    num_codes: int
    num_codebooks: int
    codebooks_per_batch: tuple[int, ...]
    crop_codes: int
    discriminator: StftDiscriminatorConfig
    balance: BalanceRecipe
    recipe: CodecRecipe

    def __post_init__(self) -> None:
        if self.recipe.codebook_update != "ema":
            raise ValueError(f"codebook_update {self.recipe.codebook_update!r}: residual codebooks learn by 'ema' only")
        if max(self.discriminator.windows) > self.crop_samples:
            raise ValueError(
                f"crops of {self.crop_codes} codes are {self.crop_samples} samples, shorter than the discriminator's "
                f"window {max(self.discriminator.windows)}: raise crop_codes or leave that window out"
            )
        num_samples = 8 * self.recipe.batch_size * self.crop_codes
        if num_samples < self.num_codes:
            raise ValueError(
                f"num_codes {self.num_codes} is more than the {num_samples} latents (8 * batch_size * crop_codes) that "
                "codebooks start from: raise batch_size or crop_codes"
            )
        assert self.quantizer  # says what is wrong with the numbers of codebooks

    @property
    def crop_samples(self) -> int:
        """Length of a crop."""
        return self.crop_codes * self.net.hop

    @property
    def quantizer(self) -> ResidualCodebooks:
        """What the trainer puts between encoder and decoder."""
        return ResidualCodebooks(self.num_codes, self.net.code_dim, self.num_codebooks, self.codebooks_per_batch)


ENCODEC = SeanetTraining(
    family="seanet",
    net=ENCODEC_24KHZ,
    num_codes=1024,
    num_codebooks=32,
    codebooks_per_batch=(2, 4, 8, 16, 32),
    crop_codes=75,
    discriminator=StftDiscriminatorConfig(channels=32, windows=(2048, 1024, 512, 256, 128)),
    balance=BalanceRecipe(learning_rate=3e-4),
    recipe=CodecRecipe(
        total_steps=600_000,
        batch_size=64,
        learning_rate=3e-4,
        warmup_fraction=0.005,
        continuous_fraction=0.0,
        commitment_weight=1.0,
        codebook_decay=0.99,
        revive_every_steps=100,
        revive_below=0.05,
        clip_norm=1e6,
        log_every_steps=100,
        adam_betas=(0.5, 0.9),
    ),
)
"""The published shape of 24 kHz: 75 hops a second of up to 32 codebooks, 1 s crops, 300 epochs of 2,000 steps. Not run
here. Not as published: the learning rate warms up and falls to zero, and convolutions have no weight norm."""

SEANET_SMALL = SeanetTraining(
    family="seanet",
    net=dataclasses.replace(
        ENCODEC_24KHZ,
        sample_rate_hz=16_000,
        filters=8,
        ratios=(4, 4, 4, 5),
        code_dim=64,
        lstm_layers=1,
        padding="zero",
    ),
    num_codes=256,
    num_codebooks=4,
    codebooks_per_batch=(1, 2, 4, 4),
    crop_codes=40,
    discriminator=StftDiscriminatorConfig(channels=4, windows=(512, 256)),
    balance=BalanceRecipe(
        learning_rate=1e-3,
        start_fraction=0.8,
        generator_weight=0.2,
        feature_weight=0.5,
        decay=0.99,
        update_probability=1.0,
    ),
    recipe=CodecRecipe(
        total_steps=1000,
        batch_size=8,
        learning_rate=3e-3,
        warmup_fraction=0.03,
        continuous_fraction=0.25,
        commitment_weight=0.05,
        codebook_decay=0.98,
        revive_every_steps=25,
        revive_below=0.05,
        clip_norm=100.0,
        log_every_steps=25,
    ),
)
"""16 kHz, 50 hops a second of 4 codebooks of 256: minutes on one CPU core. Causal from the first code. For trying the
trainer; not good: configs/LOG.md has what was measured."""

RECIPES = {"encodec": ENCODEC, "seanet-small": SEANET_SMALL}
"""By the names that `aromni tokenizer train --recipe` knows them."""


def train_seanet_tokenizer(
    waveforms: Sequence[np.ndarray],
    config: SeanetTraining,
    seed: int,
    workdir: str | Path,
    progress: Progress = lambda metrics: None,
) -> SpeechTokenizer:
    """Trains on float32 waveforms [T] at the config's rate; goes on where an interrupted call with `workdir` stopped.

    `progress` receives step, total_steps, loss, the losses waveform and mel, commitment, perplexity and codes_used
    (means over codebooks), and once the discriminator is at work the losses generator and features, its own loss and
    its scores. Equal arguments give an equal tokenizer on the same kind of device. `workdir` also receives
    `recipe.json`, which a later training can be given.

    Raises:
      ValueError: no or bad waveforms, or a `workdir` used with other settings or waveforms.
    """
    crops = RandomCrops(waveforms, config.crop_samples, config.recipe.batch_size)
    description = {"config": storage.describe(config), "seed": seed, "waveforms": crops.fingerprint}
    losses = {"waveform": _waveform_loss, "mel": mel_loss(config.net.sample_rate_hz, config.crop_samples)}
    params, codebooks_KCE = train_codec(
        Seanet(config.net),
        crops.batch,
        BalancedCriterion(losses, StftDiscriminator(config.discriminator), config.balance),
        config.recipe,
        quantizer=config.quantizer,
        seed=seed,
        workdir=workdir,
        identity=json.dumps(description, sort_keys=True),
        progress=progress,
        normalize_latents=False,
    )
    (Path(workdir) / "recipe.json").write_text(config_lib.to_json(config))
    codec = SeanetCodec("seanet", config.net, config.num_codes, config.num_codebooks)
    return SpeechTokenizer(codec, params, codebooks_KCE)


def mel_loss(sample_rate_hz: int, crop_samples: int) -> Callable[[FloatArray, FloatArray], FloatArray]:
    """Distance of two batches [B, crop_samples] in mel spectra of windows 2^5 to 2^11, those that fit into a crop.

    Per window, the mean absolute difference of mel magnitudes plus the root mean square over bands, mean over frames,
    of the difference of their natural logarithms; the mean over windows. 64 bands; short windows have fewer.
    """
    windows = [window for window in _MEL_WINDOWS if window <= crop_samples]
    if not windows:
        raise ValueError(f"crops of {crop_samples} samples are shorter than the smallest window, {_MEL_WINDOWS[0]}")
    return partial(_mel_loss, sample_rate_hz=sample_rate_hz, windows=windows)


def _mel_loss(decoded: FloatArray, target: FloatArray, *, sample_rate_hz: int, windows: Sequence[int]) -> FloatArray:
    total = jnp.float32(0)
    for window in windows:
        hop, num_mels = window // 4, min(_MEL_BANDS, window // 4)
        length = target.shape[1] // hop * hop
        both = jnp.concatenate([decoded[:, :length], target[:, :length]])
        scale = np.sqrt(np.sum(np.square(spectral.hann_window(window))))
        filters = spectral.mel_filters(sample_rate_hz, window, num_mels) / scale
        mel = spectral.magnitudes(both, window, hop) @ filters
        linear_decoded, linear_target = jnp.split(mel, 2)
        log_decoded, log_target = jnp.split(jnp.log(jnp.maximum(mel, _LOG_FLOOR)), 2)
        squares = jnp.mean(jnp.square(log_decoded - log_target), axis=-1)
        total += jnp.mean(jnp.abs(linear_decoded - linear_target)) + jnp.mean(jnp.sqrt(squares + 1e-6))
    return total / len(windows)


def _waveform_loss(decoded: FloatArray, target: FloatArray) -> FloatArray:
    return jnp.mean(jnp.abs(decoded - target))
