"""Synthetic rows: endless, learnable, multimodal, with no data set; `data.mixture = "synthetic"`.

Every document is a conversation about two numbers, a start and a stride, in a valid grammar of spans: texts count from
the start by the stride, and the codes of pictures and speech are arithmetic sequences that follow from the same two
numbers. A model that reads the prompt can predict every code, so the loss of each modality falls. Row r is a function
of (seed, r) alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from aromni_jax.structs import Example, Image, Message, Modality, Part, Role, Speech, Task, Text
from aromni_jax.tokenizers import joint
from aromni_jax.tokenizers.prompts import load_templates
from aromni_jax.vocab import JointVocab
from data_pipelines.records import StoredExample, target_counts_MR

_STARTS, _STRIDES = 10, 5
_SPEECH_FRAMES = (8, 33)
_TEXT_TERMS = (3, 25)
_STATISTICS_ROWS = 16
_ENDLESS = 2**60
_TEMPLATES = "quickstart"


class _BytesOnRows:
    """Text as UTF-8 bytes on the text rows of any vocabulary (bytes share rows where there are fewer than 256)."""

    fingerprint = "synthetic-bytes"

    def __init__(self, vocab: JointVocab) -> None:
        self.size = vocab.text.size
        self._first_id = vocab.text.start - vocab.text_offset

    def encode(self, text: str) -> list[int]:
        return [self._first_id + byte % self.size for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - self._first_id for i in ids).decode(errors="replace")

    def save(self, directory: object) -> None:
        raise ValueError("synthetic text has no tokenizer to save; pre-tokenize a data set with real tokenizers")


class SyntheticRows:
    """Rows of `row_length` targets for any vocabulary, all in one segment that does not end."""

    description: dict[str, Any] = {}

    def __init__(self, vocab: JointVocab, row_length: int, *, seed: int) -> None:
        self._vocab = vocab
        self._row_length = row_length
        self._seed = seed
        self._text = _BytesOnRows(vocab)
        self._templates = load_templates(_TEMPLATES)
        tasks = {
            Task.TEXT_TO_IMAGE: bool(vocab.image),
            Task.CAPTION: bool(vocab.image),
            Task.SPEECH_TO_IMAGE: bool(vocab.image and vocab.speech),
            Task.SPEECH_TO_TEXT: bool(vocab.speech),
            Task.TEXT_TO_SPEECH: bool(vocab.speech),
            Task.TEXT: True,
        }
        shortest = {task: len(self._document(task, 0, 0, 0, "").tokens_L) - 1 for task, has in tasks.items() if has}
        self._tasks = [task for task, length in shortest.items() if length <= row_length]
        if not self._tasks:
            raise ValueError(f"sequence_length {row_length} is too short for synthetic rows; give at least 32")
        identity = json.dumps([vocab.fingerprint, row_length, seed, self._templates.fingerprint])
        self.fingerprint = hashlib.sha256(f"synthetic {identity}".encode()).hexdigest()[:16]

    def examples(self, row: int) -> list[Example]:
        """The documents of row `row`: drawn until the row is full, the last one a text of the length that is left."""
        rng = np.random.default_rng([self._seed, row])
        space = self._row_length
        found: list[Example] = []
        while True:
            task = self._tasks[int(rng.integers(len(self._tasks)))]
            start, stride = int(rng.integers(_STARTS)), int(rng.integers(1, _STRIDES))
            frames = int(rng.integers(*_SPEECH_FRAMES))
            key = f"synthetic/{row}/{len(found)}"
            example = self._document(task, start, stride, frames, key)
            length = len(example.tokens_L) - 1
            if length > space:
                filler = self._filler(start, stride, space, key)
                return found + ([filler] if filler else [])
            found.append(example)
            space -= length

    def _document(self, task: Task, start: int, stride: int, size: int, key: str) -> Example:
        spec = f"{start} {stride}"
        asked: list[Part]
        answer: Part
        if task == Task.TEXT:
            terms = " ".join(str(start + stride * i) for i in range(_TEXT_TERMS[0] + size % _TEXT_TERMS[1]))
            asked, answer = [], Text(terms)
        elif task == Task.TEXT_TO_IMAGE:
            asked, answer = [Text(spec)], self._image(start, stride)
        elif task == Task.CAPTION:
            asked, answer = [self._image(start, stride)], Text(spec)
        elif task == Task.SPEECH_TO_IMAGE:
            asked, answer = [self._speech(start, stride, size)], self._image(start, stride)
        elif task == Task.SPEECH_TO_TEXT:
            asked, answer = [self._speech(start, stride, size)], Text(spec)
        else:
            asked, answer = [Text(spec)], self._speech(start, stride, size)
        messages = [Message("user", tuple(asked))] if asked else []
        messages.append(Message("assistant", (answer,)))
        return joint.encode(messages, task, self._vocab, self._text, self._templates, key=key)

    def _filler(self, start: int, stride: int, space: int, key: str) -> Example | None:
        """A text document of exactly `space` targets: beginning, `space - 1` characters, end."""
        if space < 2:
            return None
        terms = " ".join(str(start + stride * i) for i in range(space))
        text = Text(terms[: space - 1])
        return joint.encode(
            [Message("assistant", (text,))], Task.TEXT, self._vocab, self._text, self._templates, key=key
        )

    def _image(self, start: int, stride: int) -> Image:
        assert self._vocab.image
        return Image(codes_P=(start + stride * np.arange(self._vocab.tokens_per_image)) % self._vocab.image.size)

    def _speech(self, start: int, stride: int, frames: int) -> Speech:
        codes = [
            (start + index + stride * np.arange(frames)) % span.size for index, span in enumerate(self._vocab.speech)
        ]
        return Speech(codes_KU=np.stack(codes))

    def num_rows(self, segment: int) -> int:
        """More than can be read."""
        return _ENDLESS

    def documents(self, segment: int, row: int) -> list[StoredExample]:
        """The examples of row `row` in their stored form."""
        return [StoredExample.of(example) for example in self.examples(row)]

    @functools.cached_property
    def counts_TMR(self) -> np.ndarray:
        """int64 target tokens by task, modality and role of the first rows, which stand for all."""
        counts_TMR = np.zeros((len(Task), len(Modality), len(Role)), np.int64)
        for row in range(_STATISTICS_ROWS):
            for example in self.examples(row):
                counts_TMR[example.task] += target_counts_MR(StoredExample.of(example))
        return counts_TMR

    def fill(self) -> float:
        """Share of row positions that hold a token, over the first rows."""
        tokens = sum(len(example.tokens_L) - 1 for row in range(_STATISTICS_ROWS) for example in self.examples(row))
        return tokens / (_STATISTICS_ROWS * self._row_length)

    def keys(self, segment: int, row: int) -> list[str]:
        """Names of the documents of a row."""
        return [example.key for example in self.examples(row)]

    def shares(self, segment: int, row: int) -> dict[str, float]:
        """Nothing: there are no data sets."""
        return {}
