"""Answers as they are made: tokens in runs that grow, sound as soon as a chunk of it is final, and a record of latency.

Nothing waits for the end of an answer. The first run is short, so that the first sound is early; later ones are longer,
because every run costs one trip between host and device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from aromni_jax.inference.decode import OmniModel, bucket_of, check_request, contexts_of, num_contexts
from aromni_jax.inference.grammar import Grammar
from aromni_jax.inference.machine import DecodeState, begin, decode_jitted, extend_jitted
from aromni_jax.inference.sampling import row_keys
from aromni_jax.structs import Example, Modality, TokenEvent
from aromni_jax.vocab import JointVocab

FIRST_RUN, LONGEST_RUN = 4, 32
"""Tokens of the first run; each later one is twice as long, up to the longest."""


def stream_tokens(
    model: OmniModel,
    grammar: Grammar,
    prompt: Example,
    *,
    max_new_tokens: int,
    seed: int = 0,
    row_id: int = 0,
    first_run: int = FIRST_RUN,
    longest_run: int = LONGEST_RUN,
) -> Iterator[list[TokenEvent]]:
    """The tokens that `decode.generate` answers `prompt` with, in runs.

    Stopping to iterate stops the work and frees what it held; nothing of it is left for the next call to notice.

    Raises:
      ValueError: a request that cannot be answered (`decode.check_request`), at the first step.
    """
    limit = check_request(model, grammar, prompt, max_new_tokens)
    contexts = contexts_of(prompt, model.vocab, num_contexts(grammar, prompt))
    width, room = bucket_of(len(prompt.tokens_L)), bucket_of(max_new_tokens)
    tokens_RL = np.full((len(contexts), width), model.vocab.bos, np.int32)
    for row_L, tokens_L in zip(tokens_RL, contexts, strict=True):
        row_L[: len(tokens_L)] = tokens_L
    machine = model.machine
    state = begin(
        machine,
        grammar.start([prompt.task]),
        np.array([limit], np.int32),
        row_keys(seed, [row_id]),
        cache_length=width + room,
        max_new_tokens=room,
        num_contexts=len(contexts),
    )
    lengths_R = np.array([len(tokens_L) for tokens_L in contexts], np.int32)
    state = extend_jitted(machine, model.params, state, tokens_RL, lengths_R)
    told = 0
    for run in run_lengths(first_run, longest_run):
        state = decode_jitted(machine, model.params, grammar.tables, state, run)
        events, is_done = made_since(model, grammar, state, told)
        yield events
        if is_done:
            return
        told += len(events)


def run_lengths(first_run: int = FIRST_RUN, longest_run: int = LONGEST_RUN) -> Iterator[int]:
    """Tokens of one run after the other, without end."""
    run = first_run
    while True:
        yield run
        run = min(2 * run, longest_run)


def made_since(model: OmniModel, grammar: Grammar, state: DecodeState, told: int) -> tuple[list[TokenEvent], bool]:
    """What the one answer of `state` has beyond its first `told` tokens, and whether it is done; waits for it."""
    # The whole row in one trip: a slice would be a program of its own for every place and length.
    tokens_BT, step_B, state_B = jax.device_get((state.tokens_BT, state.step_B, state.grammar.state_B))
    ids = [int(token) for token in tokens_BT[0, told : step_B[0]]]
    modality_V = model.vocab.modality_V
    events = [TokenEvent(0, told + i, token, Modality(int(modality_V[token]))) for i, token in enumerate(ids)]
    return events, grammar.kinds[int(state_B[0])] == "done"


class SpeechDecoder(Protocol):
    """What `SpeechTokenizer.stream_decoder` returns: a state and codes in, a state and sound out."""

    def start(self) -> Any: ...

    def step(self, state: Any, codes_KU: np.ndarray) -> tuple[Any, np.ndarray]: ...

    def finish(self, state: Any) -> np.ndarray: ...


class SpeechStream:
    """Turns tokens into sound as they come: float32 samples that follow one another without a gap.

    Every utterance of an answer starts the codec anew. Tokens that are not speech pass by.
    """

    def __init__(self, vocab: JointVocab, decoder: SpeechDecoder) -> None:
        self._vocab, self._decoder = vocab, decoder
        self._state: Any = None
        self._rows: list[int] = []

    def push(self, events: list[TokenEvent]) -> np.ndarray:
        """The samples [T] that these tokens make final."""
        sound = [np.zeros(0, np.float32)]
        special = self._vocab.special_ids
        for event in events:
            if event.token_id == special["begin_speech"]:
                # Codes of an utterance that was never finished belong to no other.
                self._state, self._rows = self._decoder.start(), []
            elif event.token_id == special["end_speech"]:
                sound += [self._decode_frames(), self._decoder.finish(self._state)]
                self._state = None
            elif self._state is not None:
                self._rows.append(event.token_id)
        sound.append(self._decode_frames())
        return np.concatenate(sound)

    def _decode_frames(self) -> np.ndarray:
        num_codebooks = len(self._vocab.speech)
        whole = len(self._rows) // num_codebooks * num_codebooks
        if not whole:
            return np.zeros(0, np.float32)
        codes_KU = self._vocab.rows_to_speech(np.array(self._rows[:whole], np.int32))
        self._rows = self._rows[whole:]
        self._state, waveform_T = self._decoder.step(self._state, codes_KU)
        return waveform_T


class LatencyClock:
    """When tokens and sound of one answer came, as someone who listens would notice it.

    Seconds count from the request. Playing starts with the first sound; an underrun is a chunk that comes after all
    sound before it has been played, and delays what follows. Definitions: METHOD section 9.
    """

    def __init__(self, vocab: JointVocab, sample_rate_hz: int, now: Callable[[], float] = time.perf_counter) -> None:
        self._controls = frozenset(vocab.special_ids.values())
        self._rate, self._now, self._start = sample_rate_hz, now, now()
        self._first_token: float | None = None
        self._first_speech_token: float | None = None
        self._first_sound: float | None = None
        self._played_until = 0.0
        self._tokens = self._samples = self._underruns = 0
        self._gaps: list[float] = []
        self._last = self._start

    def heard(self, events: list[TokenEvent], num_samples: int) -> None:
        """Notes that these tokens, and this much sound, have just come."""
        now = self._now()
        if events:
            self._gaps += [(now - self._last) / len(events)] * len(events)
            self._last = now
            self._first_token = now if self._first_token is None else self._first_token
            if self._first_speech_token is None and any(map(self._is_speech_code, events)):
                self._first_speech_token = now
        self._tokens += len(events)
        if num_samples:
            if self._first_sound is None:
                self._first_sound = self._played_until = now
            elif now > self._played_until:
                self._underruns += 1
                self._played_until = now
            self._played_until += num_samples / self._rate
        self._samples += num_samples

    def _is_speech_code(self, event: TokenEvent) -> bool:
        return event.modality == Modality.SPEECH and event.token_id not in self._controls

    def record(self) -> dict[str, Any]:
        """ftl, ttfa, rtf and what they are made of; None where there was no token or sound."""
        seconds = self._now() - self._start
        audio = self._samples / self._rate

        def since_start(moment: float | None) -> float | None:
            return None if moment is None else moment - self._start

        return {
            "first_token_seconds": since_start(self._first_token),
            "ftl_seconds": since_start(self._first_speech_token),
            "ttfa_seconds": since_start(self._first_sound),
            "seconds": seconds,
            "audio_seconds": audio,
            "rtf": seconds / audio if audio else None,
            "underruns": self._underruns,
            "tokens": self._tokens,
            "tokens_per_second": self._tokens / seconds,
            "token_seconds_p50": float(np.percentile(self._gaps, 50)) if self._gaps else None,
            "token_seconds_p99": float(np.percentile(self._gaps, 99)) if self._gaps else None,
        }
