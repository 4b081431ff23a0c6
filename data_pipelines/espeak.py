"""Speech by espeak-ng through ctypes: the library and its voices come in the `espeakng-loader` wheel.

espeak-ng keeps state between utterances (its random numbers and the phase of its voice flutter), so a waveform depends
on everything the process said before. `start_speaking` therefore runs a list of utterances in a fresh process with a
fixed seed: the same list gives the same bytes, and two lists can be spoken at once although the library is not
thread-safe.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

SAMPLE_RATE_HZ = 16_000
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_POSITION_CHARACTER = 1
_CHARACTERS_UTF8 = 1
_RANDOM_SEED = 1
_PEAK = 0.8
_SILENCE = 0.01
_MARGIN_SECONDS = 0.01


@dataclasses.dataclass(frozen=True)
class Utterance:
    """What to say and how: `rate` in words per minute, `pitch` 0..99 (50 is the voice's own), WAV file `name`."""

    name: str
    text: str
    voice: str
    rate: int
    pitch: int


class Espeak:
    """The loaded library; one per process. `say` returns float32 at `SAMPLE_RATE_HZ`, silence trimmed, peak 0.8."""

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data_path = espeakng_loader.get_data_path().encode()
        self._native_rate_hz = self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, 0)
        if self._native_rate_hz <= 0:
            raise ValueError(f"espeak-ng did not start with {data_path.decode()}; reinstall espeakng-loader")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(_RANDOM_SEED))
        self._chunks: list[np.ndarray] = []
        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

        def receive(samples: ctypes._Pointer, count: int, events: int) -> int:
            if samples and count > 0:
                self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        self._callback = callback_type(receive)  # kept: ctypes does not hold a reference for the library
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, utterance: Utterance) -> np.ndarray:
        """Speaks one utterance; ValueError for a voice espeak-ng does not have or a text that gives no sound."""
        from scipy.signal import resample_poly

        if self._library.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {utterance.voice!r}; try en-us, en-us+f2 or en-gb-x-rp")
        self._library.espeak_SetParameter(_PARAMETER_RATE, utterance.rate, 0)
        self._library.espeak_SetParameter(_PARAMETER_PITCH, utterance.pitch, 0)
        self._chunks.clear()
        text = utterance.text.encode() + b"\0"
        self._library.espeak_Synth(text, len(text), 0, _POSITION_CHARACTER, 0, _CHARACTERS_UTF8, None, None)
        self._library.espeak_Synchronize()
        sound = np.concatenate(self._chunks or [np.zeros(0, np.int16)]).astype(np.float32)
        peak = float(np.abs(sound).max(initial=0))
        if peak == 0:
            raise ValueError(f"espeak-ng made no sound of {utterance.text!r}")
        loud = np.flatnonzero(np.abs(sound) > _SILENCE * peak)
        margin = int(_MARGIN_SECONDS * self._native_rate_hz)
        sound = sound[max(loud[0] - margin, 0) : loud[-1] + margin + 1]
        sound = resample_poly(sound, SAMPLE_RATE_HZ // 50, self._native_rate_hz // 50).astype(np.float32)
        return sound * (_PEAK / float(np.abs(sound).max()))


def write_wav(path: pathlib.Path, waveform_T: np.ndarray, rate_hz: int = SAMPLE_RATE_HZ) -> None:
    """Writes float32 [-1, 1] as 16-bit mono WAV."""
    from scipy.io import wavfile

    wavfile.write(path, rate_hz, np.round(np.clip(waveform_T, -1, 1) * 32767).astype(np.int16))


def start_speaking(utterances: list[Utterance], output_dir: pathlib.Path) -> subprocess.Popen[bytes]:
    """Starts a fresh process that writes `output_dir/<name>.wav` for every utterance, in order."""
    request = output_dir / "utterances.json"
    request.write_text(json.dumps([dataclasses.asdict(utterance) for utterance in utterances]))
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path))
    command = [sys.executable, "-m", "data_pipelines.espeak", str(request), str(output_dir)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def finish_speaking(process: subprocess.Popen[bytes]) -> None:
    """Waits for a process of `start_speaking`; ValueError with its last line when it failed."""
    _, errors = process.communicate()
    if process.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
        raise ValueError(f"speech synthesis failed: {lines[-1]}")


def _main(request: str, output_dir: str) -> None:
    espeak = Espeak()
    for fields in json.loads(pathlib.Path(request).read_text()):
        utterance = Utterance(**fields)
        write_wav(pathlib.Path(output_dir) / f"{utterance.name}.wav", espeak.say(utterance))


if __name__ == "__main__":
    _main(*sys.argv[1:])
