"""`aromni generate --stream`: each answer on the terminal and in its WAV file while it is being made."""

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from aromni_jax.inference.decode import bucket_of
from aromni_jax.inference.streaming import LatencyClock, SpeechStream, stream_tokens
from aromni_jax.structs import Modality, Part, TokenEvent
from aromni_jax.tokenizers import joint

if TYPE_CHECKING:
    from launch.generate import Answer, Asked
    from launch.loading import LoadedModel

_RUNS_TO_WARM = 5
"""Enough for a run of every length, and so for every size of chunk that the codec compiles."""


def stream_answers(
    loaded: LoadedModel, asked: Asked, stems: list[str], output: pathlib.Path, seed: int
) -> Iterator[Answer]:
    """Answers one request after the other, with the tokens that `answer` would give them all together.

    Sound is in `STEM.wav` up to the last chunk whenever the command is stopped. Of the first answer of each shape the
    beginning is made once before, unheard, so that no latency counts a compilation.
    """
    warm: set[tuple[int, ...]] = set()
    for row, prompt in asked.prompts.items():
        limit = asked.limits[prompt.task]
        stream = functools.partial(
            stream_tokens, loaded.model, asked.grammar, prompt, max_new_tokens=limit, seed=seed, row_id=row
        )
        shape = (bucket_of(len(prompt.tokens_L)), limit, prompt.task)
        if shape not in warm:
            take(loaded, itertools.islice(stream(), _RUNS_TO_WARM))
            warm.add(shape)
        parts, record = take(loaded, stream(), output / f"{stems[row]}.wav", is_shown=True)
        yield row, parts, {"latency": record}


def take(
    loaded: LoadedModel, runs: Iterable[list[TokenEvent]], path: pathlib.Path | None = None, *, is_shown: bool = False
) -> tuple[tuple[Part, ...], dict[str, Any]]:
    """Parts and latency record of one answer that comes in `runs`; `path` is where its sound goes, if there is any."""
    vocab, codec = loaded.model.vocab, loaded.bundle.speech
    speech = SpeechStream(vocab, codec.stream_decoder()) if codec else None
    clock = LatencyClock(vocab, codec.sample_rate_hz if codec else 1)
    typed = _Typing(loaded) if is_shown else None
    events: list[TokenEvent] = []
    with contextlib.ExitStack() as stack:
        file: soundfile.SoundFile | None = None
        for run in runs:
            sound = speech.push(run) if speech else np.zeros(0, np.float32)
            clock.heard(run, len(sound))
            events += run
            if typed:
                typed.show(run)
            if len(sound) and path and codec:
                if file is None:
                    opened = soundfile.SoundFile(path, "w", codec.sample_rate_hz, channels=1, subtype="PCM_16")
                    file = stack.enter_context(opened)
                file.write(sound)
                file.flush()
    if typed:
        print(flush=True)
    ids = [event.token_id for event in events]
    return joint.parts_of(ids, vocab, loaded.bundle.text), clock.record()


class _Typing:
    """Prints text as its tokens come; a character of several tokens appears when it is whole."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._vocab, self._tokenizer = loaded.model.vocab, loaded.bundle.text
        self._controls = frozenset(self._vocab.special_ids.values())
        self._rows: list[int] = []
        self._shown = ""

    def show(self, events: list[TokenEvent]) -> None:
        for event in events:
            if event.token_id in self._controls:
                self._rows, self._shown = [], ""
            elif event.modality == Modality.TEXT:
                self._rows.append(event.token_id)
        text = self._tokenizer.decode(self._vocab.rows_to_text(np.array(self._rows, np.int32)))
        if text.startswith(self._shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[len(self._shown) :], end="", flush=True)
            self._shown = text
