"""Speech as it sounds elsewhere: a room's response and noise at a given ratio, for what the model listens to only.

What is done to a record is drawn from the seed and the record's key, so that shards are the same whoever makes them,
and is written into the record's facts. The room comes first and the noise is measured against what the room makes of
the speech, as at a microphone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pathlib
from typing import Any, Literal

import numpy as np
import soundfile
from scipy.signal import fftconvolve

from aromni_jax.tokenizers.speech_input import prepare_sound
from data_pipelines.containers import SOUND_SUFFIXES

NOISE_COLOURS = {"white": 0.0, "pink": 1.0, "brown": 2.0}
"""Exponent of 1 / frequency in the power of generated noise."""

_FRAME_SECONDS = 0.02
_ACTIVE_DB = 40.0
"""Frames of speech this far below the loudest one are pauses."""
_DIRECT_TO_REVERBERANT_DB = 3.0
"""Energy of the direct sound over that of everything after it, in generated rooms."""
_FLAT_BELOW_HZ, _SILENT_BELOW_HZ = 50.0, 20.0
"""Generated noise stops growing at the first: most of its power would otherwise be too low to hear."""
_TRIES = 8
"""Places of a recording that are looked at for one that is not silent."""


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """Noise and rooms for the speech of user turns; answers are never touched.

    `noise_fraction` of the records that have such speech get noise, `room_fraction` a room, independently; with
    `beside` they are stored a second time, else in place of the clean ones. `noise` and `room` are folders of sound
    files (noise recordings; impulse responses), searched to their depth; "" for generated ones: white, pink or brown
    noise, and rooms of a decaying tail. `snr_db` is the range of the power of the speech (pauses left out) over that of
    the noise, `rt60_seconds` of the time in which a generated room falls by 60 dB.
    """

    noise_fraction: float = 0.0
    noise: str = ""
    snr_db: tuple[float, ...] = (0.0, 20.0)
    room_fraction: float = 0.0
    room: str = ""
    rt60_seconds: tuple[float, ...] = (0.2, 0.8)
    copies: Literal["replace", "beside"] = "replace"

    def __post_init__(self) -> None:
        for name in ("noise", "room"):
            fraction = getattr(self, f"{name}_fraction")
            if not 0 <= fraction <= 1:
                raise ValueError(f"config key 'augmentation.{name}_fraction': must be in 0..1, not {fraction}")
            if getattr(self, name) and not fraction:
                raise ValueError(
                    f"config key 'augmentation.{name}': {getattr(self, name)!r} is used by no record; set "
                    f"augmentation.{name}_fraction"
                )
        for name, lowest in (("snr_db", -100.0), ("rt60_seconds", 0.01)):
            ends = getattr(self, name)
            if len(ends) != 2 or not lowest <= ends[0] <= ends[1] <= 100.0:
                raise ValueError(
                    f"config key 'augmentation.{name}': must be (low, high) with {lowest:g} <= low <= high <= 100, "
                    f"not {ends}"
                )


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What one record's speech goes through: `noise` and `room` are a file's name, a colour, "generated" or ""."""

    noise: str
    snr_db: float
    room: str
    rt60_seconds: float
    seed: int

    def facts(self) -> dict[str, Any]:
        """What is stored with the record."""
        found: dict[str, Any] = {}
        if self.room:
            found["room"] = {"from": self.room}
            if self.room == "generated":
                found["room"]["rt60_seconds"] = round(self.rt60_seconds, 3)
        if self.noise:
            found["noise"] = {"from": self.noise, "snr_db": round(self.snr_db, 3)}
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Treated:
    """Speech after its treatment: float32 [T] within [-1, 1], `lowered_db` quieter than it came out, never clipped."""

    waveform_T: np.ndarray
    lowered_db: float
    is_silent: bool


class Augmentation:
    """Draws treatments and carries them out.

    Raises:
      ValueError: a folder that is not there or holds no sound.
    """

    def __init__(self, config: AugmentationConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._noises, self._rooms = (_sound_files(config, name) for name in ("noise", "room"))

    @property
    def description(self) -> dict[str, Any]:
        """Number and fingerprint of the files in use, wherever they lie."""
        found = {"noise": self._noises, "room": self._rooms}
        return {
            name: {"files": len(files), "fingerprint": _fingerprint(files)} for name, files in found.items() if files
        }

    def draw(self, key: str) -> Treatment | None:
        """What becomes of the speech of record `key`, the same in every process; None for nothing."""
        config = self._config
        if not config.noise_fraction and not config.room_fraction:
            return None
        rng = draws(self._seed, "augmentation", key)
        # Every draw is made, so that one setting does not shift what another one means for a record.
        has_noise, has_room = rng.uniform() < config.noise_fraction, rng.uniform() < config.room_fraction
        noises, rooms = list(self._noises or NOISE_COLOURS), list(self._rooms) or ["generated"]
        noise, room = noises[rng.integers(len(noises))], rooms[rng.integers(len(rooms))]
        (lowest_db, highest_db), (shortest, longest) = config.snr_db, config.rt60_seconds
        snr_db, rt60_seconds = rng.uniform(lowest_db, highest_db), rng.uniform(shortest, longest)
        if not has_noise and not has_room:
            return None
        seed = int(rng.integers(2**63))
        return Treatment(noise if has_noise else "", snr_db, room if has_room else "", rt60_seconds, seed)

    def apply(self, waveform_T: np.ndarray, rate_hz: int, treatment: Treatment, utterance: int) -> Treated:
        """Speech [T] at `rate_hz` after the treatment, of the same length.

        A peak beyond 1 lowers the whole, speech and noise alike. Silence has no ratio to noise and stays silent.

        Args:
          utterance: which of the record's utterances: noise begins elsewhere in each, the room is the same.

        Raises:
          ValueError: a noise or room file that does not read, or is silent.
        """
        sound_T = waveform_T.astype(np.float64)
        if treatment.room:
            sound_T = reverberant(sound_T, self._response(treatment, rate_hz))
        is_silent = not active_power(sound_T, rate_hz)
        if treatment.noise and not is_silent:
            rng = np.random.default_rng([treatment.seed, 1, utterance])
            if treatment.noise in self._noises:
                noise_T = _recorded_noise(self._noises[treatment.noise], len(sound_T), rate_hz, rng)
            else:
                noise_T = coloured_noise(len(sound_T), rate_hz, NOISE_COLOURS[treatment.noise], rng)
            sound_T = mixed(sound_T, noise_T, treatment.snr_db, rate_hz)
        peak = max(1.0, float(np.abs(sound_T).max()))
        return Treated((sound_T / peak).astype(np.float32), 20 * math.log10(peak), is_silent)

    def _response(self, treatment: Treatment, rate_hz: int) -> np.ndarray:
        if treatment.room in self._rooms:
            return _recorded_response(self._rooms[treatment.room], rate_hz)
        return generated_response(treatment.rt60_seconds, rate_hz, np.random.default_rng([treatment.seed, 0]))


def draws(seed: int, purpose: str, key: str) -> np.random.Generator:
    """Random numbers of one record for one purpose: a function of these three, wherever and whenever they are drawn."""
    digest = hashlib.sha256(f"{seed}\n{purpose}\n{key}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, "<u4"))


def active_power(sound_T: np.ndarray, rate_hz: int) -> float:
    """Mean square over the samples of all 20 ms frames within 40 dB of the loudest frame; 0 for silence."""
    size = max(1, round(_FRAME_SECONDS * rate_hz))
    starts = np.arange(0, len(sound_T), size)
    energies = np.add.reduceat(np.square(sound_T, dtype=np.float64), starts)
    lengths = np.diff(np.append(starts, len(sound_T)))
    powers = energies / lengths
    is_active = powers > powers.max() * 10 ** (-_ACTIVE_DB / 10)
    return float(energies[is_active].sum() / lengths[is_active].sum()) if is_active.any() else 0.0


def mixed(speech_T: np.ndarray, noise_T: np.ndarray, snr_db: float, rate_hz: int) -> np.ndarray:
    """Speech plus noise, scaled so that `active_power` of the speech over the noise's mean square is `snr_db`."""
    noise_power = float(np.mean(np.square(noise_T)))
    assert noise_power > 0
    wanted = active_power(speech_T, rate_hz) * 10 ** (-snr_db / 10)
    return speech_T + noise_T * np.sqrt(wanted / noise_power)


def coloured_noise(num_samples: int, rate_hz: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """float64 Gaussian noise whose power falls with frequency to the `exponent` (0 white, 1 pink, 2 brown)."""
    # Longer than asked for and cut: sound shaped by its spectrum as a whole ends as it begins.
    size = max(64, 2 * num_samples)
    spectrum = np.fft.rfft(rng.standard_normal(size))
    frequencies_hz = np.fft.rfftfreq(size, 1 / rate_hz)
    spectrum *= np.maximum(frequencies_hz, _FLAT_BELOW_HZ) ** (-exponent / 2)
    spectrum[frequencies_hz < _SILENT_BELOW_HZ] = 0
    return np.fft.irfft(spectrum, size)[:num_samples]


def generated_response(rt60_seconds: float, rate_hz: int, rng: np.random.Generator) -> np.ndarray:
    """float64 impulse response: a direct sound, then noise that falls by 60 dB in `rt60_seconds`."""
    num_samples = max(2, round(rt60_seconds * rate_hz))
    tail_T = rng.standard_normal(num_samples) * 10 ** (-3 * np.arange(num_samples) / num_samples)
    tail_T[0] = 0
    tail_T *= np.sqrt(10 ** (-_DIRECT_TO_REVERBERANT_DB / 10) / np.sum(np.square(tail_T)))
    tail_T[0] = 1
    return tail_T


def reverberant(speech_T: np.ndarray, response_T: np.ndarray) -> np.ndarray:
    """Speech in a room: as long as before, in time with the loudest arrival, and of the same power as a whole."""
    direct = int(np.argmax(np.abs(response_T)))
    sound_T = fftconvolve(speech_T, response_T)[direct : direct + len(speech_T)]
    power = np.sum(np.square(sound_T))
    return sound_T * np.sqrt(np.sum(np.square(speech_T)) / power) if power > 0 else speech_T


def _recorded_noise(path: pathlib.Path, num_samples: int, rate_hz: int, rng: np.random.Generator) -> np.ndarray:
    """A stretch of a recording from a drawn place; a recording that is too short is repeated."""
    try:
        with soundfile.SoundFile(path) as file:
            wanted = -(-num_samples * file.samplerate // rate_hz) + 1
            for _ in range(_TRIES):
                file.seek(int(rng.integers(max(1, file.frames - wanted + 1))))
                stretch = file.read(wanted, dtype="float32", always_2d=True)
                noise_T = np.resize(prepare_sound(stretch, file.samplerate, rate_hz), num_samples).astype(np.float64)
                if np.any(noise_T):
                    return noise_T
    except (soundfile.LibsndfileError, ValueError) as error:
        raise ValueError(f"the noise {path} cannot be used: {error}; repair it or take it out of the folder") from error
    raise ValueError(f"the noise {path} is silent in {_TRIES} places; take it out of the folder")


@functools.lru_cache(maxsize=64)
def _recorded_response(path: pathlib.Path, rate_hz: int) -> np.ndarray:
    try:
        response_T = prepare_sound(path, None, rate_hz).astype(np.float64)
    except ValueError as error:
        raise ValueError(f"the room {path} cannot be used: {error}; repair it or take it out of the folder") from error
    if not np.any(response_T):
        raise ValueError(f"the room {path} is silent; take it out of the folder")
    return response_T


def _sound_files(config: AugmentationConfig, name: str) -> dict[str, pathlib.Path]:
    """Every sound file below the folder that key `name` gives, by its name within it."""
    folder = getattr(config, name)
    if not folder:
        return {}
    root = pathlib.Path(folder)
    files = {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in SOUND_SUFFIXES and path.is_file()
    }
    if not files:
        raise ValueError(
            f"config key 'augmentation.{name}': {folder!r} is no folder with sound files "
            f"({', '.join(SOUND_SUFFIXES)}); give one, or '' for generated sound"
        )
    return files


def _fingerprint(files: dict[str, pathlib.Path]) -> str:
    """Of the names, sizes and first 64 KiB of files: recordings of hours are not read whole by every process."""
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            digest.update(f"{name}\n{path.stat().st_size}\n".encode())
            digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]
