"""The one encoder between conversations and joint tokens, for training and for inference alike.

`encode` turns messages into an `Example`: token ids and the spans that say what each run of them is. `prompt` gives
the ids an answer is generated from: by construction the very prefix that `encode` puts before that answer.
`unconditional_prompt` and `unconditional` are the same two for an answer nobody asked for, which guidance compares
with, and `pictures_prompt` is what is left of a prompt without its words and sounds. `decode` is the inverse of
`encode`; `parts_of` reads what a model generated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from aromni_jax.structs import Example, Image, Message, Modality, Part, Role, Span, Speech, Task, Text
from aromni_jax.tokenizers.prompts import Piece, Templates
from aromni_jax.tokenizers.text import TextTokenizer
from aromni_jax.vocab import SPECIALS, JointVocab

_TURNS_NAMED = 6


def _kind(part: Part) -> str:
    if isinstance(part, Text):
        return "transcript" if part.is_transcript else "text"
    return "image" if isinstance(part, Image) else "speech"


class _Writer:
    """Collects token ids and the spans over them."""

    def __init__(self, vocab: JointVocab, text_tokenizer: TextTokenizer) -> None:
        self._vocab = vocab
        self._text_tokenizer = text_tokenizer
        self._chunks: list[np.ndarray] = []
        self._length = 0
        self.spans: list[Span] = []

    def _add(self, ids: np.ndarray, modality: Modality, role: Role, message: int, part: int) -> None:
        self.spans.append(Span(self._length, len(ids), modality, role, message, part))
        self._chunks.append(np.asarray(ids, np.int32))
        self._length += len(ids)

    def control(self, name: str, role: Role, message: int) -> None:
        self._add(np.array([self._vocab.special_ids[name]]), SPECIALS[name], role, message, -1)

    def text(self, text: str, role: Role, message: int, part: int) -> None:
        ids = self._vocab.text_to_rows(self._text_tokenizer.encode(text))
        self._add(ids, Modality.TEXT, role, message, part)

    def part(self, part: Part, role: Role, message: int, index: int) -> None:
        special = self._vocab.special_ids
        if isinstance(part, Text):
            if part.is_transcript:
                self.control("begin_transcript", role, message)
                self.text(part.text, Role.TRANSCRIPT, message, index)
                self.control("begin_response", role, message)
            else:
                self.text(part.text, role, message, index)
        elif isinstance(part, Image):
            if part.codes_P is None:
                raise ValueError("an image must be tokenized (codes_P) before it is encoded")
            rows = self._vocab.image_to_rows(part.codes_P)
            ids = np.concatenate([[special["begin_image"]], rows, [special["end_image"]]])
            self._add(ids, Modality.IMAGE, role, message, index)
        else:
            if part.codes_KU is None:
                raise ValueError("speech must be tokenized (codes_KU) before it is encoded")
            rows = self._vocab.speech_to_rows(part.codes_KU)
            ids = np.concatenate([[special["begin_speech"]], rows, [special["end_speech"]]])
            self._add(ids, Modality.SPEECH, role, message, index)

    def example(self, task: Task, key: str) -> Example:
        tokens_L = np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.int32)
        return Example(tokens_L.astype(np.int32), tuple(self.spans), task, key)


def _write_turn(writer: _Writer, pieces: Sequence[Piece], message: Message, index: int, instruction: str) -> None:
    """Writes one turn; every part must have its place in the template."""
    answering = message.role == "assistant"
    content_role = Role.RESPONSE if answering else Role.PROMPT
    waiting = list(enumerate(message.parts))
    for piece in pieces:
        if piece.kind == "control":
            # The token that ends an answer is learned with it; other scaffolding is nobody's speech.
            ends_answer = answering and piece.value in ("eos", "end_model")
            writer.control(piece.value, Role.RESPONSE if ends_answer else Role.CONTROL, index)
        elif piece.kind == "literal":
            writer.text(piece.value, Role.CONTROL, index, -1)
        elif piece.kind == "instruction":
            writer.text(instruction, Role.PROMPT, index, -1)
        else:
            taken = [(i, part) for i, part in waiting if _kind(part) == piece.value]
            if not piece.many:
                if not taken:
                    found = ", ".join(_kind(part) for part in message.parts) or "nothing"
                    raise ValueError(f"the {message.role} turn needs a part of kind {piece.value}; it has {found}")
                taken = taken[:1]
            for i, part in taken:
                writer.part(part, content_role, index, i)
            waiting = [entry for entry in waiting if entry not in taken]
    if waiting:
        left = ", ".join(_kind(part) for _, part in waiting)
        raise ValueError(f"the template has no place for these parts of the {message.role} turn: {left}")


def _write_conversation(
    messages: Sequence[Message], task: Task, writer: _Writer, templates: Templates, instruction: str | None
) -> None:
    template = templates.of(task)
    wording = template.instruction if instruction is None else instruction
    writer.control("bos", Role.CONTROL, -1)
    for index, message in enumerate(messages):
        if message.role not in ("user", "assistant"):
            raise ValueError(f"unknown role {message.role!r} in message {index}; allowed: user, assistant")
        pieces = template.user if message.role == "user" else template.assistant
        if not pieces:
            raise ValueError(f"task {task.label!r} of templates {templates.name!r} has no {message.role} turn")
        _write_turn(writer, pieces, message, index, wording)


def _check_turns(messages: Sequence[Message], task: Task, templates: Templates) -> None:
    """ValueError unless every question has its answer: in one pair, or in as many as a chat has.

    Anything else would teach to end at once, or to answer prompts that inference never makes.
    """
    pair = ("user", "assistant") if templates.of(task).user else ("assistant",)
    num_pairs = max(1, len(messages) // len(pair)) if task == Task.CHAT else 1
    found = [message.role for message in messages]
    if found != [*pair * num_pairs]:
        wanted = ", then ".join(f"one {role} turn" for role in pair) + (", and so on" if task == Task.CHAT else "")
        more = ", ..." if len(found) > _TURNS_NAMED else ""
        raise ValueError(
            f"a document of task {task.label!r} is {wanted}; this one has {', '.join(found[:_TURNS_NAMED])}{more}"
        )


def encode(
    messages: Sequence[Message],
    task: Task,
    vocab: JointVocab,
    text_tokenizer: TextTokenizer,
    templates: Templates,
    *,
    key: str = "",
    instruction: str | None = None,
) -> Example:
    """Encodes a whole conversation, answers included, to training tokens.

    Every text piece is encoded on its own and the ids are concatenated, so that no piece's ids depend on its
    neighbours. Pictures and speech must carry codes.

    Raises:
      ValueError: a part without codes, with codes outside its codebook, or without a place in the template; turns that
        are not questions, each with its answer.
    """
    writer = _Writer(vocab, text_tokenizer)
    _write_conversation(messages, task, writer, templates, instruction)
    _check_turns(messages, task, templates)
    for piece in templates.of(task).end:
        writer.control(piece.value, Role.RESPONSE, len(messages) - 1)
    return writer.example(task, key)


def prompt(
    messages: Sequence[Message],
    task: Task,
    vocab: JointVocab,
    text_tokenizer: TextTokenizer,
    templates: Templates,
    *,
    key: str = "",
    instruction: str | None = None,
) -> Example:
    """Encodes what an answer is generated from: the conversation so far and the opening of the assistant's turn.

    The ids equal the start of `encode(messages + [answer], ...)` up to the first token of the answer.
    """
    writer = _Writer(vocab, text_tokenizer)
    _write_conversation(messages, task, writer, templates, instruction)
    for piece in templates.of(task).assistant:
        if piece.kind == "slot":
            break
        if piece.kind == "control":
            writer.control(piece.value, Role.CONTROL, len(messages))
        else:
            writer.text(piece.value, Role.CONTROL, len(messages), -1)
    return writer.example(task, key)


def unconditional_prompt(vocab: JointVocab) -> np.ndarray:
    """int32 ids that an answer nobody asked for is generated from: the beginning of sequence alone."""
    return np.array([vocab.bos], np.int32)


def has_picture(example: Example) -> bool:
    """Whether a part of the conversation is a picture."""
    return any(span.modality == Modality.IMAGE and span.part >= 0 for span in example.spans)


def pictures_prompt(example: Example, vocab: JointVocab) -> np.ndarray:
    """int32 ids that an answer to the pictures of a prompt alone is generated from.

    `unconditional_prompt`, then every picture of the conversation with its delimiters, in order; nothing else.
    """
    pictures = [
        example.tokens_L[span.start : span.start + span.length]
        for span in example.spans
        if span.modality == Modality.IMAGE and span.part >= 0
    ]
    return np.concatenate([unconditional_prompt(vocab), *pictures])


def unconditional(example: Example, vocab: JointVocab, key: str = "") -> Example | None:
    """The last answer of an encoded conversation as nobody asked for it; None where it has no answer.

    Its ids are those of `unconditional_prompt` and then those that follow `prompt`, the end of the answer included.
    """
    last = max((span.message for span in example.spans), default=-1)
    answering = (Role.RESPONSE, Role.TRANSCRIPT)
    starts = [i for i, span in enumerate(example.spans) if span.message == last and span.role in answering]
    if not starts:
        return None
    answer = example.spans[starts[0] :]
    opening = unconditional_prompt(vocab)
    moved = len(opening) - answer[0].start
    spans = (
        Span(0, len(opening), Modality.TEXT, Role.CONTROL, -1, -1),
        *(dataclasses.replace(span, start=span.start + moved) for span in answer),
    )
    return Example(np.concatenate([opening, example.tokens_L[answer[0].start :]]), spans, example.task, key)


def decode(example: Example, vocab: JointVocab, text_tokenizer: TextTokenizer) -> list[Message]:
    """The messages an example was encoded from, media as codes. Reads the spans: nothing is searched for."""
    found: dict[int, dict[int, Part]] = {}
    answered: set[int] = set()
    for span in example.spans:
        if span.message >= 0:
            found.setdefault(span.message, {})
        if span.role in (Role.RESPONSE, Role.TRANSCRIPT):
            answered.add(span.message)
        if span.part < 0:
            continue
        rows = example.tokens_L[span.start : span.start + span.length]
        part: Part
        if span.modality == Modality.TEXT:
            part = Text(text_tokenizer.decode(vocab.rows_to_text(rows)), span.role == Role.TRANSCRIPT)
        elif span.modality == Modality.IMAGE:
            part = Image(codes_P=vocab.rows_to_image(rows[1:-1]))
        else:
            part = Speech(codes_KU=vocab.rows_to_speech(rows[1:-1]))
        found[span.message][span.part] = part
    return [
        Message("assistant" if index in answered else "user", tuple(parts[i] for i in sorted(parts)))
        for index, parts in sorted(found.items())
    ]


def parts_of(token_ids: Sequence[int], vocab: JointVocab, text_tokenizer: TextTokenizer) -> tuple[Part, ...]:
    """The parts a model wrote: `token_ids` is an answer as the decoding grammar lets it through, from its first token.

    Reading stops at end of sequence or end of model turn. A picture or utterance cut short by a budget is returned
    as far as it goes (a picture only when whole).
    """
    special = vocab.special_ids
    parts: list[Part] = []
    rows: list[int] = []
    modality, is_transcript = Modality.TEXT, False

    def close() -> None:
        if modality == Modality.TEXT and (rows or is_transcript):
            parts.append(Text(text_tokenizer.decode(vocab.rows_to_text(np.array(rows, np.int32))), is_transcript))
        elif modality == Modality.SPEECH:
            parts.append(Speech(codes_KU=vocab.rows_to_speech(np.array(rows, np.int32))))
        elif modality == Modality.IMAGE and len(rows) == vocab.tokens_per_image:
            parts.append(Image(codes_P=vocab.rows_to_image(np.array(rows, np.int32))))
        rows.clear()

    border = {
        special["begin_image"]: (Modality.IMAGE, False),
        special["begin_speech"]: (Modality.SPEECH, False),
        special["begin_transcript"]: (Modality.TEXT, True),
        special["begin_response"]: (Modality.TEXT, False),
        special["end_image"]: (Modality.TEXT, False),
        special["end_speech"]: (Modality.TEXT, False),
    }
    for token_id in map(int, token_ids):
        if token_id in (special["eos"], special["end_model"]):
            break
        if token_id in border:
            close()
            modality, is_transcript = border[token_id]
        else:
            rows.append(token_id)
    close()
    return tuple(parts)
