"""What becomes of documents that are too long or too short: a stated policy, and a reason for everything left out.

Only the text of a `text` document is ever cut: a document whose parts are all text that is to be written, in one run.
A picture, an utterance, a prompt or a turn of a conversation stays whole or is left out with its document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from aromni_jax.structs import Example, Modality, Role, Span, Task
from aromni_jax.tokenizers.text import TextTokenizer
from aromni_jax.vocab import JointVocab
from data_pipelines.sources import RecordError

TooLong = Literal["drop", "error", "truncate_text", "split_text"]

TOO_LONG, NOT_TEXT, TOO_SHORT, TRUNCATED = "length", "length_not_text", "too_short", "truncated"
CHOSEN_STAGES = frozenset({TOO_LONG, NOT_TEXT, TOO_SHORT, TRUNCATED})
"""Reasons that name what the settings asked for: such records are counted, and are not bad."""

_SENTENCE_ENDS = (".", "!", "?", "\n", "。", "！", "？")


@dataclasses.dataclass(frozen=True)
class LengthLimits:
    """Fewest and most tokens of a document, all ids counted (`max_tokens` 0: no limit), and what to do beyond them."""

    min_tokens: int
    max_tokens: int
    too_long: TooLong

    def __post_init__(self) -> None:
        for name in ("min_tokens", "max_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"config key '{name}': must be 0 (no limit) or more, not {getattr(self, name)}")
        if self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"config key 'min_tokens': {self.min_tokens} is more than max_tokens {self.max_tokens}, which leaves "
                "nothing; lower it"
            )
        if self.too_long != "drop" and not self.max_tokens:
            raise ValueError(f"config key 'too_long': {self.too_long!r} does nothing without a limit; set max_tokens")

    def apply(
        self, example: Example, vocab: JointVocab, text_tokenizer: TextTokenizer
    ) -> list[tuple[Example, dict[str, int]]]:
        """The documents that `example` becomes, each with what was done to it: none, `truncated_from`, or pieces.

        Pieces of one text are of about equal length, cut between tokens, after a sentence or a word where one ends
        nearby, and keyed `key#0`, `key#1`, ...

        Raises:
          RecordError: the document is left out; its stage says why.
          ValueError: `too_long` is "error" and it is, or `max_tokens` leaves no room for text.
        """
        num_tokens = len(example.tokens_L)
        if num_tokens < self.min_tokens:
            message = f"{example.key} has {num_tokens} tokens, fewer than min_tokens {self.min_tokens}"
            raise RecordError(TOO_SHORT, message)
        if not self.max_tokens or num_tokens <= self.max_tokens:
            return [(example, {})]
        message = f"{example.key} has {num_tokens} tokens, more than max_tokens {self.max_tokens}"
        if self.too_long == "error":
            raise ValueError(f"{message}; raise max_tokens or set too_long to 'drop', 'truncate_text' or 'split_text'")
        if self.too_long == "drop":
            raise RecordError(TOO_LONG, message)
        body = _text_body(example)
        if body is None:
            raise RecordError(NOT_TEXT, f"{message}, and is not plain text that could be cut")
        num_others = num_tokens - len(body)
        room = self.max_tokens - num_others
        if room < 1:
            raise ValueError(
                f"config key 'max_tokens': {self.max_tokens} leaves no room for text beside the {num_others} other "
                f"tokens of {example.key}; raise it"
            )
        texts = _Texts(example.tokens_L[body.start : body.stop], vocab, text_tokenizer)
        if self.too_long == "truncate_text":
            cut = texts.best_border(room - room // 4, room, nearest=room)
            kept = range(body.start, body.start + cut)
            return [(_with_body(example, body, kept, example.key), {"truncated_from": num_tokens})]
        pieces = [range(body.start + start, body.start + stop) for start, stop in texts.pieces(room)]
        return [
            (
                _with_body(example, body, kept, f"{example.key}#{number}"),
                {"piece": number, "pieces": len(pieces)},
            )
            for number, kept in enumerate(pieces)
        ]


def _text_body(example: Example) -> range | None:
    """Token indices of the one run of text that an example is made of; None where there is more to it."""
    if example.task != Task.TEXT:
        return None
    is_body = [span.part >= 0 for span in example.spans]
    if True not in is_body or any(span.modality != Modality.TEXT for span in example.spans):
        return None
    first, last = is_body.index(True), len(is_body) - 1 - is_body[::-1].index(True)
    run = example.spans[first : last + 1]
    if any(span.part < 0 or span.role != Role.RESPONSE for span in run):
        return None
    return range(run[0].start, run[-1].start + run[-1].length)


def _with_body(example: Example, body: range, kept: range, key: str) -> Example:
    """The example with only the tokens `kept` of its `body`, everything around that body, and the spans of these."""
    kept_L = np.r_[0 : body.start, kept.start : kept.stop, body.stop : len(example.tokens_L)]
    spans, start = [], 0
    for span in example.spans:
        length = span.length
        if span.part >= 0:
            length = len(range(max(span.start, kept.start), min(span.start + span.length, kept.stop)))
        if length or span.part < 0:
            spans.append(Span(start, length, span.modality, span.role, span.message, span.part))
        start += length
    return Example(example.tokens_L[kept_L], tuple(spans), example.task, key)


class _Texts:
    """The tokens of a text, and how good a place each border between two of them is to cut at."""

    def __init__(self, rows_L: np.ndarray, vocab: JointVocab, text_tokenizer: TextTokenizer) -> None:
        self._ids = vocab.rows_to_text(rows_L)
        self._decode = text_tokenizer.decode

    def pieces(self, room: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of as few pieces of at most `room` tokens as hold the whole, of about equal length."""
        start, total = 0, len(self._ids)
        for left in range(-(-total // room), 0, -1):
            rest = total - start
            even = -(-rest // left)
            slack = even // 4
            # However this piece is cut, the others must have room for what remains.
            shortest = max(1, even - slack, rest - (left - 1) * room)
            stop = start + (self.best_border(shortest, min(room, even + slack), even, start) if left > 1 else rest)
            yield start, stop
            start = stop

    def best_border(self, shortest: int, longest: int, nearest: int, start: int = 0) -> int:
        """The best length for a piece from `start`: after a sentence, a word or a character, near `nearest` tokens."""
        lengths = range(max(1, shortest), longest + 1)
        return max(lengths, key=lambda length: (self._quality(start + length), -abs(length - nearest)))

    def _quality(self, border: int) -> int:
        if border >= len(self._ids):
            return 3
        before, after = self._text(border - 1), self._text(border)
        is_between_words = before[-1:].isspace() or after[:1].isspace()
        if before.rstrip(" ").endswith(_SENTENCE_ENDS) and (is_between_words or not before.isascii()):
            return 3
        if is_between_words:
            return 2
        return 0 if "\ufffd" in before + after else 1  # a character spelled in several tokens, or a word

    def _text(self, index: int) -> str:
        return self._decode([int(self._ids[index])])
