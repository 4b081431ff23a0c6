"""The authors' two formats: documents that are already ids of the released layout (`JointVocab.released`).

Stage 1 is JSONL: `discrete_code` (the ids), `response` (ids of the answer, of which only the number is used: they stand
at the end), `task`, `id`. Instruction tuning is Parquet: `input_ids` and `labels`, -100 where nothing is learned.
Source: training/pretrain and training/instruction-tuning of the authors' public code (METHOD sections 4 and 5).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np

from aromni_jax.structs import Example, Modality, Role, Span, Task
from aromni_jax.vocab import JointVocab
from data_pipelines.containers import content_hash, matching
from data_pipelines.sources import Conversation, LineSource, RecordError
from data_pipelines.tables import TableReader, TableSource

IGNORED_LABEL = -100
TASKS = {
    "image_caption": Task.CAPTION,
    "speech_to_text": Task.SPEECH_TO_TEXT,
    "text_to_image": Task.TEXT_TO_IMAGE,
    "text_to_speech": Task.TEXT_TO_SPEECH,
    "speech_to_image": Task.SPEECH_TO_IMAGE,
    "text_to_text": Task.TEXT,
    # Their stage 1 doubles the answers of image_caption, not of image_to_text: so it is no caption here.
    "image_to_text": Task.QUESTION,
}


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDocument(Conversation):
    """A document of ids: `tokens_L` int32, and `answer_mask_L` bool, true for the tokens of answers."""

    tokens_L: np.ndarray
    answer_mask_L: np.ndarray

    def example(self, vocab: JointVocab) -> Example:
        """The example with its spans; here alone borders are found in ids, since the formats record nothing else.

        Raises:
          ValueError: `vocab` is not the released layout.
          RecordError: an id without meaning, or a picture or utterance that is not whole.
        """
        if dataclasses.replace(vocab, tokenizer_fingerprints=()) != JointVocab.released():
            raise ValueError(
                "these documents are ids of the released layout, the tokenizers have another; give those of an "
                "imported released model"
            )
        return Example(self.tokens_L, tuple(_spans(self, vocab)), self.task, self.key)


def _spans(document: TokenizedDocument, vocab: JointVocab) -> list[Span]:
    tokens_L, key = document.tokens_L, document.key
    if tokens_L.min() < 0 or tokens_L.max() >= vocab.size or not vocab.valid_mask_V[tokens_L].all():
        raise RecordError("encode", f"{key}: it has ids that mean nothing in the released layout")
    special = vocab.special_ids
    blocks = {
        special["begin_image"]: (special["end_image"], Modality.IMAGE),
        special["begin_speech"]: (special["end_speech"], Modality.SPEECH),
    }
    is_text_L = (vocab.modality_V[tokens_L] == Modality.TEXT) & ~np.isin(tokens_L, list(special.values()))
    # Runs end where text does and where an answer begins or ends.
    run_ends = 1 + np.flatnonzero(np.diff(is_text_L.astype(np.int8)) | np.diff(document.answer_mask_L.astype(np.int8)))
    turns_L = np.cumsum(np.diff(document.answer_mask_L.astype(np.int8), prepend=document.answer_mask_L[:1]) != 0)
    spans: list[Span] = []
    parts: dict[int, int] = {}
    start, in_transcript = 0, False
    while start < len(tokens_L):
        token, modality = int(tokens_L[start]), Modality.TEXT
        if is_text_L[start]:
            later = run_ends[run_ends > start]
            stop = int(later[0]) if len(later) else len(tokens_L)
        elif token in blocks:
            end, modality = blocks[token]
            ends = np.flatnonzero(tokens_L[start:] == end)
            stop = start + int(ends[0]) + 1 if len(ends) else start + 1
            codes = tokens_L[start + 1 : stop - 1]
            is_whole = (
                len(ends) and (vocab.modality_V[codes] == modality).all() and not np.isin(codes, list(blocks)).any()
            )
            if not is_whole or (modality == Modality.IMAGE and len(codes) != vocab.tokens_per_image):
                raise RecordError("encode", f"{key}: the {modality.label} at token {start} is not whole")
        elif vocab.modality_V[token] == Modality.TEXT:
            stop = start + 1
        else:
            raise RecordError("encode", f"{key}: token {start} belongs to a picture or utterance that has not begun")
        # The last token of a span decides: an answer may be counted without the token that opens its picture.
        is_answer, turn = bool(document.answer_mask_L[stop - 1]), int(turns_L[stop - 1])
        is_control = token in special.values() and token not in blocks
        in_transcript = token == special["begin_transcript"] or (in_transcript and token != special["begin_response"])
        role = Role.CONTROL if is_control else Role.PROMPT
        if is_answer:
            role = Role.TRANSCRIPT if in_transcript and not is_control else Role.RESPONSE
        part = -1
        if not is_control:
            part = parts[turn] = parts.get(turn, -1) + 1
        spans.append(Span(start, stop - start, modality, role, -1 if start == 0 and is_control else turn, part))
        start = stop
    return spans


def _ids(values: object, where: str, name: str) -> np.ndarray:
    ids = np.array(values)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind != "i":
        raise RecordError("parse", f"{where}: {name} must be a list of ids that is not empty")
    return ids.astype(np.int32)


class TokenizedJsonlSource(LineSource):
    """The authors' stage 1: a document of ids a line. Equal documents are never split."""

    def _find_files(self) -> list[pathlib.Path]:
        return matching(self.path, (".jsonl",))

    def _split_of(self, line: bytes, number: int) -> str:
        return self._side(content_hash(json.dumps(json.loads(line)["discrete_code"]).encode()))

    def _parsed(self, line: bytes, file: pathlib.Path, where: str, task: Task | None) -> Conversation:
        fields = json.loads(line)
        tokens_L = _ids(fields["discrete_code"], where, "discrete_code")
        if fields["task"] not in TASKS:
            raise RecordError("parse", f"{where}: unknown task {fields['task']!r}; known: {', '.join(TASKS)}")
        end = len(tokens_L)
        eos = JointVocab.released().eos
        while end and tokens_L[end - 1] == eos:  # their count leaves it out; it is learned with the answer
            end -= 1
        num_answer = len(fields.get("response") or ())
        if num_answer > end:
            raise RecordError("parse", f"{where}: the response has {num_answer} ids, the document {end}")
        # Plain text has no prompt: all of it is what the model is to write.
        begin = end - num_answer if num_answer or TASKS[fields["task"]] != Task.TEXT else 1
        answer_mask_L = (np.arange(len(tokens_L)) >= begin) & (num_answer > 0 or begin == 1)
        return TokenizedDocument(str(fields.get("id", where)), TASKS[fields["task"]], (), {}, tokens_L, answer_mask_L)


class InstructParquetSource(TableSource):
    """The authors' instruction tuning: `input_ids` and `labels`. Equal documents are never split."""

    TASKS = ()
    COLUMNS = ()

    def _prepare(self) -> None:
        self._files, self._reader = matching(self.path, (".parquet",)), TableReader()
        self.columns = {"text": "input_ids", "labels": "labels"}

    def _tasks_here(self) -> tuple[Task, ...]:
        return ()

    def _conversation(self, item: np.ndarray, task: Task | None) -> Conversation:
        file_number, group, row, _ = (int(value) for value in item)
        where, path = self._place(item), self._files[file_number]
        columns = (self._reader.cell(path, group, name, row) for name in ("input_ids", "labels"))
        tokens_L, labels_L = (_ids(v, where, name) for v, name in zip(columns, ("input_ids", "labels"), strict=True))
        answer_mask_L = labels_L != IGNORED_LABEL
        if labels_L.shape != tokens_L.shape or (labels_L != tokens_L)[answer_mask_L].any():
            raise RecordError("parse", f"{where}: labels must be {IGNORED_LABEL} or the id they stand under")
        return TokenizedDocument(where, Task.CHAT, (), {}, tokens_L, answer_mask_L)
