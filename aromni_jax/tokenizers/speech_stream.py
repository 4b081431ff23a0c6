"""Speech codecs one chunk at a time: a state and the next chunk in, a state and what is final out.

States are values: nothing is changed in place, so a session can be kept, copied or dropped. Chunks may have any size;
inside they are cut into powers of four, so that only a few shapes are ever compiled, whatever sizes arrive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aromni_jax.arrays import PyTree
from aromni_jax.tokenizers.speech_codecs import Codec, StreamingCodec, Variables

_LARGEST_PIECE = 1024
"""Codes of the largest compiled chunk."""


@dataclasses.dataclass(frozen=True)
class StreamState:
    """Where a stream stands: what its layers remember (None before the first chunk), and input not yet used.

    `waiting` is [T] samples or [K, U] codes; `skip` counts decoded samples from before the beginning.
    """

    memory: PyTree | None
    waiting: np.ndarray
    skip: int = 0


def _pieces(num_codes: int) -> Iterator[int]:
    """13 -> 4, 4, 4, 1."""
    piece = _LARGEST_PIECE
    while num_codes:
        while piece > num_codes:
            piece //= 4
        yield piece
        num_codes -= piece


class _ChunkedStream:
    """What both directions share: the compiled chunk function and the memory a stream starts with."""

    def __init__(self, codec: StreamingCodec, variables: Variables, function: Callable[..., Any], chunk: Any) -> None:
        self.codec = codec
        self._variables = variables
        self._jitted = jax.jit(function)
        self._start: PyTree | None = None
        if codec.start_codes == 1:
            shapes, _ = jax.eval_shape(function, variables, None, chunk, np.ones(1, np.int32))
            self._start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def _run(self, memory: PyTree | None, chunk: np.ndarray, length: int) -> tuple[PyTree, np.ndarray]:
        memory, result = self._jitted(self._variables, memory, chunk[None], np.array([length], np.int32))
        return memory, np.asarray(result)[0]


class EncoderStream(_ChunkedStream):
    """Waveform to codes as it comes: after t samples, the codes of every whole hop among them are out.

    The first codes wait for `start_codes` hops. Codes equal those of `SpeechTokenizer.encode`.
    """

    def __init__(self, codec: StreamingCodec, variables: Variables) -> None:
        chunk = np.zeros((1, codec.start_codes * codec.hop), np.float32)
        super().__init__(codec, variables, codec.encode_chunk, chunk)
        self._whole = jax.jit(codec.encode)

    def start(self) -> StreamState:
        """The state before the first sample."""
        return StreamState(self._start, np.zeros(0, np.float32))

    def step(self, state: StreamState, waveform_T: np.ndarray) -> tuple[StreamState, np.ndarray]:
        """The next samples [T], any number; returns int32 codes [K, U] of the hops they complete."""
        hop, memory = self.codec.hop, state.memory
        waiting = np.concatenate([state.waiting, np.asarray(waveform_T, np.float32)])
        codes = [np.zeros((self.codec.num_codebooks, 0), np.int32)]
        if memory is None and len(waiting) < self.codec.start_codes * hop:
            return dataclasses.replace(state, waiting=waiting), codes[0]
        first = [self.codec.start_codes] if memory is None else []
        for piece in (*first, *_pieces(len(waiting) // hop - sum(first))):
            memory, codes_KU = self._run(memory, waiting[: piece * hop], piece * hop)
            codes.append(codes_KU)
            waiting = waiting[piece * hop :]
        return StreamState(memory, waiting.copy()), np.concatenate(codes, axis=1)

    def finish(self, state: StreamState) -> np.ndarray:
        """Codes [K, U] of what is left: the last, unfinished hop, or an utterance too short to have started."""
        length, hop = len(state.waiting), self.codec.hop
        num_codes = -(-length // hop)
        if not num_codes:
            return np.zeros((self.codec.num_codebooks, 0), np.int32)
        room = hop * (1 if state.memory is not None else self.codec.start_codes)
        padded = np.pad(state.waiting, (0, room - length))
        if state.memory is not None:
            return self._run(state.memory, padded, length)[1]
        codes_BKU = self._whole(self._variables, padded[None], np.array([length], np.int32))
        return np.asarray(codes_BKU)[0, :, :num_codes]


class DecoderStream(_ChunkedStream):
    """Codes to waveform as they come, `delay_samples` behind the codes; the first sound waits for `start_codes`.

    Sound equals that of `SpeechTokenizer.decode` to 1e-5.
    """

    def __init__(self, codec: StreamingCodec, variables: Variables) -> None:
        chunk = np.zeros((1, codec.num_codebooks, codec.start_codes), np.int32)
        super().__init__(codec, variables, codec.decode_chunk, chunk)
        self._whole = jax.jit(codec.decode)

    @property
    def delay_samples(self) -> int:
        """How many samples of the newest code are still missing."""
        return self.codec.delay_samples

    def start(self) -> StreamState:
        """The state before the first code."""
        return StreamState(self._start, np.zeros((self.codec.num_codebooks, 0), np.int32), self.codec.delay_samples)

    def step(self, state: StreamState, codes_KU: np.ndarray) -> tuple[StreamState, np.ndarray]:
        """The next codes [K, U], any number; returns the waveform that is final now, float32 [T]."""
        waiting = np.concatenate([state.waiting, np.asarray(codes_KU, np.int32)], axis=1)
        memory, sound = state.memory, [np.zeros(0, np.float32)]
        if memory is None and waiting.shape[1] < self.codec.start_codes:
            return dataclasses.replace(state, waiting=waiting), sound[0]
        first = [self.codec.start_codes] if memory is None else []
        for piece in (*first, *_pieces(waiting.shape[1] - sum(first))):
            memory, waveform_T = self._run(memory, waiting[:, :piece], piece)
            sound.append(waveform_T)
            waiting = waiting[:, piece:]
        waveform_T = np.concatenate(sound)
        skipped = min(state.skip, len(waveform_T))
        return StreamState(memory, waiting, state.skip - skipped), waveform_T[skipped:]

    def finish(self, state: StreamState) -> np.ndarray:
        """The waveform that is still missing, once the last code has come."""
        num_codes, hop = state.waiting.shape[1], self.codec.hop
        if num_codes:
            padded = np.pad(state.waiting, ((0, 0), (0, self.codec.start_codes - num_codes)))
            waveform_BT = self._whole(self._variables, padded[None], np.array([num_codes], np.int32))
            return np.asarray(waveform_BT)[0, : num_codes * hop]
        late = self.codec.delay_samples
        if not late or state.skip == late:
            return np.zeros(0, np.float32)
        silence = np.zeros((self.codec.num_codebooks, -(-late // hop)), np.int32)
        return self._run(state.memory, silence, 0)[1][state.skip : late]


@dataclasses.dataclass(frozen=True)
class Window:
    """How a codec that is not causal works on a stream: each chunk is coded with its surroundings, and cut out.

    `context_codes` before and `lookahead_codes` after a chunk are seen with it; more of either is nearer the whole.
    Measured with a small WavTokenizer of random weights, chunks of 4 codes, context 80, against the whole utterance
    (relative RMS error of sound; share of equal codes): look-ahead 0: 0.18, 65%; 1: 0.057, 75%; 2: 0.031, 93%;
    4: 0.014, 100%; 8: 0.008, 100%. What is left is attention and group norms, which see all of an utterance.
    """

    chunk_codes: int
    context_codes: int
    lookahead_codes: int

    def __post_init__(self) -> None:
        if self.chunk_codes < 1 or self.context_codes < 0 or self.lookahead_codes < 0:
            raise ValueError(f"{self}: chunk_codes must be at least 1, the others at least 0")

    @property
    def total_codes(self) -> int:
        return self.context_codes + self.chunk_codes + self.lookahead_codes


@dataclasses.dataclass(frozen=True)
class WindowState:
    """`seen` is the input of the next window, samples [T] or codes [K, U]; its first `done` codes are out already."""

    seen: np.ndarray
    done: int = 0


class _WindowedStream:
    """One direction of a codec that is not causal, on overlapping windows of one compiled shape."""

    def __init__(self, codec: Codec, variables: Variables, window: Window, per_code: tuple[int, int], run: Any) -> None:
        self.codec = codec
        self.window = window
        self._variables = variables
        self._inputs_per_code, self._results_per_code = per_code
        self._jitted = jax.jit(run)

    def _advance(self, seen: np.ndarray, done: int, ending: bool) -> tuple[WindowState, list[np.ndarray]]:
        """Runs windows while a chunk and its look-ahead are there; at the end, while anything is."""
        window, per, out = self.window, self._inputs_per_code, self._results_per_code
        results: list[np.ndarray] = []
        while True:
            num_codes = -(-seen.shape[-1] // per) if ending else seen.shape[-1] // per
            waiting = num_codes - done
            if not waiting or (not ending and waiting < window.chunk_codes + window.lookahead_codes):
                return WindowState(seen.copy(), done), results
            stop = min(num_codes, done + window.chunk_codes)
            length = min(seen.shape[-1], (stop + window.lookahead_codes) * per)
            padding = [(0, 0)] * (seen.ndim - 1) + [(0, window.total_codes * per - length)]
            batch = np.pad(seen[..., :length], padding)[None]
            whole = np.asarray(self._jitted(self._variables, batch, np.array([length], np.int32)))[0]
            results.append(whole[..., done * out : stop * out])
            dropped = max(0, stop - window.context_codes)
            seen, done = seen[..., dropped * per :], stop - dropped


class WindowedEncoder(_WindowedStream):
    """Waveform to codes, a window's look-ahead behind the sound; near, not equal to, those of the whole utterance."""

    def __init__(self, codec: Codec, variables: Variables, window: Window) -> None:
        super().__init__(codec, variables, window, (codec.hop, 1), codec.encode)

    def start(self) -> WindowState:
        """The state before the first sample."""
        return WindowState(np.zeros(0, np.float32))

    def step(self, state: WindowState, waveform_T: np.ndarray) -> tuple[WindowState, np.ndarray]:
        """The next samples [T], any number; returns int32 codes [K, U] of the chunks whose look-ahead is there."""
        seen = np.concatenate([state.seen, np.asarray(waveform_T, np.float32)])
        state, codes = self._advance(seen, state.done, ending=False)
        return state, np.concatenate([np.zeros((self.codec.num_codebooks, 0), np.int32), *codes], axis=1)

    def finish(self, state: WindowState) -> np.ndarray:
        """Codes [K, U] of what is left."""
        _, codes = self._advance(state.seen, state.done, ending=True)
        return np.concatenate([np.zeros((self.codec.num_codebooks, 0), np.int32), *codes], axis=1)


class WindowedDecoder(_WindowedStream):
    """Codes to waveform, a window's look-ahead behind the codes; near, not equal to, that of the whole utterance."""

    def __init__(self, codec: Codec, variables: Variables, window: Window) -> None:
        super().__init__(codec, variables, window, (1, codec.hop), codec.decode)

    @property
    def delay_samples(self) -> int:
        """How much sound of the newest codes may still be missing."""
        return (self.window.chunk_codes - 1 + self.window.lookahead_codes) * self.codec.hop

    def start(self) -> WindowState:
        """The state before the first code."""
        return WindowState(np.zeros((self.codec.num_codebooks, 0), np.int32))

    def step(self, state: WindowState, codes_KU: np.ndarray) -> tuple[WindowState, np.ndarray]:
        """The next codes [K, U], any number; returns the waveform, float32 [T], of the chunks that can be cut out."""
        seen = np.concatenate([state.seen, np.asarray(codes_KU, np.int32)], axis=1)
        state, sound = self._advance(seen, state.done, ending=False)
        return state, np.concatenate([np.zeros(0, np.float32), *sound])

    def finish(self, state: WindowState) -> np.ndarray:
        """The waveform that is still missing, once the last code has come."""
        _, sound = self._advance(state.seen, state.done, ending=True)
        return np.concatenate([np.zeros(0, np.float32), *sound])
