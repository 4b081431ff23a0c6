"""Any sound to the one form codecs take: float32, mono, at their rate. What cannot be read is named.

Long sound is read, averaged and resampled a block at a time, so that memory holds what comes out and little more.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

Report = Callable[[str], None]
"""Receives a line for each sound that had to be converted."""

_BLOCK_SECONDS = 60
"""Sound up to this length is converted in one piece."""
LONGEST_SECONDS = 6 * 3600
"""Longer sound is refused: no utterance is, and a few damaged bytes can announce any length."""
_FILTER_REACH = 10
"""`resample_poly` weighs this many samples of the slower of the two rates on either side."""
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)
"""What a program writes as the size of a WAV file that it could not go back to."""


def prepare_sound(
    sound: np.ndarray | str | Path,
    rate_hz: int | None,
    target_rate_hz: int,
    report: Report = lambda line: None,
) -> np.ndarray:
    """Sound as float32 mono at `target_rate_hz`: channels averaged, integers scaled to [-1, 1], rate converted.

    Args:
      sound: samples [T] or [T, channels], integer or float; or the path of a WAV, FLAC, Ogg or MP3 file.
      rate_hz: rate of an array; a file knows its own.
      report: is told what was converted, for example "a.wav: 44100 Hz, 2 channels, converted to 16000 Hz mono".

    Raises:
      FileNotFoundError: no such file.
      ValueError: naming the file: not a sound file, one that is cut short, no samples, NaN or infinity, no rate, more
        than `LONGEST_SECONDS`.
    """
    if isinstance(sound, (str, Path)):
        return _prepare_file(Path(sound), target_rate_hz, report)
    samples, name = np.asarray(sound), "sound"
    if rate_hz is None or rate_hz < 1:
        raise ValueError(f"{name}: sample rate {rate_hz} is not a positive number of hertz")
    if samples.ndim > 2:
        raise ValueError(f"{name} has shape {samples.shape}, expected [samples] or [samples, channels]")
    _check_length(len(samples) if samples.ndim else 0, rate_hz, name)
    _say(report, name, rate_hz, samples.shape[1] if samples.ndim == 2 else 1, target_rate_hz)
    return _converted(_array_blocks(samples, int(rate_hz)), len(samples), int(rate_hz), target_rate_hz, name)


def _array_blocks(samples: np.ndarray, rate_hz: int) -> Iterator[np.ndarray]:
    size = _BLOCK_SECONDS * rate_hz
    return (_mono(samples[start : start + size]) for start in range(0, len(samples), size))


def _prepare_file(path: Path, target_rate_hz: int, report: Report) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with soundfile.SoundFile(path) as file:
            _check_length(file.frames, file.samplerate, str(path))
            _check_not_cut(path, file.format)
            _say(report, str(path), file.samplerate, file.channels, target_rate_hz)
            if file.format == "MP3" and not _mp3_counts_samples(path):
                held = np.concatenate([np.zeros(0, np.float32), *_file_blocks(file, None)])
                _check_length(len(held), file.samplerate, str(path))
                return _converted(
                    _array_blocks(held, file.samplerate), len(held), file.samplerate, target_rate_hz, str(path)
                )
            blocks = _file_blocks(file, path)
            return _converted(blocks, file.frames, file.samplerate, target_rate_hz, str(path))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} cannot be read as sound: {error}") from error


def _file_blocks(file: soundfile.SoundFile, path: Path | None) -> Iterator[np.ndarray]:
    """Mono blocks; without `path` the number of samples is a guess that may be too high, with it ValueError says so."""
    read = 0
    while read < file.frames:
        block = file.read(_BLOCK_SECONDS * file.samplerate, dtype="float32", always_2d=True)
        if not len(block):
            if path is None:
                return
            raise ValueError(f"{path} is cut short: it announces {file.frames} samples and holds {read}")
        read += len(block)
        yield _mono(block)


def _mp3_counts_samples(path: Path) -> bool:
    """Whether the first frame of an MP3 file says how many there are; else libsndfile guesses from the first bit rate.

    Without that count a file cut short cannot be told from a shorter one.
    """
    with path.open("rb") as file:
        tag = file.read(10)
        # Text about the sound may come first: its size is in four bytes of seven bits.
        size = functools.reduce(lambda number, byte: number << 7 | byte, tag[6:10]) + 10 if tag[:3] == b"ID3" else 0
        file.seek(size)
        frame = file.read(64)
    return any(name in frame for name in (b"Xing", b"Info", b"VBRI"))


def _check_length(num_samples: int, rate_hz: int, name: str) -> None:
    if not num_samples:
        raise ValueError(f"{name} has no samples")
    if num_samples > LONGEST_SECONDS * rate_hz:
        hours = num_samples / rate_hz / 3600
        raise ValueError(f"{name} lasts {hours:.1f} h; at most {LONGEST_SECONDS // 3600} h are read: cut it into parts")


def _check_not_cut(path: Path, container: str) -> None:
    """libsndfile reads as much of a WAV file as there is and does not say that there was more."""
    if container not in ("WAV", "WAVEX"):
        return
    with path.open("rb") as file:
        header = file.read(8)
    announced = int.from_bytes(header[4:8], "big" if header[:4] == b"RIFX" else "little")
    found = path.stat().st_size
    if announced not in _UNKNOWN_SIZES and announced + 8 > found:
        raise ValueError(f"{path} is cut short: it announces {announced + 8} bytes and holds {found}")


def _say(report: Report, name: str, rate_hz: int, num_channels: int, target_rate_hz: int) -> None:
    if rate_hz != target_rate_hz or num_channels != 1:
        channels = "1 channel" if num_channels == 1 else f"{num_channels} channels"
        report(f"{name}: {rate_hz} Hz, {channels}, converted to {target_rate_hz} Hz mono")


def _mono(samples: np.ndarray) -> np.ndarray:
    if np.issubdtype(samples.dtype, np.integer):
        # Unsigned samples, as in 8-bit WAV, are silent in the middle of their range.
        half_range = 2.0 ** (8 * samples.dtype.itemsize - 1)
        middle = half_range if np.issubdtype(samples.dtype, np.unsignedinteger) else 0.0
        samples = (samples.astype(np.float64) - middle) / half_range
    return samples.mean(axis=1) if samples.ndim == 2 else samples


def _converted(blocks: Iterator[np.ndarray], num_samples: int, rate_hz: int, target_hz: int, name: str) -> np.ndarray:
    """Blocks of mono sound, `num_samples` together, as one float32 waveform at `target_hz`."""
    divisor = math.gcd(rate_hz, target_hz)
    up, down = target_hz // divisor, rate_hz // divisor
    checked = _checked_blocks(blocks, name)
    if num_samples <= _BLOCK_SECONDS * rate_hz:
        (whole,) = checked
        return (whole if up == down else resample_poly(whole, up, down)).astype(np.float32)
    waveform = np.empty(-(-num_samples * up // down), np.float32)
    filled = 0
    for block in checked if up == down else _resampled(checked, up, down):
        waveform[filled : filled + len(block)] = block
        filled += len(block)
    assert filled == len(waveform)
    return waveform


def _checked_blocks(blocks: Iterator[np.ndarray], name: str) -> Iterator[np.ndarray]:
    start = 0
    for block in blocks:
        yield checked_waveform(block.astype(np.float64), name, first_sample=start)
        start += len(block)


def _resampled(blocks: Iterator[np.ndarray], up: int, down: int) -> Iterator[np.ndarray]:
    """The pieces of `resample_poly` of all blocks joined: each is filtered with what its neighbours reach into it.

    Pieces begin at multiples of `down`, where input and output samples coincide.
    """
    reach = down * (_FILTER_REACH * max(up, down) // (up * down) + 2)
    held, before = np.zeros(0), 0
    for block in itertools.chain(blocks, [None]):
        if block is not None:
            held = np.concatenate([held, block])
        ready = len(held) - before
        if block is not None:
            ready = (ready - reach) // down * down
        if ready <= 0:
            continue
        first = before * up // down
        filtered = resample_poly(held, up, down)
        yield filtered[first:] if block is None else filtered[first : first + ready * up // down]
        kept = min(reach, before + ready)
        held, before = held[before + ready - kept :], kept


def checked_waveform(waveform: np.ndarray, name: str, first_sample: int = 0) -> np.ndarray:
    """`waveform` if it is one: [T] with samples, all finite; ValueError naming it and the first bad sample if not."""
    waveform = np.asarray(waveform)
    if waveform.size == 0:
        raise ValueError(f"{name} has no samples")
    if waveform.ndim != 1:
        raise ValueError(f"{name} has shape {waveform.shape}, expected one dimension of samples")
    if not np.isfinite(waveform).all():
        bad = first_sample + int(np.flatnonzero(~np.isfinite(waveform))[0])
        raise ValueError(f"{name} has a value that is not a number (sample {bad})")
    return waveform


class RandomCrops:
    """Training batches [B, T] of crops from everywhere in float32 waveforms [T] of one rate.

    Crops run across the border of utterances: sound begins and ends at any place of a crop. ValueError for waveforms
    that are none, empty or not finite, by index.
    """

    def __init__(self, waveforms: Sequence[np.ndarray], crop_samples: int, batch_size: int) -> None:
        if not waveforms:
            raise ValueError("cannot train a speech tokenizer on no utterances")
        checked = [checked_waveform(wave, f"waveform {i}").astype(np.float32) for i, wave in enumerate(waveforms)]
        self._everything = np.concatenate([*checked, np.zeros(crop_samples, np.float32)])
        self._crop_samples, self._batch_size = crop_samples, batch_size

    def batch(self, generator: np.random.Generator) -> np.ndarray:
        """The batch that this generator draws."""
        num_starts = len(self._everything) - self._crop_samples
        starts = generator.integers(0, num_starts, self._batch_size)
        return np.stack([self._everything[start : start + self._crop_samples] for start in starts])

    @property
    def fingerprint(self) -> str:
        """Of the waveforms, their order and the length of crops."""
        return hashlib.sha256(self._everything.tobytes()).hexdigest()[:16]
